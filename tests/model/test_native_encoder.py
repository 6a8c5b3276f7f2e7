"""The native encoder: equal to transformers, and a token's bits depend on its own sequence alone."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from server.worker.predict.native import NativeEncoder, NativeWorkspace, build_native_encoder
from tests.model.native_support import skip_without_compiler

skip_without_compiler()


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small references are slower with more, on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Ints = NDArray[np.int32]
VOCAB, PAD = 211, 1


@dataclass(frozen=True)
class Packed:
    """Sequences side by side."""

    token_ids: Ints
    position_ids: Ints
    type_ids: Ints
    lengths: Ints

    @property
    def arrays(self) -> tuple[Ints, Ints, Ints, Ints]:
        return self.token_ids, self.position_ids, self.type_ids, self.lengths

    def split(self) -> list[Packed]:
        ends = np.cumsum(self.lengths)[:-1]
        tokens, positions, types = (np.split(ids, ends) for ids in self.arrays[:3])
        return [
            Packed(*ids, np.array([len(ids[0])], np.int32))
            for ids in zip(tokens, positions, types, strict=True)
        ]


FAMILIES: dict[str, Any] = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
    "camembert": CamembertConfig,
    "electra": ElectraConfig,
    "distilbert": DistilBertConfig,
    "mpnet": MPNetConfig,
}
OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")
TYPELESS = ("distilbert", "mpnet")
SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden": 64, "heads": 2, "inner": 128},
    "odd": {"hidden": 42, "heads": 3, "inner": 75},
    "wide heads": {"hidden": 128, "heads": 2, "inner": 300},
    "narrow heads": {"hidden": 100, "heads": 20, "inner": 33},
    "long sums": {"hidden": 704, "heads": 11, "inner": 1030},
}


def make_config(family: str, *, hidden: int, heads: int, inner: int, layers: int = 3, **changes: Any) -> Any:
    """Return a small configuration; ``act`` names the activation in every family."""
    act = changes.pop("act", "gelu")
    settings: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 600, "pad_token_id": PAD}
    if family == "distilbert":
        settings |= {
            "dim": hidden,
            "n_heads": heads,
            "hidden_dim": inner,
            "n_layers": layers,
            "activation": act,
        }
    else:
        settings |= {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner}
        settings |= {"num_hidden_layers": layers, "hidden_act": act}
    if family == "bert":
        settings["type_vocab_size"] = 3
    if family == "electra":
        settings["embedding_size"] = hidden // 2 + 3
    return FAMILIES[family](**(settings | changes))


def make_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a small random model; biases and norms are random too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(make_config(family, **changes), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn_like(parameter) * 0.2
            parameter.data = noise if name.endswith("bias") else 1 + noise
        elif "embedding" in name or "relative" in name:
            parameter.data = torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) * (0.7 / parameter.shape[1] ** 0.5)
    return model


def make_batch(family: str, lengths: Sequence[int], *, seed: int = 0) -> Packed:
    """Return random tokens and types; positions as the family counts them."""
    rng = np.random.default_rng(seed)
    total, first = sum(lengths), PAD + 1 if family in OFFSET else 0
    positions = np.concatenate([np.arange(first, first + n) for n in lengths])
    types = rng.integers(0, 3 if family == "bert" else 2 if family == "electra" else 1, total)
    return Packed(
        rng.integers(PAD + 1, VOCAB, total).astype(np.int32),
        positions.astype(np.int32),
        types.astype(np.int32),
        np.array(lengths, np.int32),
    )


def build(model: Any, *, dtype: str = "float32", threads: int = 3) -> NativeEncoder:
    encoder = build_native_encoder(model, dtype=dtype, num_threads=threads)
    assert encoder is not None
    return encoder


def reference(model: Any, family: str, batch: Packed) -> torch.Tensor:
    """Compute one sequence at a time with transformers."""
    rows = []
    for one in batch.split():
        inputs = {"input_ids": one.token_ids, "position_ids": one.position_ids}
        if family not in TYPELESS:
            inputs["token_type_ids"] = one.type_ids
        tensors = {name: torch.from_numpy(ids.astype(np.int64))[None] for name, ids in inputs.items()}
        with torch.no_grad():
            rows.append(model(**tensors).last_hidden_state[0])
    return torch.cat(rows)


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float = 1e-5) -> None:
    error = (got - want).abs().max() / want.abs().max()
    assert error <= bound, f"relative error {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(family: str, shape: str) -> None:
    model = make_model(family, **SHAPES[shape])
    encoder = build(model)
    # Few tokens and many are computed by different programs.
    for lengths in ([1], [3, 1, 17], [130, 1, 64, 7, 16, 33]):
        batch = make_batch(family, lengths)
        assert_close(encoder.forward(*batch.arrays), reference(model, family, batch))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_longest_inputs_equal_transformers(family: str) -> None:
    model = make_model(family, **SHAPES["small"])
    batch = make_batch(family, [512, 2, 511])
    assert_close(build(model).forward(*batch.arrays), reference(model, family, batch))


@pytest.mark.parametrize("family", ["bert", "electra", "distilbert", "mpnet"])
def test_bfloat16_weights_equal_transformers_on_rounded_weights(family: str) -> None:
    model = make_model(family, **SHAPES["wide heads"])
    encoder = build(model, dtype="bfloat16")
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if parameter.dim() > 1 and "relative" not in name:
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    for lengths in ([5, 9], [140, 20, 1, 77]):
        batch = make_batch(family, lengths)
        got = encoder.forward(*batch.arrays)
        assert_close(got, reference(rounded, family, batch))
        assert not torch.allclose(got, reference(model, family, batch), atol=1e-5)


def test_a_bfloat16_model_serves_both_weight_types() -> None:
    model = make_model("bert", **SHAPES["small"]).to(torch.bfloat16)
    batch = make_batch("bert", [12, 90, 40])
    want = reference(copy.deepcopy(model).float(), "bert", batch)
    for dtype in ("float32", "bfloat16"):
        assert_close(build(model, dtype=dtype).forward(*batch.arrays), want)


@pytest.mark.parametrize(
    "act", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "relu", "silu"]
)
def test_activations_equal_transformers(act: str) -> None:
    model = make_model("bert", **SHAPES["odd"], act=act)
    for layer in model.encoder.layer:
        layer.intermediate.dense.weight.data *= 4  # reach the tails
    batch = make_batch("bert", [9, 120, 30])
    assert_close(build(model).forward(*batch.arrays), reference(model, "bert", batch))


def test_extreme_activations_stay_exact() -> None:
    model = make_model("bert", **SHAPES["small"], layers=1)
    model.encoder.layer[0].intermediate.dense.weight.data *= 1000
    batch = make_batch("bert", [40, 80])
    assert_close(build(model).forward(*batch.arrays), reference(model, "bert", batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["odd", "long sums"])
@pytest.mark.parametrize("family", ["bert", "electra", "mpnet"])
def test_a_token_has_the_same_bits_alone_batched_and_with_any_threads(
    family: str, shape: str, dtype: str
) -> None:
    model = make_model(family, **SHAPES[shape], layers=2)
    lengths = [1, 200, 3, 40, 17, 1, 16, 90, 33]
    batch = make_batch(family, lengths)
    order = random.Random(3).sample(range(len(lengths)), len(lengths))
    results = []
    for threads in (1, 2, 3, 4):
        encoder = build(model, dtype=dtype, threads=threads)
        ones = batch.split()
        alone = [encoder.forward(*one.arrays) for one in ones]
        assert torch.equal(encoder.forward(*batch.arrays), torch.cat(alone))
        for some in (order, order[:3], order[3:5]):
            mixed = Packed(
                *(np.concatenate(ids) for ids in zip(*(ones[i].arrays for i in some), strict=True))
            )
            assert torch.equal(encoder.forward(*mixed.arrays), torch.cat([alone[i] for i in some]))
        results.append(torch.cat(alone))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_position_and_type_ids_are_the_callers() -> None:
    model = make_model("bert", **SHAPES["small"])
    encoder = build(model)
    batch = make_batch("bert", [30, 100])
    shifted = Packed(batch.token_ids, batch.position_ids + 7, (batch.type_ids + 1) % 3, batch.lengths)
    assert_close(encoder.forward(*shifted.arrays), reference(model, "bert", shifted))
    assert not torch.allclose(encoder.forward(*batch.arrays), encoder.forward(*shifted.arrays), atol=1e-2)


def test_results_belong_to_the_caller() -> None:
    encoder = build(make_model("bert", **SHAPES["small"]))
    first = make_batch("bert", [20, 130])
    kept = encoder.forward(*first.arrays)
    copied = kept.clone()
    encoder.forward(*make_batch("bert", [150], seed=5).arrays)
    assert torch.equal(kept, copied)


def test_encoders_that_share_a_workspace_may_be_called_from_many_threads() -> None:
    workspace = NativeWorkspace(3)
    work = []
    for seed, shape in enumerate(("small", "odd", "wide heads")):
        model = make_model("bert", seed=seed, **SHAPES[shape])
        encoder = build_native_encoder(model, dtype="float32", workspace=workspace)
        assert encoder is not None
        for lengths in ([4, 5], [150, 60, 8]):
            batch = make_batch("bert", lengths, seed=seed)
            work.append((encoder, batch, encoder.forward(*batch.arrays)))
    with ThreadPoolExecutor(4) as callers:
        jobs = [(callers.submit(encoder.forward, *b.arrays), want) for encoder, b, want in work * 10]
        assert all(torch.equal(job.result(), want) for job, want in jobs)


def test_a_released_source_keeps_no_second_copy() -> None:
    torch.manual_seed(0)
    config = make_config("bert", **SHAPES["small"])
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = make_batch("bert", [9, 70])
    want = reference(model.bert, "bert", batch)
    head = model.classifier.weight.clone()
    encoder = build_native_encoder(model, dtype="float32", release_source=True)
    assert encoder is not None
    linears = [module for module in model.bert.encoder.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 6 * 3
    assert all(linear.weight.numel() == 0 for linear in linears)
    assert torch.equal(model.classifier.weight, head)
    assert_close(encoder.forward(*batch.arrays), want)
    tables = sum(t.weight.nbytes for t in model.modules() if isinstance(t, nn.Embedding))
    matrices = 3 * 4 * (4 * 64 * 64 + 2 * 64 * 128)
    assert encoder.num_bytes == matrices + tables


def test_a_source_may_be_released_after_it_was_compared() -> None:
    model = make_model("electra", **SHAPES["small"])
    batch = make_batch("electra", [9, 70])
    want = reference(model, "electra", batch)
    encoder = build(model, dtype="bfloat16")
    before = encoder.forward(*batch.arrays)
    assert_close(before, want, 0.05)
    encoder.release_source(model)
    assert model.encoder.layer[0].output.dense.weight.numel() == 0
    assert model.embeddings_project.weight.numel() == 0
    assert model.embeddings.word_embeddings.weight.dtype is torch.bfloat16
    assert torch.equal(encoder.forward(*batch.arrays), before)


def test_tables_of_the_same_type_are_shared_and_others_replaced_on_release() -> None:
    shared = make_model("bert", **SHAPES["small"])
    address = shared.embeddings.word_embeddings.weight.data_ptr()
    encoder = build(shared)
    batch = make_batch("bert", [5])
    before = encoder.forward(*batch.arrays)
    shared.embeddings.word_embeddings.weight.data[batch.token_ids[0]] += 1
    assert shared.embeddings.word_embeddings.weight.data_ptr() == address
    assert not torch.equal(encoder.forward(*batch.arrays), before)
    released = make_model("bert", **SHAPES["small"])
    assert build_native_encoder(released, dtype="bfloat16", release_source=True) is not None
    assert released.embeddings.word_embeddings.weight.dtype is torch.bfloat16


def test_a_workspace_goes_with_its_last_encoder() -> None:
    first, second = (build(make_model("bert", **SHAPES["small"]), threads=2) for _ in range(2))
    assert first.workspace is second.workspace
    gone = weakref.ref(first.workspace)
    first.close()
    with pytest.raises(ValueError, match="closed"):
        first.forward(*make_batch("bert", [3]).arrays)
    assert second.forward(*make_batch("bert", [3]).arrays).shape == (3, 64)
    del first, second
    gc.collect()
    assert gone() is None


def test_an_encoder_and_its_workspace_may_be_collected_in_any_order() -> None:
    """A load that fails leaves both in a cycle: the process used to die when the workspace was first."""
    for workspace_first in (True, False):
        encoder = build(make_model("bert", **SHAPES["small"]), threads=2)
        workspace = encoder.workspace
        ring: list[Any] = [workspace, encoder] if workspace_first else [encoder, workspace]
        ring.append(ring)
        gone = weakref.ref(encoder)
        del encoder, workspace, ring
        gc.collect()
        assert gone() is None
    encoder = build(make_model("bert", **SHAPES["small"]), threads=2)
    encoder.workspace.__del__()
    encoder.close()


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("token_ids", VOCAB, "a token id out of range"),
        ("token_ids", -1, "a token id out of range"),
        ("position_ids", 600, "a position out of range"),
        ("type_ids", 3, "a token type out of range"),
        ("lengths", 0, "a sequence without tokens"),
        ("lengths", 4, "lengths that do not cover the tokens"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: int, match: str) -> None:
    encoder = build(make_model("bert", **SHAPES["small"]))
    batch = make_batch("bert", [2, 3])
    getattr(batch, field)[0] = value
    with pytest.raises(ValueError, match=match):
        encoder.forward(*batch.arrays)


def test_arrays_of_another_type_are_refused() -> None:
    encoder = build(make_model("bert", **SHAPES["small"]))
    tokens, positions, types, lengths = make_batch("bert", [2, 3]).arrays
    with pytest.raises(ValueError, match="token_ids must be contiguous int32"):
        encoder.forward(tokens.astype(np.int64), positions, types, lengths)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lengths must be"):
        encoder.forward(tokens, positions, types, np.repeat(lengths, 2)[::2])
    with pytest.raises(ValueError, match="different lengths"):
        encoder.forward(tokens, positions[1:], types, lengths)
    empty = np.zeros(0, np.int32)
    assert encoder.forward(empty, empty, empty, empty).shape == (0, 64)


def test_mpnet_refuses_what_its_distances_do_not_cover() -> None:
    encoder = build(make_model("mpnet", **SHAPES["small"]))
    batch = make_batch("mpnet", [601])
    with pytest.raises(ValueError, match="longer than the model's positions"):
        encoder.forward(batch.token_ids, batch.position_ids % 600, batch.type_ids, batch.lengths)


class _OtherLinear(nn.Linear):
    """Computes something else, for all one knows."""


def test_what_would_be_computed_wrongly_is_left_to_others() -> None:
    others = [
        AutoModel.from_config(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=50)),
        AutoModel.from_config(
            DebertaV2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
        ),
        make_model("bert", **SHAPES["small"], is_decoder=True),
        make_model("bert", **SHAPES["small"], act="mish"),
    ]
    adapted = make_model("bert", **SHAPES["small"])
    adapted.encoder.layer[1].output.dense = _OtherLinear(128, 64)
    pruned = make_model("bert", **SHAPES["small"])
    pruned.encoder.layer[1].intermediate.dense = nn.Linear(64, 100)
    other_eps = make_model("bert", **SHAPES["small"])
    other_eps.encoder.layer[0].output.LayerNorm.eps = 1e-3
    for model in (*others, adapted, pruned, other_eps):
        assert build_native_encoder(model, dtype="float32") is None
    with pytest.raises(ValueError, match="dtype must be"):
        build_native_encoder(others[0], dtype="float16")
