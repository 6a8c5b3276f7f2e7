"""One reuse policy: its keys, its entries, its lifetimes, its risk, and what it counted.

A lookup ends in exactly one of five ways, so that counters add up::

    lookups = hits + absent + expired + stopped + uncertified
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum

import numpy as np

from kvcore.risk import RiskAlarm, RiskBudget
from server.predict.messages import EventKind, KeyReport, PolicyReport, ReuseEvent
from server.predict.reuse.keys import KeyNames, KeyRule
from server.predict.reuse.lifetimes import STOPPED, Comparison, Ladder, LifetimeChange, Lifetimes
from server.predict.reuse.meters import describe_risk, interval_report, make_meter
from server.predict.reuse.predictor import Floats, Singles
from server.predict.reuse.store import EncodingStore, Entry

__all__ = ["Counts", "Lookup", "Outcome", "PolicySettings", "ReusePolicy"]

MAX_METERED_KEYS = 10_000


class Outcome(Enum):
    """Of a lookup."""

    HIT = "hit"
    ABSENT = "absent"
    EXPIRED = "expired"
    STOPPED = "stopped"
    UNCERTIFIED = "uncertified"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """What an operator says of a policy."""

    name: str
    traffic_share: float
    rule: KeyRule
    ladder: Ladder
    min_lifetime_s: float
    max_lifetime_s: float
    budget: RiskBudget
    sample_share: float
    max_error: float | None
    max_entries: int
    max_bytes: int
    seed: int


@dataclass(slots=True)
class Counts:
    """Since the policy was made."""

    hit: int = 0
    absent: int = 0
    expired: int = 0
    stopped: int = 0
    uncertified: int = 0

    @property
    def lookups(self) -> int:
        return self.hit + self.absent + self.expired + self.stopped + self.uncertified


@dataclass(slots=True)
class Lookup:
    """How one row fared. ``entry`` is what was found, also if it may not be reused."""

    outcome: Outcome
    entry: Entry | None = None
    age_s: float = 0.0
    keeps_entry: bool = False
    """What is computed afresh does not replace the entry."""
    compares: bool = False
    """The fresh encoding is computed, and compared with the entry's."""

    @property
    def computes(self) -> bool:
        return self.compares or self.outcome is not Outcome.HIT


