"""All tiers as the engine sees them: one lookup, one store, one fetch that comes up block by block.

::

    evicted, written ---> prepare -> complete -----> host
                                           \\-------> disk, redis        (those that want it)

    match ends here, more is in the tiers:
      fetch([k1 k2 k3 k4]) -> batch      k1 <- host    k2 <- disk    k3 <- host, corrupt -> disk    k4 ...
      poll()                             arrives in any order
      batch.num_ready                    k1 k2 before k3: blocks are of use from the front only
      batch.take(2)                      into the device; room for others

Everything here runs on the engine's thread and blocks nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvcore.clock import Clock
from kvcore.keys import PrefixDigest
from kvcore.tiers.arrivals import Arrivals
from kvcore.tiers.batches import FetchBatch
from kvcore.tiers.interface import (
    CacheObject,
    ObjectFormat,
    ObjectKey,
    ObjectKind,
    Presence,
    StoreTicket,
    Tier,
    TierStats,
)
from kvcore.tiers.stack_counters import StackCounters
from kvcore.tiers.worth import Decision, DecisionReason, Worth

__all__ = ["FetchBatch", "Located", "StackCounters", "StackTicket", "StoreReason", "TierStack"]


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
        if len({tier.name for tier in self.tiers}) != len(self.tiers):
            raise ValueError("two tiers of one name")
        self.arrivals = Arrivals(
            self.tiers,
            object_format,
            worth=worth,
            clock=clock,
            counters=self.counters,
            max_fetched_bytes=max_fetched_bytes,
            promotes=promotes,
        )
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
            share = self.worth.fetch_s(tier, count + self.arrivals.outstanding_bytes[tier])
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
        is_exact: bool = True,
    ) -> StackTicket | None:
        """Reserve room in every tier that should take an object; None: none does.

        Freshly written blocks go to tiers that outlive the process; evicted ones to all. Not to a tier that
        has them, nor to one where fetching them again could never pay. ``start_position`` is that of the
        object's first token. What is not ``is_exact`` (a lossy codec had a hand in it) goes only where
        everything is lossy, and so never comes back as if it were exact.
        """
        num_bytes = self._format.payload_bytes(key.kind)
        reservations = []
        for tier in self.tiers:
            if not is_exact and not tier.is_lossy:
                continue
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
        return self.arrivals.fetch(keys, namespace=namespace, timeout_s=timeout_s)

    def poll(self) -> bool:
        """Take what the tiers have, give it to the batches; say whether any batch got on."""
        for tier in self.tiers:
            self._start_worth(tier)
        return self.arrivals.poll()

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
        return self.arrivals.is_idle

    @property
    def reserved_bytes(self) -> int:
        """Bytes of objects under way or waiting to be taken."""
        return self.arrivals.reserved_bytes

    def close(self) -> None:
        """Cancel what is under way and close the tiers, the slowest to end last."""
        for batch in self.arrivals.batches:
            batch.cancel()
        for tier in self.tiers:
            tier.close()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` naming what does not add up."""
        self.arrivals.check_integrity()

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
