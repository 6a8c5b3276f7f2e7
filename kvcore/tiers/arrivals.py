"""Objects on their way up: which tier is asked, how many at a time, and who gets what arrives.

::

    fetch      WAITING ---> UNDER_WAY ---> READY ---> taken
               for room       |    ^         (in order, from the front of its batches)
               in the         v    |
               budget       this tier failed: the next that has it; none left: FAILED

What several batches want is fetched once. Objects under way or waiting to be taken stay within a byte
budget; it is given to batches in the order of their start, and whoever is first gets all it needs before the
next gets anything, so no two batches wait for each other.

Everything here runs on the engine's thread and blocks nowhere.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from kvcore.clock import Clock
from kvcore.keys import PrefixDigest
from kvcore.tiers.batches import Arrival, FetchBatch, Phase
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    FetchFailure,
    ObjectFormat,
    ObjectKey,
    Presence,
    Tier,
)
from kvcore.tiers.stack_counters import StackCounters
from kvcore.tiers.worth import Worth

__all__ = ["Arrivals"]

_SLACK = 4.0
"""A fetch may take so many times what is expected of it before another tier, or recomputing, is better."""
_OBSERVE_EVERY = 16
"""Objects of a burst that does not end."""
_PATIENCE_S = 0.5
_NETWORK_PATIENCE_S = 0.04
"""The least that a fetch is given, whatever is expected: threads have to be scheduled, too."""
MAX_STARTED_PER_POLL = 64
"""Fetches; each takes some 50 µs of the engine's thread, and the next poll comes with the next step."""


