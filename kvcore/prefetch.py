"""Which sessions come back soon: what to fetch into the device's memory before they ask for it.

A conversation or an agent sends a request, waits for a tool or a person to think, and comes back with the
same prefix and a little more. Between two requests its blocks may have left the device. How long it stays
away is predicted from its own waits, and from everybody's while it has few. Waits spread over orders of
magnitude, so they are counted in classes that widen with the wait::

    share of waits
      |   ##                          tools: seconds
      |  ####            ###          people: minutes
      | ######   ##    ######  .
      +--------------------------------------> log(wait)
             ^ waited so far: what lies to the left is ruled out, the rest is rescaled

Most requests are nobody's second one, so prefixes that nobody has come back to yet are counted apart from
those that somebody has: who came back once is likely to do so again.

A session is worth fetching when, having been away for so long, it returns within the window with a
probability that keeps the waste well under its bound. The bound itself is on what really happens: fetches are
paid from a credit, which a fetch that was done fills and a wasted one drains::

    credit:  + m  for each one finished,  - 1  for each one wasted,  + a little every hour
    wasted  <=  m * finished + the credit at first + what the hours gave        (m is below max_waste)

So a predictor that is wrong stops, and tries again now and then.

One fetch, as the engine drives it::

    ended -> due -> started -> arrived -> returned      in time
                            -> returned -> arrived      late: part of the wait was hidden
                            -> expired or lost          wasted
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["PrefetchCounters", "PrefetchOutcome", "SessionPredictor", "WaitTimes"]

_OWN_FADE, _POPULATION_FADE = 0.9, 0.998
_MARGIN = 0.5
"""Share of the bound that the estimate of one fetch may use up: waits change, and estimates err."""
_FIRST_CREDIT, _MOST_CREDIT = 1.0, 2.0
"""Wasted fetches beyond the bound: at first, and after any number of good ones."""
_CREDIT_PER_S = 0.1 / 3600.0
"""So that one that had to stop finds out whether the waits are different now."""
_NUM_KINDS = 2
"""Sessions that came back never yet, and those that did."""
SessionKey = Hashable
"""Opaque; the engine takes the digest that names a conversation's beginning."""


class PrefetchOutcome(Enum):
    """What became of one session's fetch."""

    IN_TIME = "in_time"
    LATE = "late"
    """The session returned while its blocks were on their way."""
    WASTED = "wasted"
    """Not used within its window, or evicted before."""


@dataclass(slots=True)
class PrefetchCounters:
    """Fetches of sessions, and the blocks that they moved."""

    fetched: int = 0
    in_time: int = 0
    late: int = 0
    wasted: int = 0
    fetched_blocks: int = 0
    wasted_blocks: int = 0

    @property
    def waste(self) -> float:
        """Share of the finished fetches that nobody used."""
        finished = self.in_time + self.late + self.wasted
        return self.wasted / finished if finished else 0.0


class WaitTimes:
    """How long waits were, in classes that widen by a constant factor; old ones fade.

    For each class: how many waits reached its end or ended in it, and how many ended in it. A session that is
    still away counts in every class that it has passed, so those that never return are not overlooked until
    they are given up (Kaplan and Meier's estimate).
    """

    _SHORTEST_S = 0.25
    _PER_DOUBLING = 2
    NUM_CLASSES = 32
    """Up to 0.25 s * 2^16, 4.5 hours."""

    __slots__ = ("ended", "reached")

    def __init__(self) -> None:
        self.ended = [0.0] * self.NUM_CLASSES
        self.reached = [0.0] * self.NUM_CLASSES

    @classmethod
    def position(cls, wait_s: float) -> float:
        """Return where a wait lies on the axis of classes: class and fraction of it."""
        if wait_s <= cls._SHORTEST_S:
            return 0.0
        return min(cls._PER_DOUBLING * math.log2(wait_s / cls._SHORTEST_S), cls.NUM_CLASSES - 1e-9)

    def passed(self, begin: int, end: int, *, fade: float) -> None:
        """Count a wait that has outlasted the classes from ``begin`` to ``end``."""
        for index in range(begin, end):
            self.ended[index] *= fade
            self.reached[index] = fade * self.reached[index] + 1.0

    def stopped(self, index: int, *, fade: float) -> None:
        """Count a wait that ended in a class."""
        self.ended[index] = fade * self.ended[index] + 1.0
        self.reached[index] = fade * self.reached[index] + 1.0


@dataclass(slots=True)
class _Session:
    waits: WaitTimes
    ended_at: float | None = None
    """None while one of its requests is running."""
    fetch: _Fetch | None = None
    num_passed: int = 0
    """Classes of waits that it has been seen to outlast, this time."""
    visit: int = 0
    """Number of its requests: an entry of the agenda with another one is out of date."""

    @property
    def kind(self) -> int:
        """Return which of the populations it belongs to."""
        return min(self.visit - 1, _NUM_KINDS - 1)


