"""Turn a step plan into the flat tensors of :class:`~server.worker.batch.PackedBatch`.

Sequences without tokens (drawn from saved logits) are left out of the batch, and prefix groups are
re-indexed to the sequences that remain::

    plan       s0 (3 tokens)   s1 (none)   s2 (1)   s3 (2)       groups [0, 4) [2, 4)
    batch      0               -           1        2            groups [0, 3) [1, 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from server.engine.plan import PrefixGroup, StepPlan
from server.worker.batch import PackedBatch

__all__ = ["PackedStep", "pack_step", "reindex_groups"]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A plan made ready for an executor."""

    batch: PackedBatch | None
    """None if no sequence of the plan has tokens: there is nothing to forward."""
    logit_row: list[int]
    """Per sequence of the plan: its row in the forward pass's logits, or -1."""
    fresh_blocks: list[int]
    """Blocks that this step begins but does not fill; to be cleared before the forward pass."""


def reindex_groups(groups: Sequence[PrefixGroup], is_kept: Sequence[bool]) -> list[PrefixGroup]:
    """Re-index groups to the sequences kept; drop groups of fewer than two, join those of equal members.

    Two nested groups that come to have the same members are one longer group: a nested one starts
    where its parent ends.
    """
    num_kept_before = [0]
    for kept in is_kept:
        num_kept_before.append(num_kept_before[-1] + int(kept))
    result: list[PrefixGroup] = []
    position_of: dict[tuple[int, int], int] = {}
    for group in groups:
        start, stop = num_kept_before[group.start], num_kept_before[group.stop]
        if stop - start < 2 or group.last_block <= group.first_block:
            continue
        at = position_of.get((start, stop))
        if at is not None and result[at].last_block == group.first_block:
            result[at] = PrefixGroup(start, stop, result[at].first_block, group.last_block)
            continue
        position_of[start, stop] = len(result)
        result.append(PrefixGroup(start, stop, group.first_block, group.last_block))
    return result


def pack_step(plan: StepPlan, block_size: int, device: torch.device) -> PackedStep:
    """Pack ``plan`` for ``device``. Block tables are read through their buffers, not element by element."""
    is_kept = [bool(s.token_ids) for s in plan.sequences]
    sequences = [s for s in plan.sequences if s.token_ids]
    logit_row = [-1] * len(plan.sequences)
    if not sequences:
        return PackedStep(None, logit_row, [])

    query_lens = [len(s.token_ids) for s in sequences]
    context_lens = [s.num_tokens_after for s in sequences]
    num_tokens = sum(query_lens)
    lens = np.array(query_lens, dtype=np.int64)
    starts = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum(lens, out=starts[1:])
    owner = np.repeat(np.arange(len(sequences)), lens)
    token_ids = np.fromiter(
        chain.from_iterable(s.token_ids for s in sequences), dtype=np.int64, count=num_tokens
    )
    computed = np.array([s.num_computed for s in sequences], dtype=np.int64)
    positions = np.arange(num_tokens, dtype=np.int64) + np.repeat(computed - starts[:-1], lens)

    num_blocks = [-(-length // block_size) for length in context_lens]
    tables = np.zeros((len(sequences), max(num_blocks)), dtype=np.int32)
    for row, (sequence, count) in enumerate(zip(sequences, num_blocks, strict=True)):
        tables[row, :count] = np.frombuffer(sequence.block_table, dtype=np.intc, count=count)
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size

    # The last block of a sequence is fresh if its first slot is written now, partial if its last one is not.
    context = np.array(context_lens, dtype=np.int64)
    last_block_start = (context - 1) // block_size * block_size
    is_fresh = (last_block_start >= computed) & (context % block_size != 0)
    fresh_blocks = [int(tables[row, num_blocks[row] - 1]) for row in np.flatnonzero(is_fresh)]

    rows: list[int] = []
    row = -1
    for index, sequence in enumerate(plan.sequences):
        if not sequence.token_ids:
            continue
        row += 1
        wants_logits = sequence.logits_from is None and (
            sequence.sampling is not None or sequence.save_logits_to is not None
        )
        if wants_logits:
            logit_row[index] = len(rows)
            rows.append(int(starts[row + 1]) - 1)

    def place(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    batch = PackedBatch(
        token_ids=place(token_ids),
        positions=place(positions),
        slots=place(slots),
        query_starts=place(starts.astype(np.int32)),
        context_lens=place(context.astype(np.int32)),
        block_tables=place(tables),
        logit_rows=place(np.array(rows, dtype=np.int64)),
        query_lens_host=query_lens,
        context_lens_host=context_lens,
        groups=reindex_groups(plan.groups, is_kept),
    )
    return PackedStep(batch, logit_row, fresh_blocks)