class Arrivals:
    """See the module's text. ``tiers`` from the fastest to the slowest."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        object_format: ObjectFormat,
        *,
        worth: Worth,
        clock: Clock,
        counters: StackCounters,
        max_fetched_bytes: int,
        promotes: bool,
    ) -> None:
        """Start with nothing under way; see ``TierStack`` for the limits."""
        self.max_fetched_bytes = max_fetched_bytes
        self.reserved_bytes = 0
        """Of objects under way or waiting to be taken."""
        self.outstanding_bytes: Counter[str] = Counter()
        """That each tier still has to bring."""
        self._tiers = tiers
        self._format = object_format
        self._worth = worth
        self._clock = clock
        self._counters = counters
        self._promotes = promotes
        self._arrivals: dict[ObjectKey, Arrival] = {}
        self._batches: OrderedDict[FetchBatch, int] = OrderedDict()
        """In the order of their start; how many of its objects each has submitted."""
        self._num_arrived: Counter[str] = Counter()
        self._num_startable = MAX_STARTED_PER_POLL

    @property
    def batches(self) -> list[FetchBatch]:
        """Return the batches that are not done or not taken, in the order of their start."""
        return list(self._batches)

    @property
    def is_idle(self) -> bool:
        """Say whether nothing is under way."""
        return not self._batches and not self._arrivals

    def fetch(self, keys: Sequence[ObjectKey], *, namespace: PrefixDigest, timeout_s: float) -> FetchBatch:
        """Begin to bring consecutive objects of one prefix."""
        batch = FetchBatch(self, keys, self._clock.now() + timeout_s)
        self._batches[batch] = 0
        for index, key in enumerate(batch.keys):
            arrival = self._arrivals.get(key)
            if arrival is not None and arrival.namespace != namespace:
                # A digest belongs to one namespace: one of the two asks for what is not its own.
                self._fail_batch(batch, index, FetchFailure.MISMATCH)
                break
            if arrival is None or arrival.phase is Phase.FAILED:
                arrival = self._arrivals[key] = Arrival(key, namespace, [])
            elif arrival.batches:
                self._counters.shared += 1
            arrival.batches.append(batch)
            batch.arrivals.append(arrival)
        self._submit()
        self._advance(batch)
        return batch

    def poll(self) -> bool:
        """Take what the tiers have, give it to the batches; say whether any batch got on."""
        self._num_startable = MAX_STARTED_PER_POLL
        before = [(batch, batch.num_ready, batch.failed_at) for batch in self._batches]
        for tier in self._tiers:
            for fetched in tier.poll():
                self._arrive(tier, fetched)
        now = self._clock.now()
        for batch in [batch for batch in self._batches if now >= batch.deadline and not batch.is_done]:
            self._advance(batch)
            if not batch.is_done:
                self._fail_batch(batch, batch.num_ready, FetchFailure.TIMEOUT)
                self._counters.lost += 1
        self._submit()
        for batch in list(self._batches):
            self._advance(batch)
        return any((batch.num_ready, batch.failed_at) != (ready, failed) for batch, ready, failed in before)

    def note_taken(self, batch: FetchBatch, arrivals: Sequence[Arrival]) -> None:
        """Free the room of what a batch has handed over, for others."""
        for arrival in arrivals:
            self._leave(batch, arrival)
        self._retire(batch)
        self._submit()

    def drop(self, batch: FetchBatch) -> None:
        """Give up what a batch has not handed over, and forget it."""
        self._give_up(batch, batch.arrivals[batch.num_taken :])
        self._batches.pop(batch, None)
        self._submit()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` naming what does not add up."""
        reserved = sum(arrival.num_reserved for arrival in self._arrivals.values())
        assert reserved == self.reserved_bytes, f"{self.reserved_bytes} bytes counted, {reserved} found"
        for key, arrival in self._arrivals.items():
            assert arrival.key == key
            assert arrival.batches or arrival.phase is Phase.UNDER_WAY, f"nobody waits for {key!r}"
            assert all(batch in self._batches for batch in arrival.batches)

    def _submit(self) -> None:
        """Start fetches while there is room: batches in order, each as a whole before the next."""
        for batch in list(self._batches):
            while not batch.is_done and self._batches[batch] < len(batch.arrivals):
                arrival = batch.arrivals[self._batches[batch]]
                if arrival.phase is Phase.WAITING:
                    size = self._format.payload_bytes(arrival.key.kind)
                    # One object is always let through, or a budget below its size would stop everything.
                    if self.reserved_bytes and self.reserved_bytes + size > self.max_fetched_bytes:
                        return
                    if not self._num_startable:
                        return
                    self._num_startable -= 1
                    self.reserved_bytes += size
                    arrival.num_reserved = size
                    self._ask_next_tier(arrival)
                self._batches[batch] += 1
                if arrival.phase is Phase.FAILED:
                    self._advance(batch)

    def _ask_next_tier(self, arrival: Arrival) -> None:
        """Ask the best tier that was not asked yet and has the object; none left: it has failed."""
        for tier in self._tiers:
            if tier in arrival.tried or tier.lookup(arrival.key) is not Presence.YES:
                continue
            remaining_s = max(batch.deadline for batch in arrival.batches) - self._clock.now()
            if remaining_s <= 0:
                arrival.failure = FetchFailure.TIMEOUT
                break
            arrival.tried.append(tier)
            timeout_s = min(remaining_s, self._patience_s(tier, arrival.num_reserved))
            if tier.fetch(arrival.key, namespace=arrival.namespace, timeout_s=timeout_s):
                arrival.phase, arrival.tier = Phase.UNDER_WAY, tier
                self.outstanding_bytes[tier.name] += arrival.num_reserved
                arrival.num_ahead = self.outstanding_bytes[tier.name]
                return
        arrival.phase = Phase.FAILED
        arrival.failure = arrival.failure or FetchFailure.MISSING
        self._counters.lost += 1
        self._release(arrival)

    def _patience_s(self, tier: Tier, num_bytes: int) -> float:
        """Return how long one more fetch may take, behind those that the tier has already."""
        least_s = _NETWORK_PATIENCE_S if tier.name == "redis" else _PATIENCE_S
        expected_s = self._worth.fetch_s(tier.name, num_bytes + self.outstanding_bytes[tier.name])
        return max(least_s, _SLACK * (expected_s or 0.0))

    def _arrive(self, tier: Tier, fetched: Fetched) -> None:
        arrival = self._arrivals.get(fetched.key)
        if arrival is None or arrival.tier is not tier or arrival.phase is not Phase.UNDER_WAY:
            return
        self.outstanding_bytes[tier.name] -= arrival.num_reserved
        self._observe(tier, arrival, fetched)
        arrival.tier = None
        if fetched.failure is not None and fetched.failure is not FetchFailure.CANCELLED:
            self._counters.failures[tier.name, fetched.failure] += 1
        if not arrival.batches:
            self._release(arrival)
            del self._arrivals[arrival.key]
        elif fetched.found is not None:
            arrival.phase, arrival.found = Phase.READY, fetched
            self._counters.fetched[tier.name] += 1
            self._counters.fetched_bytes[tier.name] += fetched.num_bytes
            self._promote(tier, fetched.found, is_lossy=fetched.is_lossy)
        else:
            if fetched.failure is FetchFailure.CANCELLED:
                # Given up by everybody, then wanted again before the tier had noticed.
                arrival.tried.remove(tier)
            arrival.failure = fetched.failure
            num_tried = len(arrival.tried)
            self._ask_next_tier(arrival)
            if len(arrival.tried) > num_tried and fetched.failure is not FetchFailure.CANCELLED:
                self._counters.fallbacks[tier.name] += 1

    def _observe(self, tier: Tier, arrival: Arrival, fetched: Fetched) -> None:
        """Teach ``Worth`` from the last object of a burst: its time is that of all that was ahead of it."""
        self._num_arrived[tier.name] += 1
        is_last = self.outstanding_bytes[tier.name] == 0
        if not is_last and self._num_arrived[tier.name] % _OBSERVE_EVERY:
            return
        if fetched.found is not None or fetched.failure is FetchFailure.TIMEOUT:
            self._worth.observe_fetch(tier.name, arrival.num_ahead, fetched.seconds)

    def _promote(self, tier: Tier, found: CacheObject, *, is_lossy: bool) -> None:
        best = self._tiers[0]
        if not self._promotes or tier is best or best.is_persistent or (is_lossy and not best.is_lossy):
            return
        ticket = best.prepare(found.key, self._format.payload_bytes(found.key.kind))
        if ticket is not None:
            best.complete(ticket, found)
            self._counters.promoted += 1

    def _advance(self, batch: FetchBatch) -> None:
        """Bring a batch's count of leading objects up to date; at a failure, give up what lies behind."""
        arrivals = batch.arrivals
        limit = len(arrivals) if batch.failed_at is None else batch.failed_at
        while batch.num_ready < limit and arrivals[batch.num_ready].phase is Phase.READY:
            batch.num_ready += 1
        if batch.failed_at is None:
            for index in range(batch.num_ready, len(arrivals)):
                if arrivals[index].phase is Phase.FAILED:
                    self._fail_batch(batch, index, arrivals[index].failure or FetchFailure.MISSING)
                    break
        self._retire(batch)

    def _retire(self, batch: FetchBatch) -> None:
        """Forget a batch of which nothing more is to be had."""
        if batch.is_done and batch.num_taken == batch.num_ready:
            self._batches.pop(batch, None)

    def _fail_batch(self, batch: FetchBatch, index: int, failure: FetchFailure) -> None:
        if batch.failed_at is not None and batch.failed_at <= index:
            return
        batch.failed_at, batch.failure = index, failure
        behind, batch.arrivals = batch.arrivals[index:], batch.arrivals[:index]
        self._give_up(batch, behind)

    def _leave(self, batch: FetchBatch, arrival: Arrival) -> None:
        """Note that a batch has no use for an arrival any more."""
        arrival.batches.remove(batch)
        if arrival.batches:
            return
        if arrival.phase is Phase.UNDER_WAY:
            return  # the tier still owes an answer
        self._release(arrival)
        if self._arrivals.get(arrival.key) is arrival:
            del self._arrivals[arrival.key]

    def _give_up(self, batch: FetchBatch, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            self._leave(batch, arrival)
        for tier in self._tiers:
            unwanted = [a.key for a in arrivals if not a.batches and a.tier is tier]
            if unwanted:
                tier.cancel(unwanted)

    def _release(self, arrival: Arrival) -> None:
        self.reserved_bytes -= arrival.num_reserved
        arrival.num_reserved = 0
