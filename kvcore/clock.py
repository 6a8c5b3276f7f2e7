"""Time is passed in, so that a million operations, and a day of expirations, run in a test in seconds."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "ManualClock", "MonotonicClock"]


class Clock(Protocol):
    """A source of seconds that never runs backwards; its zero means nothing."""

    def now(self) -> float:
        """Return the current time in seconds."""
        ...


class MonotonicClock:
    """The machine's monotonic clock: a change of the wall clock expires nothing."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves when it is told to. For tests and simulations."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds`` (not negative)."""
        if seconds < 0:
            raise ValueError("a clock does not run backwards")
        self._now += seconds
