"""All tiers as the engine sees them: one lookup, one store, one fetch that comes up block by block.

::

    evicted, written ---> prepare -> complete -----> host
                                           \\-------> disk, redis        (those that want it)

    match ends here, more is in the tiers:
      fetch([k1 k2 k3 k4]) -> batch      k1 <- host    k2 <- disk    k3 <- host, corrupt -> disk    k4 ...
      poll()                             arrives in any order
      batch.num_ready                    k1 k2 before k3: blocks are of use from the front only
      batch.take(2)                      into the device; room for others

What several batches want is fetched once. Objects under way or waiting to be taken stay within a byte
budget; it is given to batches in the order of their start, and whoever is first gets all it needs before the
next gets anything, so no two batches wait for each other.

Everything here runs on the engine's thread and blocks nowhere.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from kvcore.clock import Clock
from kvcore.keys import PrefixDigest
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    FetchFailure,
    ObjectFormat,
    ObjectKey,
    ObjectKind,
    Presence,
    StoreTicket,
    Tier,
    TierStats,
)
from kvcore.tiers.worth import Decision, DecisionReason, Worth

__all__ = ["FetchBatch", "Located", "StackCounters", "StackTicket", "StoreReason", "TierStack"]

_SLACK = 4.0
"""A fetch may take so many times what is expected of it before another tier, or recomputing, is better."""
_OBSERVE_EVERY = 16
"""Objects of a burst that does not end."""
_PATIENCE_S = 0.5
_NETWORK_PATIENCE_S = 0.04
"""The least that a fetch is given, whatever is expected: threads have to be scheduled, too."""


class StoreReason(StrEnum):
    """Why an object could go down."""

    WRITTEN = "written"
    """Its block became READY: write-behind, for tiers that outlive the process."""
    EVICTED = "evicted"
    """Its block leaves the device: for every tier that has not got it."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where an object is."""

    presence: Presence
    tier: str | None = None
    """The best that has it; None unless ``presence`` is YES."""


@dataclass(frozen=True, slots=True)
class StackTicket:
    """Room for one object in some tiers; ends in ``complete`` or ``abandon``."""

    key: ObjectKey
    reservations: tuple[tuple[Tier, StoreTicket], ...]


@dataclass(slots=True)
class StackCounters:
    """What the stack itself counts; each tier counts its own."""

    fetched: Counter[str] = field(default_factory=Counter)
    """Objects delivered, by tier."""
    fetched_bytes: Counter[str] = field(default_factory=Counter)
    """Moved, encoded, by tier."""
    failures: Counter[tuple[str, FetchFailure]] = field(default_factory=Counter)
    """Fetches that gave nothing, by tier and kind; cancelled ones left out."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Objects that the named tier failed to give and another one was asked for."""
    lost: int = 0
    """Objects that no tier could give in time: recomputed."""
    shared: int = 0
    """Objects that a second batch got from the first one's fetch."""
    promoted: int = 0
    chosen: Counter[DecisionReason] = field(default_factory=Counter)
    """Decisions by reason."""
    refused: Counter[str] = field(default_factory=Counter)
    """Stores that a tier could not take at the time, by tier."""
    not_worth_storing: Counter[str] = field(default_factory=Counter)


class _Phase(Enum):
    WAITING = "waiting"
    """For room in the budget."""
    UNDER_WAY = "under way"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class _Arrival:
    """One object on its way to one or more batches."""

    key: ObjectKey
    namespace: PrefixDigest
    batches: list[FetchBatch]
    phase: _Phase = _Phase.WAITING
    tier: Tier | None = None
    tried: list[Tier] = field(default_factory=list)
    found: Fetched | None = None
    failure: FetchFailure | None = None
    num_reserved: int = 0
    """Bytes of the budget that it takes."""
    num_ahead: int = 0
    """Bytes that the tier had to bring when it was asked for this one, its own included."""


