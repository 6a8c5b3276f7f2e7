"""Attention in torch calls: once per shared prefix for its whole group, once for what is each one's own.

Key ranges of one sequence in nested groups, and who computes them::

    blocks   [ 0 ........ 4 ) [ 4 .... 7 ) [ 7 ......... )
              group A          group B      own rest
              all members of   of B, in     decoding sequences (one query): padded together,
              A, in one call   one call     in buckets of like length; others: one by one

Every part sees queries folded over the heads that share a KV head, ``[Hkv, rows * G, D]``, so that keys
are read once and never repeated. Parts are merged by log-sum-exp (:mod:`server.worker.attention.partial`).
Runs on any device; on CPU through torch's fused attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.worker.attention.partial import PartialAttention, apply_sinks, attend_dense
from server.worker.batch import AttentionSpec, PackedBatch
from server.worker.kv_memory import KvMemory

__all__ = ["GroupedAttention"]

_QUERY_TILE = 512
"""Queries of one sequence attended at once, so that its mask stays small."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """A prefix group: rows ``[row_start, row_stop)`` see key positions ``[key_start, key_stop)``."""

    row_start: int
    row_stop: int
    key_start: int
    key_stop: int
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Own:
    """The rest of one sequence with several queries: keys ``[key_start, context)``."""

    row_start: int
    row_stop: int
    key_start: int
    context: int
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Decodes:
    """The rests of sequences with one query each: ``rows [n]``, ``blocks [n, width]``, padded."""

    rows: torch.Tensor
    blocks: torch.Tensor
    key_positions: torch.Tensor
    """int64 ``[n, width * block_size]``: position of each gathered key."""


@dataclass(frozen=True, slots=True)
class _Parts:
    shared: list[_Shared]
    own: list[_Own]
    decodes: list[_Decodes]
    longest_context: int


class GroupedAttention:
    """The torch backend. Plans once per batch, then serves every layer of it. One batch at a time."""

    name = "torch"

    def __init__(self) -> None:
        self._batch: PackedBatch | None = None
        self._parts = _Parts([], [], [], 0)

    def attend(
        self, query: torch.Tensor, memory: KvMemory, batch: PackedBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        """Return ``[T, num_heads, head_dim]`` for ``query`` ``[T, num_heads, head_dim]``, same dtype."""
        if self._batch is not batch:
            self._parts = _plan_parts(batch, memory.layout.block_size)
            self._batch = batch
        parts = self._parts
        window = spec.window if spec.window is not None and spec.window < parts.longest_context else None
        result = PartialAttention(query.shape[0], query.shape[1], query.shape[2], query.device)
        for decodes in parts.decodes:
            _attend_decodes(result, query, memory, batch, spec, decodes, window)
        for own in parts.own:
            _attend_own(result, query, memory, batch, spec, own, window)
        for shared in parts.shared:
            _attend_shared(result, query, memory, batch, spec, shared, window)
        out = result.out
        if spec.sinks is not None:
            out = apply_sinks(out, result.lse, spec.sinks)
        return out.to(query.dtype)


def _plan_parts(batch: PackedBatch, block_size: int) -> _Parts:
    starts = [0]
    for length in batch.query_lens_host:
        starts.append(starts[-1] + length)
    own_first_block = [0] * batch.num_sequences
    shared = []
    for group in batch.groups:
        for s in range(group.start, group.stop):
            own_first_block[s] = group.last_block
        shared.append(
            _Shared(
                starts[group.start],
                starts[group.stop],
                group.first_block * block_size,
                group.last_block * block_size,
                batch.block_tables[group.start, group.first_block : group.last_block].long(),
            )
        )
    own = []
    buckets: dict[int, list[int]] = {}
    for s, (length, context) in enumerate(zip(batch.query_lens_host, batch.context_lens_host, strict=True)):
        num_blocks = -(-context // block_size)
        if length == 1:
            # Buckets of a ratio of 1.5 keep the padding below a half.
            width, bucket = num_blocks - own_first_block[s], 1
            while bucket < width:
                bucket = bucket * 3 // 2 + 1
            buckets.setdefault(bucket, []).append(s)
        else:
            blocks = batch.block_tables[s, own_first_block[s] : num_blocks].long()
            own.append(_Own(starts[s], starts[s + 1], own_first_block[s] * block_size, context, blocks))
    device = batch.block_tables.device
    decodes = []
    for members in buckets.values():
        width = max(-(-batch.context_lens_host[s] // block_size) - own_first_block[s] for s in members)
        first = torch.tensor([own_first_block[s] for s in members], device=device)
        index = torch.tensor(members, device=device)
        columns = first[:, None] + torch.arange(width, device=device)
        # Columns past a sequence's last block read that block again: their positions lie past the context and
        # are masked, but a weight of zero times another request's NaN would still be NaN.
        last = torch.tensor([(batch.context_lens_host[s] - 1) // block_size for s in members], device=device)
        blocks = batch.block_tables[index[:, None], torch.minimum(columns, last[:, None])].long()
        positions = first[:, None] * block_size + torch.arange(width * block_size, device=device)
        rows = torch.tensor([starts[s] for s in members], device=device)
        decodes.append(_Decodes(rows, blocks, positions))
    return _Parts(shared, own, decodes, max(batch.context_lens_host, default=0))


def _attend_shared(
    result: PartialAttention,
    query: torch.Tensor,
    memory: KvMemory,
    batch: PackedBatch,
    spec: AttentionSpec,
    part: _Shared,
    window: int | None,
) -> None:
    rows = slice(part.row_start, part.row_stop)
    mask = None
    if window is not None:
        positions = batch.positions[rows]
        key_positions = torch.arange(part.key_start, part.key_stop, device=query.device)
        visible = key_positions[None, :] > positions[:, None] - window
        if not bool(visible.any()):
            return
        groups = query.shape[1] // memory.layout.num_kv_heads
        mask = visible.repeat_interleave(groups, dim=0)[None, None]
    keys, values = _gather(memory, spec.layer, part.blocks)
    out, lse = attend_dense(
        _fold(query[rows], memory.layout.num_kv_heads),
        keys,
        values,
        scaling=spec.scaling,
        mask=mask,
        softcap=spec.softcap,
        may_see_nothing=mask is not None,
    )
    result.merge(rows, *_unfold(out, lse, part.row_stop - part.row_start))


def _attend_own(
    result: PartialAttention,
    query: torch.Tensor,
    memory: KvMemory,
    batch: PackedBatch,
    spec: AttentionSpec,
    part: _Own,
    window: int | None,
) -> None:
    num_kv_heads = memory.layout.num_kv_heads
    groups = query.shape[1] // num_kv_heads
    keys, values = _gather(memory, spec.layer, part.blocks)
    for start in range(part.row_start, part.row_stop, _QUERY_TILE):
        rows = slice(start, min(start + _QUERY_TILE, part.row_stop))
        # The last query of a tile ends what the tile can see, its window the start.
        last = part.context - (part.row_stop - rows.stop)
        first = part.key_start
        if window is not None:
            first = max(first, last - (rows.stop - rows.start) - window + 1)
        positions = batch.positions[rows]
        key_positions = torch.arange(first, last, device=query.device)
        visible = key_positions[None, :] <= positions[:, None]
        if window is not None:
            visible &= key_positions[None, :] > positions[:, None] - window
        span = slice(first - part.key_start, last - part.key_start)
        out, lse = attend_dense(
            _fold(query[rows], num_kv_heads),
            keys[:, :, span],
            values[:, :, span],
            scaling=spec.scaling,
            mask=visible.repeat_interleave(groups, dim=0)[None, None],
            softcap=spec.softcap,
        )
        result.merge(rows, *_unfold(out, lse, rows.stop - rows.start))


def _attend_decodes(
    result: PartialAttention,
    query: torch.Tensor,
    memory: KvMemory,
    batch: PackedBatch,
    spec: AttentionSpec,
    part: _Decodes,
    window: int | None,
) -> None:
    count, width = part.blocks.shape
    num_kv_heads, head_dim = memory.layout.num_kv_heads, memory.layout.head_dim
    length = width * memory.layout.block_size
    shape = (count, length, num_kv_heads, head_dim)
    keys = memory.keys(spec.layer)[part.blocks].view(shape).transpose(1, 2)
    values = memory.values(spec.layer)[part.blocks].view(shape).transpose(1, 2)
    positions = batch.positions[part.rows][:, None]
    visible = part.key_positions <= positions
    if window is not None:
        visible &= part.key_positions > positions - window
    # The heads of a KV head stand as its queries: [n, Hkv, G, D].
    out, lse = attend_dense(
        query[part.rows].view(count, num_kv_heads, -1, head_dim),
        keys,
        values,
        scaling=spec.scaling,
        mask=visible[:, None, None, :],
        softcap=spec.softcap,
    )
    result.merge(part.rows, out.reshape(count, -1, head_dim), lse.reshape(count, -1))


def _gather(memory: KvMemory, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values ``[1, Hkv, L, D]`` of whole blocks, in their order."""
    keys = memory.keys(layer)[blocks].flatten(0, 1).transpose(0, 1)[None]
    values = memory.values(layer)[blocks].flatten(0, 1).transpose(0, 1)[None]
    return keys, values


def _fold(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Turn ``[n, H, D]`` into ``[1, Hkv, n * G, D]``."""
    count, _, head_dim = query.shape
    by_kv_head = query.view(count, num_kv_heads, -1, head_dim).transpose(0, 1)
    return by_kv_head.reshape(1, num_kv_heads, -1, head_dim)


def _unfold(out: torch.Tensor, lse: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn ``[1, Hkv, n * G, D]`` and ``[1, Hkv, n * G]`` into ``[n, H, D]`` and ``[n, H]``."""
    num_kv_heads, head_dim = out.shape[1], out.shape[3]
    out = out[0].view(num_kv_heads, count, -1, head_dim).transpose(0, 1).reshape(count, -1, head_dim)
    lse = lse[0].view(num_kv_heads, count, -1).transpose(0, 1).reshape(count, -1)
    return out, lse
