"""How fast a tier is, kept current by what it does anyway."""

from __future__ import annotations

import threading

__all__ = ["SpeedMeter"]

_WEIGHT = 0.1
"""Of one observation; a change is followed in some twenty."""
_SMALL_BYTES = 16 << 10
"""An object this small costs latency and nothing else."""


class SpeedMeter:
    """Latency and rate of one direction. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latency_s: float | None = None
        self._seconds_per_byte: float | None = None

    @property
    def latency_s(self) -> float:
        """Return the part of the time that does not depend on size; 0 until known."""
        return self._latency_s or 0.0

    @property
    def bytes_per_s(self) -> float:
        """Return the rate beyond the latency; 0 until known."""
        return 1 / self._seconds_per_byte if self._seconds_per_byte else 0.0

    def observe(self, num_bytes: int, seconds: float) -> None:
        """Note that moving ``num_bytes`` took ``seconds`` of work, waiting in a queue not counted."""
        seconds = max(seconds, 1e-9)
        with self._lock:
            if num_bytes <= _SMALL_BYTES:
                self._latency_s = _mean(self._latency_s, seconds)
                return
            # Faster than the latency is proof that the latency was too high.
            if self._latency_s is not None and self._latency_s > seconds / 2:
                self._latency_s = _mean(self._latency_s, seconds / 2)
            beyond = max(seconds - (self._latency_s or 0.0), seconds / 2)
            self._seconds_per_byte = _mean(self._seconds_per_byte, beyond / num_bytes)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
