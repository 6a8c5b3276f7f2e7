"""How long encodings may be reused: as long as it is proved for every age, no longer.

A comparison of a reused with a fresh encoding tells about reuse at *that entry's age*, and about no other. A
lifetime T lets through every age below T, in shares that depend on who asks when. So ages are cut into rungs,

    0 ---- e0 ---- e1 ---- e2 -------- ... ---- longest          each about twice the last
     rung 0  rung 1  rung 2

each rung has its own account in a risk meter, and the lifetime is always an edge. The rule, for all keys
together and for each key by itself:

- **shorten**: a rung below the lifetime is proved over budget: the lifetime becomes its lower edge; at the
  lowest rung reuse stops.
- **lengthen**: the next rung above the lifetime in which anything was ever compared is proved safe: the
  lifetime becomes its upper edge. Rungs between in which nobody ever asked are passed over, and judged as
  soon as somebody does. Reuse that was stopped begins again when the lowest rung is proved safe.
- otherwise nothing changes.

Why this is sound. If reuse in every rung below T changes at most a share p of the answers, so does any
mixture of them: the guarantee needs neither a risk that grows with age nor a fixed pattern of requests. An
average over all ages would need both: when T grows, old ages weigh more than they did in it. Evidence about
ages *above* the lifetime costs nothing: a lookup that finds an entry too old computes the fresh encoding
anyway, and the two are compared. And because accounts belong to ages and not to lifetimes, a change of the
lifetime leaves the evidence about other ages as it is; that which led to a cut is used once, and forgotten.

A key's own evidence goes before that of all keys in both directions: it can hold the key below the others
(``cap``), and let it live longer than them (``floor``: every rung up to it in which the key was compared is
proved safe). A key that is held below an age no longer counts for all at that age: it risks nothing there.

The starting lifetime is the operator's: it stands until it is proved wrong. Without a limit in the budget
nothing can be proved, and it stands for ever.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum

from kvcore.risk import RiskBudget, RiskMeter
from server.predict.reuse.meters import make_meter

__all__ = ["STOPPED", "Comparison", "Ladder", "LifetimeChange", "Lifetimes"]

STOPPED = 0.0
"""The lifetime of what is not reused."""

MAX_KEYS = 20_000
"""Keys, and rungs of keys, that are remembered by themselves; the least recently compared are forgotten."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Reused against fresh, once."""

    age_s: float
    cosine: float
    l2: float
    """Length of the difference over that of the fresh encoding."""
    changed: bool


@dataclass(frozen=True, slots=True)
class LifetimeChange:
    """For a key, or (None) for all that have no evidence of their own. ``STOPPED``: no reuse."""

    key: bytes | None
    before_s: float
    after_s: float


class Ladder:
    """The ages at which lifetimes may end."""

    def __init__(self, start_s: float, *, min_s: float, max_s: float) -> None:
        """Put rungs from ``min_s`` to ``max_s``, doubling from and to ``start_s``, which may be infinite."""
        if not 0 < min_s <= max_s:
            raise ValueError("0 < min_s <= max_s")
        begin = min(max(start_s, min_s), max_s)
        edges = [begin]
        while edges[0] > min_s:
            edges.insert(0, max(min_s, edges[0] / 2))
        while edges[-1] < max_s:
            edges.append(min(max_s, edges[-1] * 2))
        if start_s > max_s:
            edges.append(start_s)
        self.edges = tuple(edges)
        self.start = self.edges.index(start_s if start_s > max_s else begin)

    def __len__(self) -> int:
        return len(self.edges)

    def rung_of(self, age_s: float) -> int:
        """Return the rung that an age falls on; ``len(self)`` beyond the last."""
        return bisect_right(self.edges, age_s)

    def lifetime(self, rung: int) -> float:
        """Return the lifetime that reaches to the end of a rung; below the first nothing lives."""
        return STOPPED if rung < 0 else self.edges[rung]


class _Verdict(Enum):
    OPEN = "open"
    SAFE = "safe"
    OVER = "over"


@dataclass(slots=True)
class _Standing:
    """What a key's own evidence says: reuse up to ``floor`` whatever others do, never above ``cap``."""

    cap: int
    floor: int = -1
    verdicts: dict[int, _Verdict] = field(default_factory=dict)