class ReusePolicy:
    """See the module's text. The owner's lock is around every call."""

    def __init__(
        self,
        settings: PolicySettings,
        *,
        bytes_per_entry: int,
        names: KeyNames,
        on_event: Callable[[ReuseEvent], None],
    ) -> None:
        self.settings = settings
        self.counts = Counts()
        self.store = EncodingStore(
            max_entries=settings.max_entries,
            max_bytes=settings.max_bytes,
            bytes_per_entry=bytes_per_entry,
            owner_of=settings.rule.owner_of,
        )
        self.lifetimes = Lifetimes(settings.ladder, settings.budget, on_change=self._tell_change)
        self.meter = make_meter(
            settings.budget,
            max_keys=MAX_METERED_KEYS,
            on_alarm=lambda alarm: self._tell_alarm(EventKind.ALARM, alarm),
            on_recovery=lambda alarm: self._tell_alarm(EventKind.RECOVERED, alarm),
        )
        """Of what was reused; its sum is the policy's risk."""
        self.hit_s = self.miss_s = 0.0
        """Sums over rows."""
        self._names = names
        self._on_event = on_event
        self._draw = random.Random(f"{settings.seed}/{settings.name}")  # noqa: S311 - which hits to compare

    def look_up(self, key: bytes, now: float) -> Lookup:
        """Find what is kept, without counting: the certificate may still be against a hit."""
        entry = self.store.find(key)
        if entry is None:
            return Lookup(Outcome.ABSENT)
        age = now - entry.stored_at
        lifetime = self.lifetimes.lifetime(key)
        if age < lifetime:
            return Lookup(Outcome.HIT, entry, age)
        # Both compute the fresh encoding anyway: comparing costs a head.
        if lifetime == STOPPED:
            is_young = age < self.settings.ladder.edges[0]
            return Lookup(Outcome.STOPPED, entry, age, keeps_entry=is_young, compares=True)
        return Lookup(Outcome.EXPIRED, entry, age, compares=True)

    def count(self, lookup: Lookup) -> None:
        """Count it as what it ended as; draw whether a hit is compared."""
        name = lookup.outcome.value
        setattr(self.counts, name, getattr(self.counts, name) + 1)
        if lookup.outcome is Outcome.HIT and lookup.entry is not None:
            lookup.entry.num_hits += 1
            lookup.compares = self._draw.random() < self.settings.sample_share

    def keep(self, key: bytes, row: Singles, encoding: Singles, anchor: Floats | None, now: float) -> None:
        """Keep what was computed for a row. Copies: entries must not hold whole batches."""
        anchor = None if anchor is None else anchor.copy()
        self.store.put(key, Entry(row.copy(), encoding.copy(), anchor, now))

    def learn(self, key: bytes, lookup: Lookup, comparison: Comparison) -> None:
        """Note a comparison. Of the policy's risk only those count that were reuses."""
        if lookup.outcome is Outcome.HIT:
            self.meter.observe(key, comparison.cosine, comparison.l2, comparison.changed)
        self.lifetimes.observe(key, comparison)

    def report(self, *, max_keys: int) -> PolicyReport:
        """Return what it is and did; keys over budget first, then the latest compared."""
        settings, counts, ladder = self.settings, self.counts, self.settings.ladder
        lifetime = self.lifetimes.lifetime()
        num_misses = counts.lookups - counts.hit
        return PolicyReport(
            name=settings.name,
            traffic_share=settings.traffic_share,
            num_key_features=settings.rule.num_features,
            bin_width=settings.rule.bin_width,
            lifetime_s=_plain(max(lifetime, ladder.edges[0])),
            stopped=lifetime <= 0,
            min_lifetime_s=settings.min_lifetime_s,
            max_lifetime_s=settings.max_lifetime_s,
            max_changed=settings.budget.max_changed or 0.0,
            max_cosine_distance=settings.budget.max_cosine_distance or 0.0,
            max_l2=settings.budget.max_l2 or 0.0,
            max_error=settings.max_error or 0.0,
            sample_share=settings.sample_share,
            num_entries=len(self.store),
            max_entries=self.store.capacity,
            num_bytes=self.store.num_bytes,
            num_lookups=counts.lookups,
            num_hits=counts.hit,
            num_absent=counts.absent,
            num_expired=counts.expired,
            num_stopped=counts.stopped,
            num_uncertified=counts.uncertified,
            num_evicted=self.store.num_evicted,
            num_alarms=self.meter.num_alarms,
            num_stopped_keys=self.lifetimes.num_stopped_keys,
            risk=describe_risk(self.meter),
            keys=self._report_keys(max_keys),
            hit_s=self.hit_s / counts.hit if counts.hit else 0.0,
            miss_s=self.miss_s / num_misses if num_misses else 0.0,
        )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if something does not add up."""
        self.store.check_integrity()
        self.lifetimes.check_integrity()
        assert all(getattr(self.counts, each.name) >= 0 for each in fields(self.counts))
        assert self.meter.estimate().num_observed <= self.counts.hit, "more hits compared than there were"

    def _report_keys(self, max_keys: int) -> tuple[KeyReport, ...]:
        if max_keys < 1:
            return ()
        known = [key for key in reversed(self.meter.known_keys()) if isinstance(key, bytes)]
        first = sorted(known, key=lambda key: not self.meter.is_over_budget(key))
        return tuple(
            KeyReport(
                key=self._names.name(key),
                risk=describe_risk(self.meter, key),
                lifetime_s=_plain(self.lifetimes.lifetime(key)),
                stopped=self.lifetimes.lifetime(key) == STOPPED,
                num_hits=self.store.hits_of(key),
            )
            for key in first[:max_keys]
        )

    def _tell_change(self, change: LifetimeChange) -> None:
        kind = EventKind.LIFETIME
        if change.after_s == STOPPED:
            kind = EventKind.STOPPED
        elif change.before_s == STOPPED:
            kind = EventKind.RESUMED
        key = "" if change.key is None else self._names.name(change.key)
        self._tell(ReuseEvent(kind=kind, key=key, lifetime_s=_plain(change.after_s)))

    def _tell_alarm(self, kind: EventKind, alarm: RiskAlarm) -> None:
        key = self._names.name(alarm.key) if isinstance(alarm.key, bytes) else ""
        self._tell(
            ReuseEvent(
                kind=kind,
                key=key,
                measure=alarm.measure,
                interval=interval_report(alarm.interval),
                limit=alarm.limit,
            )
        )

    def _tell(self, event: ReuseEvent) -> None:
        self._on_event(event)


def _plain(lifetime_s: float) -> float:
    """Return it as messages have it: 0 for none."""
    return lifetime_s if np.isfinite(lifetime_s) else 0.0
