"""A worker stand-in whose "KV" proves what was shared.

Every slot holds a hash of the whole token prefix up to its position, computed from the slot before it.
The next token is a function of the last hash. So a block shared, copied, evicted or scheduled wrongly
gives a wrong token, and :func:`expected_tokens`, which knows nothing of blocks, gives the right ones.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from kvcore.tiers.interface import ObjectFormat
from server.engine.plan import KvLoad, KvSave, KvTarget, SampledToken, SequencePlan, StepPlan, StepResult

__all__ = ["ChainRunner", "expected_tokens"]

_START = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _extend(state: int, token: int) -> int:
    state = (state ^ (token + 1)) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ (state >> 29)


def _draw(state: int, vocab_size: int, seed: int, sample_index: int, position: int) -> int:
    key = (state + seed * 0x2545F4914F6CDD1D + sample_index * 0x94D049BB133111EB + position) & _MASK
    return (key * 0xD6E8FEB86659FD93 & _MASK) >> 40 if vocab_size == 0 else (key ^ (key >> 31)) % vocab_size


def expected_tokens(
    prompt: list[int], count: int, *, vocab_size: int, seed: int = 0, sample_index: int = 0
) -> list[int]:
    """Return the ``count`` tokens that a run without any cache draws after ``prompt``."""
    tokens = list(prompt)
    state = _START
    for token in tokens:
        state = _extend(state, token)
    for _ in range(count):
        drawn = _draw(state, vocab_size, seed, sample_index, len(tokens))
        tokens.append(drawn)
        state = _extend(state, drawn)
    return tokens[len(prompt) :]


class ChainRunner:
    """Implements ``StepRunner``; counts what it computed.

    ``fails`` names sequences whose logits are not finite; what such a sequence saves is rubbish.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_logits_slots: int,
        vocab_size: int = 7,
        fails: Callable[[SequencePlan], bool] = lambda part: False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_logits_slots = num_logits_slots
        self.vocab_size = vocab_size
        self.fails = fails
        self.slots: dict[tuple[int, int], int] = {}
        self.logits: dict[int, int] = {}
        self.num_tokens_computed = 0
        self.plans: list[StepPlan] = []

    @property
    def object_format(self) -> ObjectFormat:
        """Return a format whose block has eight bytes per slot: one hash."""
        return ObjectFormat("chain", "float32", (1, 2, self.block_size, 1, 1), max(2, self.vocab_size))

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        saved = [self._save(save) for save in plan.saves]
        for load in plan.loads:
            self._load(load)
        for copy in plan.copies:
            for offset in range(copy.num_slots):
                self.slots[copy.target, offset] = self.slots[copy.source, offset]
        written: set[tuple[int, int]] = set()
        for part in sorted(
            plan.sequences, key=lambda p: p.num_computed
        ):  # a producer starts before its sharers
            for offset, token in enumerate(part.token_ids):
                position = part.num_computed + offset
                slot = self._slot(part, position)
                before = _START if position == 0 else self.slots[self._slot(part, position - 1)]
                if slot in written:
                    raise AssertionError(f"slot {slot} written twice in one step")
                written.add(slot)
                self.slots[slot] = _extend(before, token)
                self.num_tokens_computed += 1
        self._check_groups(plan)
        self._check_logits_slots(plan)
        loaded = {
            p.sequence_id: self.logits[p.logits_from] for p in plan.sequences if p.logits_from is not None
        }
        sampled: list[SampledToken | None] = []
        failed: dict[int, str] = {}
        for part in plan.sequences:
            state = loaded.get(part.sequence_id)
            if state is None and part.token_ids:
                state = self.slots[self._slot(part, part.num_tokens_after - 1)]
            has_failed = part.sampling is not None and self.fails(part)
            if has_failed:
                failed[part.sequence_id] = "not finite"
            if part.save_logits_to is not None and state is not None:
                self.logits[part.save_logits_to] = -1 if has_failed else state
            if has_failed or part.sampling is None or state is None:
                sampled.append(None)
                continue
            spec = part.sampling
            sampled.append(
                SampledToken(_draw(state, self.vocab_size, spec.seed, spec.sample_index, part.position))
            )
        return StepResult(plan.step_id, sampled, failed, saved=saved)

    def _save(self, save: KvSave) -> bytes:
        if save.target is KvTarget.LOGITS:
            size = self.object_format.bytes_per_logits
            return struct.pack("<Q", self.logits[save.index] & _MASK).ljust(size, b"\0")
        states = [self.slots.get((save.index, offset), 0) for offset in range(self.block_size)]
        return struct.pack(f"<{self.block_size}Q", *states)

    def _load(self, load: KvLoad) -> None:
        if load.target is KvTarget.LOGITS:
            self.logits[load.index] = struct.unpack_from("<Q", load.payload)[0]
            return
        for offset, state in enumerate(struct.unpack(f"<{self.block_size}Q", load.payload)):
            self.slots[load.index, offset] = state

    def _slot(self, part: SequencePlan, position: int) -> tuple[int, int]:
        return part.block_table[position // self.block_size], position % self.block_size

    def _check_groups(self, plan: StepPlan) -> None:
        for group in plan.groups:
            members = plan.sequences[group.start : group.stop]
            tables = {tuple(m.block_table[group.first_block : group.last_block]) for m in members}
            if len(members) < 2 or len(tables) != 1:
                raise AssertionError(f"{group} does not share its blocks")
            if any(m.num_computed < group.last_block * self.block_size or not m.token_ids for m in members):
                raise AssertionError(f"{group} has a member that would need a mask")

    def _check_logits_slots(self, plan: StepPlan) -> None:
        saved = [p.save_logits_to for p in plan.sequences if p.save_logits_to is not None]
        loaded = {p.logits_from for p in plan.sequences if p.logits_from is not None}
        if len(set(saved)) != len(saved) or loaded & set(saved):
            raise AssertionError("a logits slot is written twice, or read and written, in one step")
