"""One request's objects on their way up: what has come, in order, and what will not.

::

    keys      k0   k1   k2   k3   k4   k5
              taken     ready     under way, maybe shared with other batches
    num_taken ----^         ^
    num_ready --------------+         leading ones only: k5 may have come, it has to wait for k4
    failed_at                         everything before it still comes; what lies behind is given up

A batch is passive: ``kvcore.tiers.arrivals`` moves it on. An object that several batches want is one
``Arrival`` in all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from kvcore.keys import PrefixDigest
from kvcore.tiers.interface import CacheObject, Fetched, FetchFailure, ObjectKey, Tier

__all__ = ["Arrival", "BatchOwner", "FetchBatch", "Phase"]


class Phase(Enum):
    """How far an arrival is."""

    WAITING = "waiting"
    """For room in the budget."""
    UNDER_WAY = "under way"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Arrival:
    """One object on its way to one or more batches."""

    key: ObjectKey
    namespace: PrefixDigest
    batches: list[FetchBatch]
    phase: Phase = Phase.WAITING
    tier: Tier | None = None
    tried: list[Tier] = field(default_factory=list)
    found: Fetched | None = None
    failure: FetchFailure | None = None
    num_reserved: int = 0
    """Bytes of the budget that it takes."""
    num_ahead: int = 0
    """Bytes that the tier had to bring when it was asked for this one, its own included."""


class BatchOwner(Protocol):
    """Who moves batches on and frees the room of what they let go."""

    def note_taken(self, batch: FetchBatch, arrivals: Sequence[Arrival]) -> None:
        """Note that a batch has handed these over; it has counted them."""
        ...

    def drop(self, batch: FetchBatch) -> None:
        """Give up what a batch has not handed over."""
        ...


class FetchBatch:
    """Consecutive objects of one prefix on their way up. Made by ``TierStack.fetch``."""

    def __init__(self, owner: BatchOwner, keys: Sequence[ObjectKey], deadline: float) -> None:
        self._owner = owner
        self.arrivals: list[Arrival] = []
        """The owner's: those of the leading keys, up to a failure."""
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
        arrivals = self.arrivals[self.num_taken : self.num_taken + count]
        taken = []
        for arrival in arrivals:
            fetched = arrival.found
            assert fetched is not None
            assert fetched.found is not None
            taken.append(fetched.found)
            self.is_lossy = self.is_lossy or fetched.is_lossy
            self.objects_by_tier[fetched.tier] += 1
            self.bytes_by_tier[fetched.tier] += fetched.num_bytes
        self.num_taken += count
        self._owner.note_taken(self, arrivals)
        return taken

    def cancel(self) -> None:
        """Give up what was not taken. The engine calls it for every batch in the end; twice does no harm."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self._owner.drop(self)
