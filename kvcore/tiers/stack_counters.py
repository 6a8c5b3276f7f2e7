"""What the stack of tiers counts; each tier counts its own (``TierStats``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvcore.tiers.interface import FetchFailure
from kvcore.tiers.worth import DecisionReason

__all__ = ["StackCounters"]


@dataclass(slots=True)
class StackCounters:
    """Sums since the start."""

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