@dataclass(slots=True)
class _Fetch:
    until: float
    num_blocks: int
    probability: float
    has_arrived: bool = False


@dataclass(order=True, slots=True)
class _Check:
    at: float
    number: int
    session: SessionKey = field(compare=False)
    visit: int = field(compare=False)


class SessionPredictor:
    """See the module's text. One thread; all times from one monotonic clock."""

    def __init__(
        self,
        *,
        max_waste: float = 0.2,
        window_s: float = 1800.0,
        away_s: float = 3600.0,
        population_weight: float = 4.0,
        population_minimum: float = 20.0,
        max_sessions: int = 10_000,
    ) -> None:
        """Start without knowledge: nothing is due before ``population_minimum`` waits were seen.

        ``max_waste``: share of fetches that may go unused. ``window_s``: how long fetched blocks are held
        for a session. ``away_s``: a session that stays longer counts as gone. ``population_weight``: how many
        waits of its own a session needs, in a class, before they count as much as everybody's.
        """
        if not 0 < max_waste < 1 or window_s <= 0 or away_s <= 0 or max_sessions < 1:
            raise ValueError("0 < max_waste < 1, window_s > 0, away_s > 0, max_sessions >= 1")
        self._max_waste = max_waste
        self._window_s = window_s
        self._away_s = away_s
        self._population_weight = population_weight
        self._population_minimum = population_minimum
        self._max_sessions = max_sessions
        self._populations = [WaitTimes() for _ in range(_NUM_KINDS)]
        self._num_waits = 0
        self._sessions: OrderedDict[SessionKey, _Session] = OrderedDict()
        """By the latest sign of life."""
        self._agenda: list[_Check] = []
        self._num_checks = 0
        self._fetches: OrderedDict[SessionKey, _Session] = OrderedDict()
        self._credit = _FIRST_CREDIT
        self._credit_at: float | None = None
        self._expected_waste = 0.0
        """Of the fetches that are not finished."""
        self.counters = PrefetchCounters()

    def __len__(self) -> int:
        return len(self._sessions)

    # ------------------------------------------------------------------------------- what sessions do

    def ended(self, session: SessionKey, now: float) -> None:
        """Note that a session's last running request has finished."""
        state = self._sessions.get(session)
        if state is None:
            state = self._sessions[session] = _Session(WaitTimes())
            self._drop_surplus()
        self._sessions.move_to_end(session)
        state.ended_at = now
        state.num_passed = 0
        state.visit += 1
        self._check_at(now, session, state)

    def returned(self, session: SessionKey, now: float) -> PrefetchOutcome | None:
        """Note a new request of a session; return how its fetch turned out, None if there was none."""
        state = self._sessions.get(session)
        if state is None:
            return None
        self._sessions.move_to_end(session)
        if state.ended_at is not None:
            self._note_passed(state, now)
            index = int(WaitTimes.position(now - state.ended_at))
            state.waits.stopped(index, fade=_OWN_FADE)
            self._populations[state.kind].stopped(index, fade=_POPULATION_FADE)
            state.ended_at = None
            self._num_waits += 1
        if state.fetch is None:
            return None
        outcome = PrefetchOutcome.IN_TIME if state.fetch.has_arrived else PrefetchOutcome.LATE
        self._finish(session, state, outcome)
        return outcome

    def forget(self, session: SessionKey) -> None:
        """Drop a session that will not return: its conversation was released."""
        state = self._sessions.pop(session, None)
        if state is not None and state.fetch is not None:
            self._finish(session, state, PrefetchOutcome.WASTED)

    # -------------------------------------------------------------------------------- what is fetched

    def due(
        self, now: float, room_blocks: int, missing_blocks: Callable[[SessionKey], int]
    ) -> list[tuple[SessionKey, int]]:
        """Return the sessions to fetch now, with their missing blocks, most certain first, within the room.

        ``missing_blocks`` tells how many blocks of a session have left the device and can be fetched. A
        session that is not due is looked at again after it has been away for an eighth longer.
        """
        self._fill_credit(now)
        candidates = []
        while self._agenda and self._agenda[0].at <= now:
            check = heapq.heappop(self._agenda)
            state = self._sessions.get(check.session)
            if state is None or state.ended_at is None or state.visit != check.visit:
                continue
            self._note_passed(state, now)
            away_s = now - state.ended_at
            if away_s >= self._away_s:
                self._give_up(check.session, state)
                continue
            self._check_at(now + max(0.25, away_s / 8), check.session, state)
            if state.fetch is not None or room_blocks <= 0:
                continue
            probability = self.return_probability(check.session, now)
            if not self._is_certain_enough(probability):
                continue
            missing = missing_blocks(check.session)
            if missing > 0:
                candidates.append((probability, check.session, missing))
        candidates.sort(key=lambda candidate: -candidate[0])
        chosen = []
        expected_waste = self._expected_waste
        for probability, session, missing in candidates:
            if missing > room_blocks or self._credit < expected_waste + (1.0 - probability):
                continue
            expected_waste += 1.0 - probability
            room_blocks -= missing
            chosen.append((session, missing))
        return chosen

    def started(self, session: SessionKey, now: float, num_blocks: int) -> float:
        """Note that a due session's fetch was submitted; return until when its blocks should be held."""
        state = self._sessions[session]
        until = now + self._window_s
        state.fetch = _Fetch(until, num_blocks, self.return_probability(session, now))
        self._expected_waste += 1.0 - state.fetch.probability
        self._fetches[session] = state
        self.counters.fetched += 1
        self.counters.fetched_blocks += num_blocks
        return until

    def arrived(self, session: SessionKey) -> None:
        """Note that all of a session's fetch has come."""
        state = self._sessions.get(session)
        if state is not None and state.fetch is not None:
            state.fetch.has_arrived = True

    def lost(self, session: SessionKey) -> None:
        """Note that fetched blocks were evicted, or failed to come, before they were used."""
        state = self._sessions.get(session)
        if state is not None and state.fetch is not None:
            self._finish(session, state, PrefetchOutcome.WASTED)

    def expire(self, now: float) -> list[SessionKey]:
        """Return the sessions whose window has passed: their blocks need no holding any more."""
        expired = []
        while self._fetches:
            session, state = next(iter(self._fetches.items()))
            if state.fetch is None or state.fetch.until > now:
                break  # in the order of their start, and all windows are equal
            self._finish(session, state, PrefetchOutcome.WASTED)
            expired.append(session)
        return expired

    def return_probability(self, session: SessionKey, now: float) -> float:
        """Return the probability that a session that is away returns within the window from now."""
        state = self._sessions[session]
        if state.ended_at is None or self._num_waits < self._population_minimum:
            return 0.0
        away_s = now - state.ended_at
        begin, end = WaitTimes.position(away_s), WaitTimes.position(away_s + self._window_s)
        still_away = 1.0
        population = self._populations[state.kind]
        for index in range(int(begin), int(end) + 1):
            rate = self._end_rate(state.waits, population, index)
            first, last = max(begin - index, 0.0), min(end - index, 1.0)
            still_away *= (1.0 - last * rate) / (1.0 - first * rate)  # evenly spread within a class
        return 1.0 - still_away

    def _end_rate(self, waits: WaitTimes, population: WaitTimes, index: int) -> float:
        """Return the share of the waits reaching a class that end in it: its own, leaning on everybody's."""
        weight = self._population_weight
        # One wait more that did not end: nothing is ever certain.
        usual = population.ended[index] / (population.reached[index] + 1.0)
        return (waits.ended[index] + weight * usual) / (waits.reached[index] + weight)

    def _note_passed(self, state: _Session, now: float) -> None:
        """Count the classes that a session that is away has outlasted since it was looked at."""
        assert state.ended_at is not None
        index = int(WaitTimes.position(now - state.ended_at))
        if index > state.num_passed:
            state.waits.passed(state.num_passed, index, fade=_OWN_FADE)
            self._populations[state.kind].passed(state.num_passed, index, fade=_POPULATION_FADE)
            state.num_passed = index

    # ---------------------------------------------------------------------------------------- its own

    def _is_certain_enough(self, probability: float) -> bool:
        return 1.0 - probability <= _MARGIN * self._max_waste

    def _fill_credit(self, now: float) -> None:
        """Let time that has passed add to the credit."""
        if self._credit_at is not None:
            self._earn(max(0.0, now - self._credit_at) * _CREDIT_PER_S)
        self._credit_at = now

    def _earn(self, credit: float) -> None:
        self._credit = min(_MOST_CREDIT, self._credit + credit)

    def _finish(self, session: SessionKey, state: _Session, outcome: PrefetchOutcome) -> None:
        fetch, state.fetch = state.fetch, None
        assert fetch is not None
        del self._fetches[session]
        self._expected_waste -= 1.0 - fetch.probability
        self._earn(_MARGIN * self._max_waste)
        if outcome is PrefetchOutcome.IN_TIME:
            self.counters.in_time += 1
        elif outcome is PrefetchOutcome.LATE:
            self.counters.late += 1
        else:
            self._credit -= 1.0
            self.counters.wasted += 1
            self.counters.wasted_blocks += fetch.num_blocks

    def _give_up(self, session: SessionKey, state: _Session) -> None:
        """Count a session as gone for good; if it comes back all the same it starts anew."""
        if state.fetch is not None:
            self._finish(session, state, PrefetchOutcome.WASTED)
        del self._sessions[session]

    def _drop_surplus(self) -> None:
        while len(self._sessions) > self._max_sessions:
            session, state = next(iter(self._sessions.items()))
            if state.fetch is not None:
                self._finish(session, state, PrefetchOutcome.WASTED)
            del self._sessions[session]

    def _check_at(self, at: float, session: SessionKey, state: _Session) -> None:
        self._num_checks += 1
        heapq.heappush(self._agenda, _Check(at, self._num_checks, session, state.visit))
