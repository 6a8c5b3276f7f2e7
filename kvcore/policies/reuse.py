"""A model of reuse, learned from the requests of a server while it serves them.

**What it predicts.** For a block that was used some time ago and not since: how soon will it be used
again? As one figure, the *index*: the best ratio, over all horizons, of the chance of a use within the
horizon to the time that the block would be kept for it (Gittins' index for a job of one reward).

**From what.** Each use of a block begins a *spell* that ends with the next use. Spells are sorted into
cells by what is known when a request ends:

- the *stage*: how often the block was used before, and for a new block whether its request went on with
  something known (a turn of a conversation) or began something;
- the *output* of the requests that used it (short answers to a long text ask again, long ones are the end
  of it; a tool call goes on), averaged over its uses;
- the *tail*: whether it is near the prompt's end, which the next request often does not share.

The hazard of a cell at an age (a power of two of seconds) is the stage's hazard at that age times a
factor for the cell. The factors are products, one of each of three tables, fitted by iterative
proportional scaling; each figure is pulled towards its neighbours by some pseudo-requests, so that it is
usable after a few minutes and exact after many. Old evidence fades.

**Evidence is not biased by eviction**: spells go on when a block is evicted (its record stays as a ghost),
and ages that were not reached yet are censored, not counted as no reuse.

Costs: about a microsecond per block and request, one table of some 126 x 14 figures. See docs/cache.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from math import log2, prod

__all__ = ["NUM_CELLS", "Record", "ReuseModel"]

AGES_S = (0.0, *(2.0**power for power in range(13)))
"""Where the age buckets begin."""
WIDTHS_S = tuple(end - start for start, end in zip(AGES_S, (*AGES_S[1:], 2 * AGES_S[-1]), strict=True))
NUM_AGES = len(AGES_S)

STAGES = (1, 2, 3, 5, 9)
"""Numbers of earlier uses at which a new stage begins; blocks never used before have two stages."""
NUM_STAGES = 2 + len(STAGES)
OUTPUTS = (3.0, 5.0, 6.0, 7.0, 8.0)
"""Binary logarithms of the output lengths at which a new class begins."""
NUM_OUTPUTS = 1 + len(OUTPUTS)
NUM_TAILS = 3
TAIL_TOKENS = 512
NUM_CELLS = NUM_STAGES * NUM_OUTPUTS * NUM_TAILS

OUTPUT_STAGES = (0, 1, 2, 2, 3, 3, 3)
"""Which stages share their table of outputs."""

FIT_EVERY = 100
"""Requests between two fits."""
SLOW_DECAY, FAST_DECAY = 0.97, 0.85
"""What is left of the evidence for cells, and for ages, after each fit."""
FIT_SWEEPS = 3
PULL_FACTOR, PULL_AGE, PULL_STAGE, PULL_CELL = 2.0, 2.0, 2.0, 200.0
"""Pseudo-requests that pull a figure towards its neighbours."""
FIRST_HAZARD = 0.1
MIN_STEP_S = 0.001
"""The least time between two requests: orders those whose clock stands still."""


class Spell:
    """The blocks of one request that fell into one cell, from their use to their next."""

    __slots__ = ("cell", "num_open", "started_at", "weight")

    def __init__(self, cell: int, started_at: float, weight: float) -> None:
        self.cell = cell
        self.started_at = started_at
        self.weight = weight
        """Of one block: the blocks of a request count as one request together."""
        self.num_open = 0


class Record:
    """What is remembered of one block, cached or not."""

    __slots__ = ("digest", "num_uses", "output", "spell")

    def __init__(self, digest: int, spell: Spell) -> None:
        self.digest = digest
        self.spell = spell
        self.num_uses = 0
        """Before the last one."""
        self.output = -1.0
        """Mean binary logarithm of the output lengths, the latest weighing most."""


class Evidence:
    """Counts of reuses, and of spells that reached an age, by cell and age."""

    def __init__(self) -> None:
        self.reuses = [[0.0] * NUM_AGES for _ in range(NUM_CELLS)]
        self.reached = [[0.0] * NUM_AGES for _ in range(NUM_CELLS)]

    def add(self, other: Evidence, cells: list[int]) -> None:
        for rows, added in ((self.reuses, other.reuses), (self.reached, other.reached)):
            for cell in cells:
                rows[cell] = [a + b for a, b in zip(rows[cell], added[cell], strict=True)]

    def fade(self, share: float, cells: list[int]) -> None:
        for rows in (self.reuses, self.reached):
            for cell in cells:
                rows[cell] = [a * share for a in rows[cell]]


class ReuseModel:
    """Learn from every request that ends, and say what an entry of a cell and an age is worth."""

    def __init__(self, *, max_records: int, block_tokens: int) -> None:
        self.now = 0.0
        self.num_requests = 0
        self.num_fits = 0
        self._max_records = max_records
        self._block_tokens = block_tokens
        self._records: dict[int, Record] = {}
        """By digest, in order of their last use."""
        self._cells: list[int] = []
        """Those that have been seen."""
        self._new, self._slow, self._fast = Evidence(), Evidence(), Evidence()
        self._ageing: list[deque[Spell]] = [deque() for _ in range(NUM_AGES)]
        """Spells that are on their way to each age, in order."""
        self._stage_factors = [1.0] * NUM_STAGES
        self._output_factors = [[1.0] * NUM_OUTPUTS for _ in range(max(OUTPUT_STAGES) + 1)]
        self._tail_factors = [1.0] * NUM_TAILS
        self._index: list[list[float] | None] = [None] * NUM_CELLS

    def __repr__(self) -> str:
        return f"ReuseModel({self.num_requests} requests, {len(self._records)} records)"

    # -- learning -----------------------------------------------------------------------------------

    def learn(self, digests: list[int], num_tokens: int, num_output_tokens: int, now: float) -> list[Record]:
        """Note that a request has used these blocks, root first; return their records."""
        self.now = now = max(now, self.now + MIN_STEP_S)
        self._advance(now)
        records, num_known = self._use(digests, now)
        self._classify(records, num_known, num_tokens, num_output_tokens)
        while len(self._records) > self._max_records:
            oldest = self._records.pop(next(iter(self._records)))
            oldest.spell.num_open -= 1
        self.num_requests += 1
        if self.num_requests % FIT_EVERY == 0:
            self._fit()
        return records

    def _use(self, digests: list[int], now: float) -> tuple[list[Record], int]:
        """End the spells of known blocks, make records of new ones. Return all, and how many were known."""
        known, nobody = self._records, Spell(0, now, 0.0)
        records, num_known = [], 0
        spell, reuses, age = nobody, self._new.reuses[0], 0
        for digest in digests:
            record = known.pop(digest, None)
            if record is None:
                record = Record(digest, nobody)
            else:
                if record.spell is not spell:
                    spell = record.spell
                    reuses = self._new.reuses[spell.cell]
                    age = bisect_right(AGES_S, now - spell.started_at) - 1
                spell.num_open -= 1
                reuses[age] += spell.weight
                record.num_uses += 1
                num_known += 1
            known[digest] = record
            records.append(record)
        return records, num_known

    def _classify(
        self, records: list[Record], num_known: int, num_tokens: int, num_output_tokens: int
    ) -> None:
        """Begin a spell for each run of blocks in one cell."""
        output = log2(1 + num_output_tokens)
        weight = 1.0 / len(records) if records else 0.0
        new_stage = 1 if 2 * num_known >= len(records) else 0
        spell: Spell | None = None
        rest = num_tokens
        for record in records:
            rest -= self._block_tokens
            record.output = output if record.output < 0 else (record.output + output) / 2
            stage = 1 + bisect_right(STAGES, record.num_uses) if record.num_uses else new_stage
            tail = 0 if rest <= 0 else 1 if rest <= TAIL_TOKENS else 2
            cell = (stage * NUM_OUTPUTS + bisect_right(OUTPUTS, record.output)) * NUM_TAILS + tail
            if spell is None or spell.cell != cell:
                spell = self._begin(cell, weight)
            spell.num_open += 1
            record.spell = spell

    def _begin(self, cell: int, weight: float) -> Spell:
        spell = Spell(cell, self.now, weight)
        self._ageing[0].append(spell)
        if not any(self._slow.reached[cell]) and cell not in self._cells:
            self._cells.append(cell)
        return spell

    def _advance(self, now: float) -> None:
        """Count the spells that have reached each age by now."""
        reached = self._new.reached
        for age, start_s in enumerate(AGES_S):
            waiting = self._ageing[age]
            limit = now - start_s
            following = self._ageing[age + 1] if age + 1 < NUM_AGES else None
            while waiting and waiting[0].started_at <= limit:
                spell = waiting.popleft()
                if spell.num_open:
                    reached[spell.cell][age] += spell.weight * spell.num_open
                    if following is not None:
                        following.append(spell)

    # -- fitting ------------------------------------------------------------------------------------

    def _fit(self) -> None:
        """Turn the evidence into the table of indices."""
        cells = self._cells
        for evidence in (self._slow, self._fast):
            evidence.add(self._new, cells)
        self._new = Evidence()
        hazards = self._fit_factors()
        for cell in cells:
            stage = cell // NUM_TAILS // NUM_OUTPUTS
            expected = sum(a * b for a, b in zip(self._slow.reached[cell], hazards[stage], strict=True))
            factor = self._factor(cell)
            factor = (sum(self._slow.reuses[cell]) + PULL_CELL * factor) / (expected + PULL_CELL)
            rows = zip(self._fast.reuses[cell], self._fast.reached[cell], hazards[stage], strict=True)
            self._index[cell] = indices(
                [min(1.0, (e + PULL_CELL * factor * h) / (r + PULL_CELL)) for e, r, h in rows]
            )
        self._slow.fade(SLOW_DECAY, cells)
        self._fast.fade(FAST_DECAY, cells)
        self.num_fits += 1

    def _factor(self, cell: int) -> float:
        return prod(table[place] for table, place in self._places(cell))

    def _places(self, cell: int) -> list[tuple[list[float], int]]:
        """Return the three tables with the cell's place in each."""
        rest, tail = divmod(cell, NUM_TAILS)
        stage, output = divmod(rest, NUM_OUTPUTS)
        return [
            (self._stage_factors, stage),
            (self._output_factors[OUTPUT_STAGES[stage]], output),
            (self._tail_factors, tail),
        ]

    def _fit_factors(self) -> list[list[float]]:
        """Fit the tables of factors; return the hazards by stage and age that go with them."""
        hazards: list[list[float]] = []
        places = {cell: self._places(cell) for cell in self._cells}
        reuses = {cell: sum(self._slow.reuses[cell]) for cell in self._cells}
        tables = [self._stage_factors, *self._output_factors, self._tail_factors]
        for _ in range(FIT_SWEEPS):
            hazards = self._fit_hazards()
            expected = {}
            for cell in self._cells:
                row = hazards[cell // NUM_TAILS // NUM_OUTPUTS]
                expected[cell] = sum(a * b for a, b in zip(self._slow.reached[cell], row, strict=True))
            for table in tables:
                seen, due = [PULL_FACTOR] * len(table), [PULL_FACTOR] * len(table)
                for cell, found in places.items():
                    for other, place in found:
                        if other is table:
                            seen[place] += reuses[cell]
                            others = prod(t[p] for t, p in found if t is not table)
                            due[place] += expected[cell] * others
                table[:] = [s / d for s, d in zip(seen, due, strict=True)]
        return hazards

    def _fit_hazards(self) -> list[list[float]]:
        """Return by stage and age the chance of a reuse at that age, for a cell whose factor is 1."""
        reuses = [[0.0] * NUM_AGES for _ in range(NUM_STAGES)]
        reached = [[0.0] * NUM_AGES for _ in range(NUM_STAGES)]
        for cell in self._cells:
            stage = cell // NUM_TAILS // NUM_OUTPUTS
            factor = self._factor(cell)
            reuses[stage] = [a + b for a, b in zip(reuses[stage], self._fast.reuses[cell], strict=True)]
            reached[stage] = [
                a + b * factor for a, b in zip(reached[stage], self._fast.reached[cell], strict=True)
            ]
        pooled = [
            (sum(row[age] for row in reuses) + FIRST_HAZARD * PULL_AGE)
            / (sum(row[age] for row in reached) + PULL_AGE)
            for age in range(NUM_AGES)
        ]
        return [
            [(e + PULL_STAGE * p) / (r + PULL_STAGE) for e, r, p in zip(es, rs, pooled, strict=True)]
            for es, rs in zip(reuses, reached, strict=True)
        ]

    # -- asking -------------------------------------------------------------------------------------

    def index(self, record: Record, now: float) -> float:
        """Return the uses per second that keeping a block promises, at best."""
        spell = record.spell
        age_s = max(0.0, now - spell.started_at)
        row = self._index[spell.cell]
        if row is None:
            return FIRST_HAZARD / (1.0 + age_s)
        age = bisect_right(AGES_S, age_s) - 1
        if age + 1 == NUM_AGES:
            return row[age]
        share = (age_s - AGES_S[age]) / WIDTHS_S[age]
        return row[age] * (1.0 - share) + row[age + 1] * share


def indices(hazards: list[float]) -> list[float]:
    """Return for each age the best ratio of expected uses to time kept, over all horizons."""
    best = []
    for start in range(NUM_AGES):
        left, kept_s, ratio = 1.0, 0.0, 0.0
        for age in range(start, NUM_AGES):
            used = left * hazards[age]
            kept_s += WIDTHS_S[age] * (left - used / 2)
            left -= used
            ratio = max(ratio, (1.0 - left) / kept_s)
        best.append(ratio)
    return best
