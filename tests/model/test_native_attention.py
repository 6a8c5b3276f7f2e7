"""Native attention against the formula, and bit for bit against itself."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.plan import PrefixGroup
from server.worker.batch import AttentionSpec, PackedBatch
from server.worker.kv_memory import KvLayout, KvMemory
from server.worker.native import NativeAttention
from tests.model.native_support import pack, skip_without_compiler

skip_without_compiler()


def naive(query: torch.Tensor, memory: KvMemory, batch: PackedBatch, spec: AttentionSpec) -> torch.Tensor:
    """Compute in float64, one query at a time."""
    size = memory.layout.block_size
    num_heads = query.shape[1]
    out = torch.zeros_like(query, dtype=torch.float64)
    for s in range(batch.num_sequences):
        length = batch.context_lens_host[s]
        places = torch.arange(length)
        blocks = batch.block_tables[s].long()[places // size]
        keys = memory.keys(spec.layer)[blocks, places % size].double()
        values = memory.values(spec.layer)[blocks, places % size].double()
        keys = keys.repeat_interleave(num_heads // keys.shape[1], 1)
        values = values.repeat_interleave(num_heads // values.shape[1], 1)
        for t in range(int(batch.query_starts[s]), int(batch.query_starts[s + 1])):
            stop = int(batch.positions[t]) + 1
            start = max(0, stop - spec.window) if spec.window else 0
            scores = torch.einsum("hd,phd->hp", query[t].double(), keys[start:stop]) * spec.scaling
            if spec.softcap:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            if spec.sinks is not None:
                scores = torch.cat((scores, spec.sinks.double()[:, None]), 1)
            weights = scores.softmax(1)[:, : stop - start]
            out[t] = torch.einsum("hp,phd->hd", weights, values[start:stop])
    return out


def make_case(
    *, heads: int, kv_heads: int, dim: int, block_size: int, kv_dtype: torch.dtype, seed: int = 0
) -> tuple[KvMemory, PackedBatch]:
    """Return KV full of noise and a batch: a long prefill, decodes, a fresh prompt."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    memory = KvMemory(KvLayout(2, kv_heads, dim, block_size, kv_dtype), 200, torch.device("cpu"))
    memory.storage.normal_()
    free = rng.sample(range(200), 200)
    work = []
    for start, new in ((37, 50), (90, 1), (0, 1), (0, 23), (2 * block_size - 1, 1), (64, 3)):
        work.append((start, [0] * new, [free.pop() for _ in range(-(-(start + new) // block_size))]))
    return memory, pack(work, block_size)


SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 19},
    "window of one": {"window": 1},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "all": {"window": 40, "softcap": 3.0, "sinks": True},
}


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [
        (6, 2, 16, 16),
        (4, 4, 8, 8),
        (9, 3, 64, 16),
        (4, 1, 80, 32),
        (3, 3, 24, 4),
        (2, 2, 256, 16),
        (8, 1, 128, 24),
    ],
)
def test_attention_equals_the_formula(
    heads: int, kv_heads: int, dim: int, block_size: int, spec_name: str, kv_dtype: torch.dtype
) -> None:
    memory, batch = make_case(
        heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, kv_dtype=kv_dtype
    )
    options = dict(SPECS[spec_name])
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads)
    spec = AttentionSpec(layer=1, scaling=dim**-0.5, **options)
    query = torch.randn(batch.num_tokens, heads, dim)
    want = naive(query, memory, batch, spec)
    got = NativeAttention(2).attend(query, memory, batch, spec)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    half = NativeAttention(2).attend(query.bfloat16(), memory, batch, spec)
    assert half.dtype is torch.bfloat16
    rounded = naive(query.bfloat16(), memory, batch, spec)
    torch.testing.assert_close(half.double(), rounded, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_same_bits_alone_grouped_and_threaded(spec_name: str, kv_dtype: torch.dtype) -> None:
    rng = random.Random(5)
    torch.manual_seed(5)
    heads, kv_heads, dim, size = 6, 2, 40, 16
    memory = KvMemory(KvLayout(1, kv_heads, dim, size, kv_dtype), 100, torch.device("cpu"))
    memory.storage.normal_()
    free = rng.sample(range(100), 100)

    def own(count: int) -> list[int]:
        return [free.pop() for _ in range(count)]

    root = own(4)
    branch = root + own(3)
    deep = branch + own(1)
    work = [
        (100, [0] * 9, own(7)),
        (70, [0] * 20, root + own(2)),
        (113, [0], branch + own(1)),
        (130, [0] * 30, deep + own(2)),
        (128, [0] * 3, deep + own(1)),
        (64, [0], root + own(1)),
        (5, [0], own(1)),
    ]
    groups = [PrefixGroup(1, 6, 0, 4), PrefixGroup(2, 5, 4, 7), PrefixGroup(3, 5, 7, 8)]
    batch = pack(work, size)
    options = dict(SPECS[spec_name])
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads)
    spec = AttentionSpec(layer=0, scaling=0.2, **options)
    query = torch.randn(batch.num_tokens, heads, dim)
    plain = NativeAttention(1).attend(query, memory, batch, spec)
    for threads in (1, 2, 4):
        backend = NativeAttention(threads)
        assert torch.equal(backend.attend(query, memory, replace(batch, groups=groups), spec), plain)
        row = 0
        for start, tokens, blocks in work:
            part = query[row : row + len(tokens)]
            alone = backend.attend(part, memory, pack([(start, tokens, blocks)], size), spec)
            assert torch.equal(alone, plain[row : row + len(tokens)])
            one = backend.attend(part[:1], memory, pack([(start, tokens[:1], blocks)], size), spec)
            assert torch.equal(one[0], plain[row])
            row += len(tokens)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    memory, batch = make_case(heads=2, kv_heads=1, dim=16, block_size=16, kv_dtype=torch.float32)
    spec = AttentionSpec(layer=0, scaling=50.0)
    query = torch.randn(batch.num_tokens, 2, 16) * 10
    got = NativeAttention(2).attend(query, memory, batch, spec)
    torch.testing.assert_close(got.double(), naive(query, memory, batch, spec), atol=1e-3, rtol=1e-3)


def test_a_nan_query_shows_in_its_own_row_only() -> None:
    memory, batch = make_case(heads=2, kv_heads=1, dim=16, block_size=16, kv_dtype=torch.float32)
    spec = AttentionSpec(layer=0, scaling=1.0)
    query = torch.randn(batch.num_tokens, 2, 16)
    clean = NativeAttention(2).attend(query, memory, batch, spec)
    query[7, 1, 3] = float("nan")
    got = NativeAttention(2).attend(query, memory, batch, spec)
    assert got[7, 1].isnan().all()
    got[7, 1] = clean[7, 1]
    assert torch.equal(got, clean)


def test_strided_queries_and_wrong_shapes() -> None:
    memory, batch = make_case(heads=2, kv_heads=1, dim=16, block_size=16, kv_dtype=torch.float32)
    spec = AttentionSpec(layer=0, scaling=1.0)
    backend = NativeAttention(2)
    query = torch.randn(2, batch.num_tokens, 16)
    want = backend.attend(query.transpose(0, 1).contiguous(), memory, batch, spec)
    assert torch.equal(backend.attend(query.transpose(0, 1), memory, batch, spec), want)
    with pytest.raises(ValueError, match="head_dim"):
        backend.attend(torch.randn(batch.num_tokens, 2, 8), memory, batch, spec)
    with pytest.raises(ValueError, match="number of tokens"):
        backend.attend(torch.randn(3, 2, 16), memory, batch, spec)
    with pytest.raises(ValueError, match="one sink per head"):
        backend.attend(want, memory, batch, replace(spec, sinks=torch.zeros(5)))
