"""The reference: gather each sequence's KV, mask, softmax in float32. Slow, and right by inspection."""

from __future__ import annotations

import torch

from server.worker.batch import AttentionSpec, PackedBatch
from server.worker.kv_memory import KvMemory

__all__ = ["ReferenceAttention"]


class ReferenceAttention:
    """One sequence at a time, no sharing. Every other backend is tested against it."""

    name = "reference"

    def attend(
        self, query: torch.Tensor, memory: KvMemory, batch: PackedBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        """Return ``[T, num_heads, head_dim]`` for ``query`` ``[T, num_heads, head_dim]``, same dtype."""
        block_size = memory.layout.block_size
        output = torch.empty_like(query)
        start = 0
        for s, (length, context) in enumerate(
            zip(batch.query_lens_host, batch.context_lens_host, strict=True)
        ):
            rows = slice(start, start + length)
            start += length
            blocks = batch.block_tables[s, : -(-context // block_size)].long()
            keys = memory.keys(spec.layer)[blocks].flatten(0, 1)[:context]
            values = memory.values(spec.layer)[blocks].flatten(0, 1)[:context]
            output[rows] = _attend_one(query[rows], keys, values, batch.positions[rows], spec)
        return output


def _attend_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attend ``query`` ``[N, H, D]`` at ``positions`` ``[N]`` to KV ``[context, Hkv, D]`` from position 0."""
    repeats = query.shape[1] // keys.shape[1]
    k = keys.float().repeat_interleave(repeats, dim=1)
    v = values.float().repeat_interleave(repeats, dim=1)
    scores = torch.einsum("nhd,phd->nhp", query.float(), k) * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    key_positions = torch.arange(keys.shape[0], device=query.device)
    visible = key_positions[None, :] <= positions[:, None]
    if spec.window is not None:
        visible &= key_positions[None, :] > positions[:, None] - spec.window
    scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.float()[None, :, None].expand(scores.shape[0], -1, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("nhp,phd->nhd", weights, v).to(query.dtype)
