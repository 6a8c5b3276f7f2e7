"""Put planned sequences together to a step plan."""

from __future__ import annotations

from collections.abc import Iterable

from kvcore.lease import Lease
from server.engine.groups import find_groups
from server.engine.plan import BlockCopy, KvLoad, KvSave, PrefixGroup, SequencePlan, StepPlan
from server.engine.request import Sequence
from server.engine.running import lease_of

__all__ = ["assemble"]


def assemble(
    step_id: int,
    planned: Iterable[Sequence],
    block_size: int,
    *,
    saves: list[KvSave] | None = None,
    loads: list[KvLoad] | None = None,
) -> StepPlan:
    """Return a step's plan: first those that compute, depth-first, then those that draw from kept logits.

    ``planned`` stands in the order of planning, which is the order of the copies. Saves and loads are what
    goes to tiers and comes from them.
    """
    computing: list[tuple[Sequence, Lease]] = []
    drawing: list[tuple[Sequence, Lease]] = []
    copies: list[BlockCopy] = []
    for sequence in planned:
        lease = lease_of(sequence)
        (computing if lease.in_flight else drawing).append((sequence, lease))
        if lease.copy is not None:
            copies.append(BlockCopy(lease.copy.source, lease.copy.target, lease.copy.num_slots))
    computing.sort(key=lambda pair: pair[1].block_table)
    groups: list[PrefixGroup] = find_groups(
        [lease.block_table for _, lease in computing],
        [lease.num_computed // block_size for _, lease in computing],
    )
    parts = [_part(sequence, lease) for sequence, lease in computing]
    parts += [_part(sequence, lease) for sequence, lease in drawing]
    return StepPlan(step_id, parts, groups, copies, saves or [], loads or [])


def _part(sequence: Sequence, lease: Lease) -> SequencePlan:
    tokens, start = sequence.tokens, lease.num_computed
    stop, end = start + lease.in_flight, len(tokens)
    sampling = history = None
    if stop == end or lease.used_tail is not None:
        sampling = sequence.sampling
        history = sequence.history_for(sampling)
    return SequencePlan(
        sequence.sequence_id,
        start,
        tokens[start:stop].tolist(),
        lease.block_table,
        sampling,
        sequence.num_prompt_tokens,
        end,
        history,
        lease.logits_from,
        lease.save_logits_to,
    )
