"""Our own policy: keep what will be used again soonest, as far as the past can tell.

``kvcore.policies.reuse`` learns from all requests when blocks of which kind are used again. Leaves are
grouped by the model's cells; within a cell the oldest goes first; among the cells' oldest, the one whose
index is lowest. A conversation's blocks age together, so it goes from its end.

**Never worse than LRU**: two small ghost caches replay the same requests, one under this rule, one under
LRU, and the rule that has hit more of late is followed. It begins as LRU. Changing sides costs nothing, as
in each group the order is that of recency: followed as LRU, the worth of a head is its last use.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcore.ghost import GhostCache
from kvcore.policies.interface import Entry, EvictionPolicy, digest_of
from kvcore.policies.lru_ghost import LruGhost
from kvcore.policies.reuse import NUM_CELLS, Record, ReuseModel

__all__ = ["ForesightPolicy"]

UNKNOWN = NUM_CELLS
"""The group of entries that no request has ended with: of cancelled ones, or from before a switch."""

MAX_GHOSTS = 131_072
GHOSTS_PER_BLOCK = 8
"""Records kept for each block of capacity."""

MAX_ROOTS = 65_536

DUEL_ENTRIES = 3000
"""A duel needs no larger caches. Beyond, an entry stands for several blocks, up to so many tokens, ..."""
DUEL_ENTRY_TOKENS = 512
"""... and beyond that, a share of the prefix families stands for all."""
DUEL_FADE = 0.999
"""What a lead is worth one request later."""
LEAD_TO_BEGIN, REQUESTS_TO_BEGIN = 0.04, 5.0
"""The lead at which the model is followed, as a share of the duel's capacity, or in mean requests: the
larger of the two counts."""
LOSS_TO_END, FALL_TO_END = 1.0, 1.0
"""It is followed no longer when it has lost so much of that lead since, or has fallen so far (in
capacities, or by half) from its best."""
MAX_CAUTION = 64.0
"""The lead that it takes is four times as much each time the model disappoints, up to so many times."""


class ForesightPolicy(EvictionPolicy):
    """Follow the model of reuse while it beats LRU."""

    name = "foresight"
    description = "ours: learns from stage, output and tail of past requests when blocks are used again"
    num_groups = NUM_CELLS + 1
    worth_lifetime_s = 0.25

    def __init__(self, *, capacity_blocks: int, block_tokens: int = 16) -> None:
        super().__init__(capacity_blocks=capacity_blocks, block_tokens=block_tokens)
        max_records = min(MAX_GHOSTS, GHOSTS_PER_BLOCK * capacity_blocks + 4096)
        self.model = ReuseModel(max_records=max_records, block_tokens=block_tokens)
        self.duel = Duel(self.model, capacity_blocks=capacity_blocks, block_tokens=block_tokens)
        self._num_fits = 0
        self._root_numbers: dict[int, int] = {}

    def closed(self, path: Sequence[Entry], num_tokens: int, num_output_tokens: int, now: float) -> None:
        if not path:
            return
        digests = []
        digest = self._number_of(path[0].parent)
        num_found = 0
        for entry in path:
            mark = entry.mark
            if type(mark) is Record:  # it has ended a request before: this one has found it
                digest = mark.digest
                num_found += 1
            else:
                digest = digest_of(entry, digest)
            digests.append(digest)
        records = self.model.learn(digests, num_tokens, num_output_tokens, now)
        for entry, record in zip(path, records, strict=True):
            entry.mark = record
        was_ahead = self.duel.is_model_ahead
        self.duel.replay(records, num_found)
        if self.duel.is_model_ahead is not was_ahead or self.model.num_fits != self._num_fits:
            self._num_fits = self.model.num_fits
            self.epoch += 1

    def _number_of(self, root: Entry) -> int:
        """Return a number for a namespace: not its serial, so that two runs of one trace agree."""
        numbers = self._root_numbers
        if len(numbers) >= MAX_ROOTS:
            numbers.clear()
        return numbers.setdefault(root.serial, len(numbers))

    def group_of(self, entry: Entry) -> int:
        mark = entry.mark
        return mark.spell.cell if type(mark) is Record else UNKNOWN

    def order(self, entry: Entry) -> float:
        return entry.last_used

    def worth(self, group: int, head: Entry, now: float) -> float:
        if not self.duel.is_model_ahead:
            return head.last_used
        if group == UNKNOWN:
            return 0.0
        return self.model.index(head.mark, max(now, self.model.now))


class ModelPolicy(EvictionPolicy):
    """The model's rule alone, for ghosts whose keys are the model's records."""

    name = "model"
    description = "the model of reuse, unguarded"
    num_groups = NUM_CELLS
    worth_lifetime_s = 0.25

    def __init__(self, model: ReuseModel, *, capacity_blocks: int) -> None:
        super().__init__(capacity_blocks=capacity_blocks)
        self._model = model

    def opened(self, path: Sequence[Entry], num_tokens: int, now: float) -> None:
        self.epoch = self._model.num_fits

    def group_of(self, entry: Entry) -> int:
        record: Record = entry.key  # type: ignore[assignment]
        return record.spell.cell

    def order(self, entry: Entry) -> float:
        return entry.last_used

    def worth(self, group: int, head: Entry, now: float) -> float:
        return self._model.index(head.key, now)  # type: ignore[arg-type]


class Duel:
    """The model's rule against LRU, in ghosts."""

    def __init__(self, model: ReuseModel, *, capacity_blocks: int, block_tokens: int) -> None:
        self._model = model
        too_many = -(-capacity_blocks // DUEL_ENTRIES)
        self._stride = max(1, min(too_many, DUEL_ENTRY_TOKENS // block_tokens))
        self._one_in = max(1, round(capacity_blocks / self._stride / DUEL_ENTRIES))
        size = max(1, round(capacity_blocks / self._stride / self._one_in))
        self._ours = GhostCache(ModelPolicy(model, capacity_blocks=size), capacity_blocks=size)
        self._lru = LruGhost(capacity_blocks=size)
        self._size = size
        self._caution = 1.0
        self._mean_blocks = 0.0
        """Of a request, of late."""
        self._gain = self._best_gain = 0.0
        """What the real cache has hit more than LRU since the model is followed; the most that this was."""
        self.lead = 0.0
        """By how many blocks the model has hit more than LRU, the past fading."""
        self.is_model_ahead = False

    def replay(self, records: list[Record], num_found: int) -> None:
        """Let both sides serve a request that found so many blocks in the real cache, if it is sampled."""
        if records[0].digest % self._one_in:
            return
        now, sample = self._model.now, records[self._stride - 1 :: self._stride]
        ours = self._ours.request(0, sample, now, num_tokens=0)
        theirs = self._lru.request(sample)
        self._mean_blocks += (len(sample) - self._mean_blocks) * 0.01
        self._judge(ours - theirs, num_found // self._stride - theirs)

    def _judge(self, margin: int, real_margin: int) -> None:
        """Choose who is followed, after a request of which the model hit ``margin`` more entries than LRU.

        It begins to be followed by what its ghost hits, and goes on by what the real cache hits.
        """
        self.lead = self.lead * DUEL_FADE + margin
        enough = max(LEAD_TO_BEGIN * self._size, REQUESTS_TO_BEGIN * self._mean_blocks)
        if not self.is_model_ahead:
            if self.lead > enough * self._caution:
                self.is_model_ahead, self._gain, self._best_gain = True, 0.0, 0.0
            return
        self._gain += real_margin
        self._best_gain = max(self._best_gain, self._gain)
        if self._gain > self._size:
            self._caution = 1.0
        least = max(self._best_gain / 2, self._best_gain - FALL_TO_END * self._size)
        if self._gain < least - LOSS_TO_END * enough:
            self.is_model_ahead, self.lead = False, 0.0
            self._caution = min(MAX_CAUTION, 4.0 * self._caution)
