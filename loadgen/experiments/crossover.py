"""From which prefix length on one way beats the other, and who chose the faster way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ALWAYS", "NEVER", "LengthTimes", "measured_crossover", "share_decided_right"]

ALWAYS = 0.0
NEVER = -1.0
"""As ``TierStats.crossover_tokens`` has them."""


@dataclass(frozen=True, slots=True)
class LengthTimes:
    """One prefix length both ways, and what the server decided for."""

    num_tokens: int
    restore_s: float
    recompute_s: float
    decisions: tuple[str, ...] = ()
    """"fetch" or "recompute", one for each time it was asked to decide."""

    @property
    def faster(self) -> str:
        """Return the decision that would have been right."""
        return "fetch" if self.restore_s < self.recompute_s else "recompute"


def measured_crossover(rows: Sequence[LengthTimes]) -> float:
    """Return the length from which restoring stays the faster way, on a straight line between two lengths.

    ``ALWAYS``: at every length, so it lies below the shortest one. ``NEVER``: not even at the longest.
    ``rows`` by rising length.
    """
    gains = [row.recompute_s - row.restore_s for row in rows]
    losses = [index for index, gain in enumerate(gains) if gain <= 0]
    if not losses:
        return ALWAYS
    last = losses[-1]
    if last == len(rows) - 1:
        return NEVER
    low, high = rows[last], rows[last + 1]
    share = -gains[last] / (gains[last + 1] - gains[last])
    return low.num_tokens + share * (high.num_tokens - low.num_tokens)


def share_decided_right(rows: Sequence[LengthTimes]) -> float:
    """Return the share of decisions that were for the faster way, every length counting alike."""
    decided = [row for row in rows if row.decisions]
    if not decided:
        raise ValueError("nothing was decided")
    return sum(row.decisions.count(row.faster) / len(row.decisions) for row in decided) / len(decided)
