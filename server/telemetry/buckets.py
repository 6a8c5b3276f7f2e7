"""Observations counted by size, for the event loop's thread alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["Buckets"]


class Buckets:
    """What a Prometheus histogram counts: one observation costs a bisection and two additions.

    A library's histogram takes locks besides, which costs ten times as much. Read from any thread: what is
    seen may lack an observation that is being made.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds``: the largest value of each bucket, in order; one more takes what is larger."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.total = 0.0
        """Sum of what was observed."""

    def observe(self, value: float) -> None:
        """Add one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return for each bound, as its label says it, how many observations were not larger."""
        count = 0
        buckets: list[tuple[str, float]] = []
        for bound, more in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            count += more
            buckets.append((bound, count))
        return buckets
