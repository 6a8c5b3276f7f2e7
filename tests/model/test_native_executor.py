"""The fused executor: equal to transformers in float32, and the same bits however the work is cut."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from server.engine.plan import PrefixGroup
from server.worker.native import NativeExecutor, NativeUnavailable
from tests.model.native_support import (
    Driver,
    Stream,
    make_memory,
    make_model,
    pack,
    shuffled_blocks,
    skip_without_compiler,
)

skip_without_compiler()

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd sizes": {"hidden_size": 42, "intermediate_size": 72, "head_dim": 8, "vocab_size": 97},
    "wide heads": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64},
    "one kv head": {"head_dim": 64, "num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 50},
    "long sums": {"hidden_size": 1404, "intermediate_size": 700, "head_dim": 128, "num_hidden_layers": 1},
    "tied": {"tie_word_embeddings": True},
}


def reference(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


def run_whole(driver: Driver, tokens: list[int], blocks: list[int]) -> torch.Tensor:
    return driver.step([(Stream(tokens, blocks), len(tokens))])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_chunked_and_decoded_logits_equal_transformers(family: str, shape: str) -> None:
    rng = random.Random(f"{family}/{shape}")
    model = make_model(family, **SHAPES[shape])
    memory = make_memory(model)
    driver = Driver(NativeExecutor(model, memory, 3))
    free = shuffled_blocks(64, 64, rng)
    sequences = []
    for length in (1, 40, 75):
        tokens = [rng.randrange(model.config.vocab_size) for _ in range(length)]
        sequences.append(Stream(tokens, [free.pop() for _ in range(-(-length // 16))]))
    got: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(s.computed < len(s.tokens) for s in sequences):
        work = [
            (i, min(rng.choice((1, 1, 7, 16, 33)), len(s.tokens) - s.computed))
            for i, s in enumerate(sequences)
            if s.computed < len(s.tokens)
        ]
        logits = driver.step([(sequences[i], n) for i, n in work])
        for (i, _), part in zip(work, logits.split([n for _, n in work]), strict=True):
            got[i].append(part)
    for sequence, parts in zip(sequences, got, strict=True):
        want = reference(model, sequence.tokens)
        torch.testing.assert_close(torch.cat(parts), want, atol=1e-4, rtol=1e-4)
        assert torch.equal(torch.cat(parts).argmax(1), want.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_rows_are_the_same_bits_alone_batched_chunked_and_threaded(family: str, dtype: torch.dtype) -> None:
    rng = random.Random(7)
    model = make_model(family, dtype=dtype)
    results = []
    prompts = [[rng.randrange(101) for _ in range(n)] for n in (64, 3, 130, 17, 1, 33, 90)]
    for threads in (1, 2, 3, 4):
        memory = make_memory(model, dtype=dtype)
        driver = Driver(NativeExecutor(model, memory, threads))
        free = shuffled_blocks(64, 64, rng)
        tables = [[free.pop() for _ in range(-(-len(p) // 16))] for p in prompts]
        alone = [run_whole(driver, p, t) for p, t in zip(prompts, tables, strict=True)]
        results.append(alone)
        together = driver.step([(Stream(p, t), len(p)) for p, t in zip(prompts, tables, strict=True)])
        assert torch.equal(together, torch.cat(alone))
        for prompt, table, whole in zip(prompts, tables, alone, strict=True):
            sequence, parts = Stream(prompt, table), []
            while sequence.computed < len(prompt):
                n = min(rng.choice((1, 2, 5, 16, 31)), len(prompt) - sequence.computed)
                parts.append(driver.step([(sequence, n)]))
            assert torch.equal(torch.cat(parts), whole)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_nested_groups_change_no_bit(family: str, dtype: torch.dtype, block_size: int) -> None:
    rng = random.Random(11)
    model = make_model(family, dtype=dtype)
    memory = make_memory(model, num_blocks=128, block_size=block_size, dtype=dtype)
    driver = Driver(NativeExecutor(model, memory, 3), block_size)
    free = shuffled_blocks(128, 128, rng)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(101) for _ in range(count)]

    def blocks(count: int) -> list[int]:
        return [free.pop() for _ in range(count)]

    root, inner = Stream(tokens(3 * block_size), blocks(3)), blocks(2)
    stem = Stream(root.tokens + tokens(2 * block_size), root.blocks + inner)
    driver.step([(root, 3 * block_size)])
    stem.computed = root.computed
    driver.step([(stem, 2 * block_size)])
    # Before the group, in it (two in a nested group, one beside), and after it.
    parents = [None, root, stem, stem, root, None]
    sequences = []
    for parent, own, new in zip(parents, (20, 5, 30, 9, 1, 13), (3, 1, 4, 1, 1, 13), strict=True):
        head = parent if parent is not None else Stream([], [])
        table = head.blocks + blocks(-(-own // block_size))
        sequence = Stream(head.tokens + tokens(own), table, head.computed)
        if own > new:
            driver.step([(sequence, own - new)])
        sequences.append((sequence, new))
    alone = []
    for sequence, new in sequences:
        alone.append(driver.step([(sequence, new)]))
        sequence.computed -= new
    plain = driver.step(sequences)
    for sequence, new in sequences:
        sequence.computed -= new
    grouped = driver.step(sequences, [PrefixGroup(1, 5, 0, 3), PrefixGroup(2, 4, 3, 5)])
    assert torch.equal(plain, torch.cat(alone))
    assert torch.equal(grouped, plain)


def test_bfloat16_is_near_the_float32_reference_of_the_same_weights() -> None:
    model = make_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    exact = make_model("llama", tie_word_embeddings=True)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    prompt = [random.Random(3).randrange(101) for _ in range(100)]
    driver = Driver(NativeExecutor(model, make_memory(model, dtype=torch.bfloat16), 2))
    got = run_whole(driver, prompt, list(range(7)))
    want = reference(exact, prompt)
    assert (got - want).abs().max() < 0.03 * want.abs().max()
    # With float32 KV nothing is rounded but the weights.
    driver = Driver(NativeExecutor(model, make_memory(model), 2))
    torch.testing.assert_close(run_whole(driver, prompt, list(range(7))), want, atol=1e-4, rtol=1e-4)


def test_logits_of_chosen_rows_only() -> None:
    model = make_model("llama")
    executor = NativeExecutor(model, make_memory(model), 2, max_batch_tokens=4, max_logit_rows=1)
    batch = pack([(0, [5, 6, 7], [0]), (0, [8, 9], [1])], 16)
    every = executor.forward(batch)
    batch.logit_rows.resize_(2).copy_(torch.tensor([4, 2]))
    assert torch.equal(executor.forward(batch), every[[4, 2]])
    batch.logit_rows.resize_(0)
    assert executor.forward(batch).shape == (0, 101)


@pytest.mark.parametrize("tied", [False, True])
def test_consuming_the_model_releases_its_weights_and_changes_no_bit(tied: bool) -> None:
    model = make_model("qwen2", tie_word_embeddings=tied)
    batch = pack([(0, [1, 2, 3], [4])], 16)
    want = NativeExecutor(model, make_memory(model), 1).forward(batch)
    executor = NativeExecutor.consume(model, make_memory(model), 1)
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 0
    assert model.lm_head.weight.numel() == 0
    del model
    gc.collect()
    assert torch.equal(executor.forward(batch), want)


def test_a_nan_left_in_a_freed_slot_does_not_spread() -> None:
    model = make_model("llama")
    memory = make_memory(model)
    driver = Driver(NativeExecutor(model, memory, 2))
    clean = run_whole(driver, [1, 2, 3], [0])
    memory.storage.fill_(float("nan"))
    assert torch.equal(run_whole(driver, [1, 2, 3], [0]), clean)


def test_a_nan_in_the_weights_shows_in_the_logits_of_its_own_sequence_only() -> None:
    model = make_model("llama")
    clean = make_model("llama")
    model.model.embed_tokens.weight.data[9] = float("nan")
    work = [(0, [1, 9, 3], [0]), (0, [4, 5], [1])]
    got = NativeExecutor(model, make_memory(model), 2).forward(pack(work, 16))
    want = NativeExecutor(clean, make_memory(clean), 2).forward(pack(work, 16))
    assert got[1:3].isnan().all()
    assert torch.equal(got[3:], want[3:])


@pytest.mark.parametrize(
    ("work", "groups", "reason"),
    [
        ([(0, [101], [0])], [], "token id"),
        ([(0, [-1], [0])], [], "token id"),
        ([(0, [1], [64])], [], "block id"),
        ([(0, [1], [-1])], [], "block id"),
        ([(16, [1], [0, 1]), (16, [1], [2, 3])], [PrefixGroup(0, 2, 0, 1)], "differ"),
        ([(16, [1], [0, 1]), (16, [1], [0, 3])], [PrefixGroup(0, 3, 0, 1)], "out of range"),
    ],
)
def test_a_broken_batch_is_refused(work: Any, groups: list[PrefixGroup], reason: str) -> None:
    model = make_model("llama")
    executor = NativeExecutor(model, make_memory(model), 2)
    with pytest.raises(ValueError, match=reason):
        executor.forward(pack(work, 16, groups))
    assert executor.forward(pack([(0, [1], [0])], 16)).isfinite().all()


def test_what_the_executor_cannot_serve_is_said() -> None:
    assert NativeExecutor.supports(make_model("llama").config) is None
    dynamic = LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert "dynamic" in str(NativeExecutor.supports(dynamic))
    assert "gelu" in str(NativeExecutor.supports(LlamaConfig(hidden_act="gelu")))
    assert "head size" in str(NativeExecutor.supports(LlamaConfig(head_dim=12)))
    assert "family" in str(NativeExecutor.supports(object()))
    half = make_model("llama", dtype=torch.float16)
    with pytest.raises(NativeUnavailable, match="float16"):
        NativeExecutor(half, make_memory(make_model("llama")), 1)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e4,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    ],
)
def test_static_rope_types_equal_transformers(rope: dict[str, Any]) -> None:
    model = make_model("llama", rope_parameters=rope)
    prompt = [random.Random(5).randrange(101) for _ in range(90)]
    got = run_whole(Driver(NativeExecutor(model, make_memory(model), 2)), prompt, list(range(6)))
    torch.testing.assert_close(got, reference(model, prompt), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_window_layers_beside_full_ones_equal_transformers(family: str) -> None:
    model = make_model(family, use_sliding_window=True, sliding_window=21, max_window_layers=1)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    prompt = [random.Random(6).randrange(101) for _ in range(90)]
    got = run_whole(Driver(NativeExecutor(model, make_memory(model), 2)), prompt, list(range(6)))
    torch.testing.assert_close(got, reference(model, prompt), atol=1e-4, rtol=1e-4)


def test_many_steps_in_a_row_keep_their_bits() -> None:
    # A thread left behind in one step must not touch the next.
    model = make_model("llama", num_hidden_layers=2)
    executor = NativeExecutor(model, make_memory(model), 4)
    batches = [pack([(0, [i + 1] * n, [i, i + 9])], 16) for i, n in enumerate((1, 20, 2, 7))]
    want = [executor.forward(batch) for batch in batches]
    for step in range(400):
        batch = batches[step % 4]
        assert torch.equal(executor.forward(batch), want[step % 4])