class FetchBatch:
    """Consecutive objects of one prefix on their way up. Made by ``TierStack.fetch``."""

    def __init__(self, stack: TierStack, keys: Sequence[ObjectKey], deadline: float) -> None:
        self._stack = stack
        self._arrivals: list[_Arrival] = []
        self.keys = tuple(keys)
        self.deadline = deadline
        self.num_taken = 0
        self.num_ready = 0
        """Leading objects that have arrived, taken ones included."""
        self.failed_at: int | None = None
        """Index of the first object that will not come; nothing behind it is fetched."""
        self.failure: FetchFailure | None = None
        self.is_cancelled = False
        self.is_lossy = False
        """One of those taken went through a lossy codec."""
        self.objects_by_tier: Counter[str] = Counter()
        self.bytes_by_tier: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        failed = "" if self.failed_at is None else f", failed at {self.failed_at}"
        return f"FetchBatch({self.num_ready}/{len(self)} ready, {self.num_taken} taken{failed})"

    @property
    def is_done(self) -> bool:
        """Say whether nothing more will arrive."""
        return self.is_cancelled or self.num_ready == (
            len(self) if self.failed_at is None else self.failed_at
        )

    def take(self, count: int) -> list[CacheObject]:
        """Hand over the next ``count`` objects, all of which are ready; their room is free again."""
        if self.is_cancelled or self.num_taken + count > self.num_ready:
            raise ValueError(f"{count} objects wanted, {self.num_ready - self.num_taken} are ready")
        taken = []
        for arrival in self._arrivals[self.num_taken : self.num_taken + count]:
            fetched = arrival.found
            assert fetched is not None
            assert fetched.found is not None
            taken.append(fetched.found)
            self.is_lossy = self.is_lossy or fetched.is_lossy
            self.objects_by_tier[fetched.tier] += 1
            self.bytes_by_tier[fetched.tier] += fetched.num_bytes
            self._stack._leave(self, arrival)
        self.num_taken += count
        self._stack._retire(self)
        self._stack._submit()
        return taken

    def cancel(self) -> None:
        """Give up what was not taken. The engine calls it for every batch in the end; twice does no harm."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self._stack._drop(self)


class TierStack:
    """See the module's text. ``tiers`` from the fastest to the slowest."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        object_format: ObjectFormat,
        *,
        worth: Worth,
        clock: Clock,
        max_fetched_bytes: int = 256 << 20,
        promotes: bool = False,
    ) -> None:
        """Stack tiers that are open.

        ``max_fetched_bytes``: of objects under way or not yet taken. ``promotes``: keep in the first tier, if
        it does not outlive the process, what came up from those below.
        """
        self.tiers = tuple(tiers)
        self.worth = worth
        self.counters = StackCounters()
        self._format = object_format
        self._clock = clock
        self._max_fetched_bytes = max_fetched_bytes
        self._promotes = promotes
        self._by_name = {tier.name: tier for tier in self.tiers}
        if len(self._by_name) != len(self.tiers):
            raise ValueError("two tiers of one name")
        self._arrivals: dict[ObjectKey, _Arrival] = {}
        self._batches: OrderedDict[FetchBatch, int] = OrderedDict()
        """In the order of their start; how many of its objects each has submitted."""
        self._reserved_bytes = 0
        self._outstanding_bytes: Counter[str] = Counter()
        self._num_arrived: Counter[str] = Counter()
        self._started: set[str] = set()

    # -------------------------------------------------------------------------------------------- where

    def lookup(self, key: ObjectKey) -> Located:
        """Say where an object is, from memory; the first tier that has it wins."""
        is_coming = False
        for tier in self.tiers:
            presence = tier.lookup(key)
            if presence is Presence.YES:
                return Located(Presence.YES, tier.name)
            is_coming = is_coming or presence is Presence.COMING
        return Located(Presence.COMING if is_coming else Presence.NO)

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        """Look up the consecutive objects of one prefix up to the first that is nowhere.

        The last entry may be COMING: what lies behind it is not known yet. (All remote questions are asked
        before the first answer is needed, so they travel together.)
        """
        located = []
        for key in keys:
            where = self.lookup(key)
            if where.presence is Presence.NO:
                break
            located.append(where)
        first_coming = next((i for i, where in enumerate(located) if where.tier is None), None)
        return located if first_coming is None else located[: first_coming + 1]

    def decide(
        self,
        located: Sequence[Located],
        keys: Sequence[ObjectKey],
        *,
        start_position: int,
        queue_wait_s: float = 0.0,
    ) -> Decision:
        """Decide whether to fetch located objects (all YES) or to recompute their tokens.

        Tiers work side by side, but the slowest may well be the one that matters: their times are added.
        """
        if not located:
            return Decision(fetch=False, fetch_s=None, recompute_s=None, reason=DecisionReason.NOTHING)
        num_bytes: Counter[str] = Counter()
        num_tokens = 0
        for where, key in zip(located, keys, strict=False):
            if where.tier is None:
                break
            num_bytes[where.tier] += self._format.payload_bytes(key.kind)
            num_tokens += self._format.block_size if key.kind is ObjectKind.BLOCK else 1
        fetch_s: float | None = 0.0
        for tier, count in num_bytes.items():
            share = self.worth.fetch_s(tier, count + self._outstanding_bytes[tier])
            fetch_s = None if share is None or fetch_s is None else fetch_s + share
        recompute_s = self.worth.recompute_s(num_tokens, start_position)
        decision = self.worth.decide_between(fetch_s, recompute_s, queue_wait_s)
        self.counters.chosen[decision.reason] += 1
        return decision

    # -------------------------------------------------------------------------------------------- down

    def prepare(
        self,
        key: ObjectKey,
        *,
        reason: StoreReason,
        start_position: int = 0,
        expected_reuses: float = 1.0,
    ) -> StackTicket | None:
        """Reserve room in every tier that should take an object; None: none does.

        Freshly written blocks go to tiers that outlive the process; evicted ones to all. Not to a tier that
        has them, nor to one where fetching them again could never pay. ``start_position`` is that of the
        object's first token.
        """
        num_bytes = self._format.payload_bytes(key.kind)
        reservations = []
        for tier in self.tiers:
            if reason is StoreReason.WRITTEN and not tier.is_persistent:
                continue
            if tier.lookup(key) is Presence.YES:
                continue
            # The end of an exact prompt saves a whole step whatever its tokens: it has a budget elsewhere.
            if key.kind is ObjectKind.BLOCK and not self.worth.is_worth_storing(
                tier.name,
                num_bytes=num_bytes,
                num_tokens=self._format.block_size,
                start_position=start_position,
                expected_reuses=expected_reuses,
            ):
                self.counters.not_worth_storing[tier.name] += 1
                continue
            ticket = tier.prepare(key, num_bytes)
            if ticket is not None:
                reservations.append((tier, ticket))
            elif tier.lookup(key) is Presence.NO:
                self.counters.refused[tier.name] += 1
        return StackTicket(key, tuple(reservations)) if reservations else None

    def complete(self, ticket: StackTicket, stored: CacheObject) -> None:
        """Hand over a reserved object; its payload is shared by the tiers and must not change any more."""
        for tier, reservation in ticket.reservations:
            tier.complete(reservation, stored)

    def abandon(self, ticket: StackTicket) -> None:
        """Give a reservation back."""
        for tier, reservation in ticket.reservations:
            tier.abandon(reservation)

    # ---------------------------------------------------------------------------------------------- up

    def fetch(self, keys: Sequence[ObjectKey], *, namespace: PrefixDigest, timeout_s: float) -> FetchBatch:
        """Begin to bring consecutive objects of one prefix (blocks, then a partial one, then logits)."""
        batch = FetchBatch(self, keys, self._clock.now() + timeout_s)
        self._batches[batch] = 0
        for index, key in enumerate(batch.keys):
            arrival = self._arrivals.get(key)
            if arrival is not None and arrival.namespace != namespace:
                # A digest belongs to one namespace: one of the two asks for what is not its own.
                self._fail_batch(batch, index, FetchFailure.MISMATCH)
                break
            if arrival is None or arrival.phase is _Phase.FAILED:
                arrival = self._arrivals[key] = _Arrival(key, namespace, [])
            elif arrival.batches:
                self.counters.shared += 1
            arrival.batches.append(batch)
            batch._arrivals.append(arrival)
        self._submit()
        self._advance(batch)
        return batch

    def poll(self) -> bool:
        """Take what the tiers have, give it to the batches; say whether any batch got on."""
        before = [(batch, batch.num_ready, batch.failed_at) for batch in self._batches]
        for tier in self.tiers:
            self._start_worth(tier)
            for fetched in tier.poll():
                self._arrive(tier, fetched)
        now = self._clock.now()
        for batch in [batch for batch in self._batches if now >= batch.deadline and not batch.is_done]:
            self._advance(batch)
            if not batch.is_done:
                self._fail_batch(batch, batch.num_ready, FetchFailure.TIMEOUT)
                self.counters.lost += 1
        self._submit()
        for batch in list(self._batches):
            self._advance(batch)
        return any((batch.num_ready, batch.failed_at) != (ready, failed) for batch, ready, failed in before)

    # ------------------------------------------------------------------------------------------- the rest

    def remove(self, keys: Iterable[ObjectKey]) -> None:
        """Forget objects in every tier."""
        keys = list(keys)
        for tier in self.tiers:
            tier.remove(keys)

    def remove_prefixes(self, digests: Sequence[PrefixDigest]) -> int:
        """Forget these prefixes and, as far as it is known, what continues them; return how many objects."""
        return sum(tier.remove_prefixes(digests) for tier in self.tiers)

    def clear(self, namespace: PrefixDigest | None = None) -> dict[str, int]:
        """Forget the objects of a namespace, or all; return how many, by tier."""
        return {tier.name: tier.clear(namespace) for tier in self.tiers}

    def stats(self) -> dict[str, TierStats]:
        """Return a snapshot of every tier's figures."""
        return {tier.name: tier.stats() for tier in self.tiers}

    @property
    def is_idle(self) -> bool:
        """Say whether nothing is under way."""
        return not self._batches and not self._arrivals

    @property
    def reserved_bytes(self) -> int:
        """Bytes of objects under way or waiting to be taken."""
        return self._reserved_bytes

    def close(self) -> None:
        """Cancel what is under way and close the tiers, the slowest to end last."""
        for batch in list(self._batches):
            batch.cancel()
        for tier in self.tiers:
            tier.close()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` naming what does not add up."""
        reserved = sum(arrival.num_reserved for arrival in self._arrivals.values())
        assert reserved == self._reserved_bytes, f"{self._reserved_bytes} bytes counted, {reserved} found"
        for key, arrival in self._arrivals.items():
            assert arrival.key == key
            assert arrival.batches or arrival.phase is _Phase.UNDER_WAY, f"nobody waits for {key!r}"
            assert all(batch in self._batches for batch in arrival.batches)

    # ---------------------------------------------------------------------------------------- its own: up

    def _submit(self) -> None:
        """Start fetches while there is room: batches in order, each as a whole before the next."""
        for batch in list(self._batches):
            while not batch.is_done and self._batches[batch] < len(batch._arrivals):
                arrival = batch._arrivals[self._batches[batch]]
                if arrival.phase is _Phase.WAITING:
                    size = self._format.payload_bytes(arrival.key.kind)
                    # One object is always let through, or a budget below its size would stop everything.
                    if self._reserved_bytes and self._reserved_bytes + size > self._max_fetched_bytes:
                        return
                    self._reserved_bytes += size
                    arrival.num_reserved = size
                    self._ask_next_tier(arrival)
                self._batches[batch] += 1
                if arrival.phase is _Phase.FAILED:
                    self._advance(batch)

    def _ask_next_tier(self, arrival: _Arrival) -> None:
        """Ask the best tier that was not asked yet and has the object; none left: it has failed."""
        for tier in self.tiers:
            if tier in arrival.tried or tier.lookup(arrival.key) is not Presence.YES:
                continue
            remaining_s = max(batch.deadline for batch in arrival.batches) - self._clock.now()
            if remaining_s <= 0:
                arrival.failure = FetchFailure.TIMEOUT
                break
            arrival.tried.append(tier)
            timeout_s = min(remaining_s, self._patience_s(tier, arrival.num_reserved))
            if tier.fetch(arrival.key, namespace=arrival.namespace, timeout_s=timeout_s):
                arrival.phase, arrival.tier = _Phase.UNDER_WAY, tier
                self._outstanding_bytes[tier.name] += arrival.num_reserved
                arrival.num_ahead = self._outstanding_bytes[tier.name]
                return
        arrival.phase = _Phase.FAILED
        arrival.failure = arrival.failure or FetchFailure.MISSING
        self.counters.lost += 1
        self._release(arrival)

    def _patience_s(self, tier: Tier, num_bytes: int) -> float:
        """Return how long one more fetch may take, behind those that the tier has already."""
        least_s = _NETWORK_PATIENCE_S if tier.name == "redis" else _PATIENCE_S
        expected_s = self.worth.fetch_s(tier.name, num_bytes + self._outstanding_bytes[tier.name])
        return max(least_s, _SLACK * (expected_s or 0.0))

    def _arrive(self, tier: Tier, fetched: Fetched) -> None:
        arrival = self._arrivals.get(fetched.key)
        if arrival is None or arrival.tier is not tier or arrival.phase is not _Phase.UNDER_WAY:
            return
        self._outstanding_bytes[tier.name] -= arrival.num_reserved
        self._observe(tier, arrival, fetched)
        arrival.tier = None
        if fetched.failure is not None and fetched.failure is not FetchFailure.CANCELLED:
            self.counters.failures[tier.name, fetched.failure] += 1
        if not arrival.batches:
            self._release(arrival)
            del self._arrivals[arrival.key]
        elif fetched.found is not None:
            arrival.phase, arrival.found = _Phase.READY, fetched
            self.counters.fetched[tier.name] += 1
            self.counters.fetched_bytes[tier.name] += fetched.num_bytes
            self._promote(tier, fetched.found)
        else:
            if fetched.failure is FetchFailure.CANCELLED:
                # Given up by everybody, then wanted again before the tier had noticed.
                arrival.tried.remove(tier)
            arrival.failure = fetched.failure
            num_tried = len(arrival.tried)
            self._ask_next_tier(arrival)
            if len(arrival.tried) > num_tried and fetched.failure is not FetchFailure.CANCELLED:
                self.counters.fallbacks[tier.name] += 1

    def _observe(self, tier: Tier, arrival: _Arrival, fetched: Fetched) -> None:
        """Teach ``Worth`` from the last object of a burst: its time is that of all that was ahead of it."""
        self._num_arrived[tier.name] += 1
        is_last = self._outstanding_bytes[tier.name] == 0
        if not is_last and self._num_arrived[tier.name] % _OBSERVE_EVERY:
            return
        if fetched.found is not None or fetched.failure is FetchFailure.TIMEOUT:
            self.worth.observe_fetch(tier.name, arrival.num_ahead, fetched.seconds)

    def _promote(self, tier: Tier, found: CacheObject) -> None:
        best = self.tiers[0]
        if not self._promotes or tier is best or best.is_persistent:
            return
        ticket = best.prepare(found.key, self._format.payload_bytes(found.key.kind))
        if ticket is not None:
            best.complete(ticket, found)
            self.counters.promoted += 1

    def _advance(self, batch: FetchBatch) -> None:
        """Bring a batch's count of leading objects up to date; at a failure, give up what lies behind."""
        arrivals = batch._arrivals
        limit = len(arrivals) if batch.failed_at is None else batch.failed_at
        while batch.num_ready < limit and arrivals[batch.num_ready].phase is _Phase.READY:
            batch.num_ready += 1
        if batch.failed_at is None:
            for index in range(batch.num_ready, len(arrivals)):
                if arrivals[index].phase is _Phase.FAILED:
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
        behind, batch._arrivals = batch._arrivals[index:], batch._arrivals[:index]
        self._give_up(batch, behind)

    def _drop(self, batch: FetchBatch) -> None:
        """Forget a batch."""
        self._give_up(batch, batch._arrivals[batch.num_taken :])
        self._batches.pop(batch, None)
        self._submit()

    def _leave(self, batch: FetchBatch, arrival: _Arrival) -> None:
        """Note that a batch has no use for an arrival any more."""
        arrival.batches.remove(batch)
        if arrival.batches:
            return
        if arrival.phase is _Phase.UNDER_WAY:
            return  # the tier still owes an answer
        self._release(arrival)
        if self._arrivals.get(arrival.key) is arrival:
            del self._arrivals[arrival.key]

    def _give_up(self, batch: FetchBatch, arrivals: Sequence[_Arrival]) -> None:
        for arrival in arrivals:
            self._leave(batch, arrival)
        for tier in self.tiers:
            unwanted = [a.key for a in arrivals if not a.batches and a.tier is tier]
            if unwanted:
                tier.cancel(unwanted)

    def _release(self, arrival: _Arrival) -> None:
        self._reserved_bytes -= arrival.num_reserved
        arrival.num_reserved = 0

    def _start_worth(self, tier: Tier) -> None:
        """Take over what a tier measured of itself, once it has."""
        if tier.name in self._started:
            return
        stats = tier.stats()
        if stats.read_bytes_per_s > 0:
            self._started.add(tier.name)
            self.worth.start_tier(
                tier.name,
                latency_s=stats.latency_s,
                read_bytes_per_s=stats.read_bytes_per_s,
                write_bytes_per_s=stats.write_bytes_per_s,
            )
