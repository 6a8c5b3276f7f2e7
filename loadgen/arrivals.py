"""When conversations begin: when another one ends (closed loop), or at times of their own (open loop)."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Arrivals", "ClosedLoop", "OpenLoop"]


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """``concurrency`` conversations at a time; a slow server is asked less."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency}")


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Poisson arrivals at ``rate_per_s``, whatever the server does; a slow server grows a queue."""

    rate_per_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rate_per_s > 0:
            raise ValueError(f"rate_per_s must be over 0, not {self.rate_per_s}")

    def times_s(self, count: int) -> list[float]:
        """Return the first ``count`` arrival times, counted from the start."""
        rng = random.Random(self.seed)
        times, now = [], 0.0
        for _ in range(count):
            now += rng.expovariate(self.rate_per_s)
            times.append(now)
        return times


Arrivals = ClosedLoop | OpenLoop
