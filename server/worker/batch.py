"""The packed form of a step plan: flat tensors that every executor and attention backend reads.

All sequences stand one after another in one ragged row of ``T`` tokens::

    token_ids     [ s0 s0 s0 | s1 | s2 s2 ]         T = 6
    query_starts  [ 0          3    4       6 ]     S + 1 = 4
    context_lens  [ 35         18   2 ]             KV positions of each sequence after the step
    block_tables  [[b,b,b],[b,b,-],[b,-,-]]         S x max_blocks, padded with 0

A query at row ``t`` of sequence ``s`` has position ``positions[t]`` and sees KV positions
``[max(0, positions[t] - window + 1), positions[t]]`` of its own block table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from server.engine.plan import PrefixGroup

if TYPE_CHECKING:
    import torch

    from server.worker.kv_memory import KvMemory

__all__ = ["AttentionBackend", "AttentionSpec", "Executor", "PackedBatch"]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One step's input. Every tensor lies on the executor's device."""

    token_ids: torch.Tensor
    """int64 ``[T]``."""
    positions: torch.Tensor
    """int64 ``[T]``."""
    slots: torch.Tensor
    """int64 ``[T]``: physical slot of each token's KV, ``block * block_size + offset``."""
    query_starts: torch.Tensor
    """int32 ``[S + 1]``."""
    context_lens: torch.Tensor
    """int32 ``[S]``."""
    block_tables: torch.Tensor
    """int32 ``[S, max_blocks]``, contiguous."""
    logit_rows: torch.Tensor
    """int64 ``[R]``: rows of ``[0, T)`` whose logits are wanted."""
    query_lens_host: list[int]
    """The differences of ``query_starts``, on the host."""
    context_lens_host: list[int]
    groups: list[PrefixGroup] = field(default_factory=list)
    """Sequence ranges index into this batch (sequences without tokens are left out of it)."""

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens_host)

    @property
    def num_sequences(self) -> int:
        return len(self.query_lens_host)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention needs besides its tensors."""

    layer: int
    scaling: float
    window: int | None = None
    """A query sees this many positions, its own included. None: all."""
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """float ``[num_heads]``: a logit per head that joins the softmax's denominator only."""


class AttentionBackend(Protocol):
    """Attention of one layer over paged KV. The KV of this step's tokens is already in its slots."""

    name: str

    def attend(
        self, query: torch.Tensor, memory: KvMemory, batch: PackedBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        """Return ``[T, num_heads, head_dim_v]`` for ``query`` ``[T, num_heads, head_dim]``, same dtype."""
        ...


class Executor(Protocol):
    """A model's forward pass over one packed batch; writes KV into ``KvMemory`` as it goes."""

    name: str

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Return float32 logits ``[R, vocab]`` for ``batch.logit_rows``, on the executor's device."""
        ...