class Lifetimes:
    """See the module's text. One thread, or a lock around it."""

    def __init__(
        self, ladder: Ladder, budget: RiskBudget, *, on_change: Callable[[LifetimeChange], None]
    ) -> None:
        self.ladder = ladder
        self._on_change = on_change
        self._is_limited = any(
            limit is not None for limit in (budget.max_changed, budget.max_cosine_distance, budget.max_l2)
        )
        self._rung = ladder.start
        self._verdicts: dict[int, _Verdict] = {}
        self._ages = make_meter(budget, max_keys=len(ladder))
        self._key_ages = make_meter(budget, max_keys=MAX_KEYS)
        self._standings: OrderedDict[bytes, _Standing] = OrderedDict()
        self.num_stopped_keys = 0

    def lifetime(self, key: bytes | None = None) -> float:
        """Return how long the key's entries may be reused (None: those of keys without evidence)."""
        return self.ladder.lifetime(self._rung_of(key))

    def observe(self, key: bytes, comparison: Comparison) -> None:
        """Learn from a comparison, of a hit or of what was too old or stopped."""
        rung = self.ladder.rung_of(comparison.age_s)
        if rung >= len(self.ladder) or not self._is_limited:
            return
        values = (comparison.cosine, comparison.l2, comparison.changed)
        self._key_ages.observe((key, rung), *values)
        standing = self._standing(key)
        standing.verdicts[rung] = _verdict(self._key_ages, (key, rung))
        self._move_key(key, standing, rung)
        if rung <= standing.cap:
            self._ages.observe(rung, *values)
            self._verdicts[rung] = _verdict(self._ages, rung)
            self._move_all(rung)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if standings contradict each other."""
        assert -1 <= self._rung < len(self.ladder)
        for standing in self._standings.values():
            assert -1 <= standing.floor <= standing.cap < len(self.ladder), standing
        stopped = sum(standing.cap < 0 for standing in self._standings.values())
        assert stopped == self.num_stopped_keys, "stopped keys do not add up"

    def _rung_of(self, key: bytes | None) -> int:
        standing = None if key is None else self._standings.get(key)
        if standing is None:
            return self._rung
        return max(standing.floor, min(standing.cap, self._rung))

    def _standing(self, key: bytes) -> _Standing:
        standing = self._standings.get(key)
        if standing is None:
            standing = self._standings[key] = _Standing(cap=len(self.ladder) - 1)
            if len(self._standings) > MAX_KEYS:
                _, dropped = self._standings.popitem(last=False)
                self.num_stopped_keys -= dropped.cap < 0
        self._standings.move_to_end(key)
        return standing

    def _move_all(self, rung: int) -> None:
        before = self._rung
        if self._verdicts[rung] is _Verdict.OVER:
            self._rung = min(self._rung, rung - 1)
        else:
            self._rung = _climb(self._verdicts, self._rung, rung)
        self._tell(None, before, self._rung)

    def _move_key(self, key: bytes, standing: _Standing, rung: int) -> None:
        before = self._rung_of(key)
        self.num_stopped_keys -= standing.cap < 0
        if standing.verdicts[rung] is _Verdict.OVER:
            standing.cap = min(standing.cap, rung - 1)
            standing.floor = min(standing.floor, standing.cap)
        else:
            standing.cap = _climb(standing.verdicts, standing.cap, rung)
            proved = _climb(standing.verdicts, -1, len(self.ladder) - 1, to_the_end=True)
            standing.floor = min(proved, standing.cap)
        self.num_stopped_keys += standing.cap < 0
        self._tell(key, before, self._rung_of(key))

    def _tell(self, key: bytes | None, before: int, after: int) -> None:
        if before != after:
            change = LifetimeChange(key, self.ladder.lifetime(before), self.ladder.lifetime(after))
            self._on_change(change)


def _verdict(meter: RiskMeter, account: Hashable) -> _Verdict:
    """Return what is proved.

    What is proved bad is acted on, and then forgotten: however long it was bad, what comes later can be
    proved good in about as many comparisons as at first.
    """
    if meter.is_over_budget(account):
        meter.forget(account)
        return _Verdict.OVER
    return _Verdict.SAFE if meter.is_proven_safe(account) else _Verdict.OPEN


def _climb(verdicts: dict[int, _Verdict], rung: int, top: int, *, to_the_end: bool = False) -> int:
    """Return the next rung above ``rung`` in which something was compared, if it is safe; else ``rung``."""
    reached = rung
    for each in range(rung + 1, top + 1):
        verdict = verdicts.get(each)
        if verdict is _Verdict.SAFE:
            reached = each
            if not to_the_end:
                break
        elif verdict is not None:
            break
    return reached
