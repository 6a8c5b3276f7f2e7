"""When to leave a failing tier alone, and when to try it again.

::

    CLOSED --- failures in a row ---> OPEN --- back-off is over, one try ---> HALF_OPEN
      ^                                ^                                        |  |
      |                                +----- it failed: twice the back-off ----+  |
      +--------------------------------- it succeeded -----------------------------+

(The names are those of an electric circuit: CLOSED lets calls through.)
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from enum import Enum

from kvcore.clock import Clock

__all__ = ["Health", "HealthState"]


class HealthState(Enum):
    """Whether a tier may be used."""

    CLOSED = "closed"
    OPEN = "open"
    """Left alone until the back-off is over."""
    HALF_OPEN = "half open"
    """One try is on its way; its outcome decides."""


class Health:
    """Back-off of one tier. Any thread may call any method; none blocks."""

    def __init__(
        self,
        clock: Clock,
        *,
        failures_to_open: int = 1,
        first_backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        jitter: float = 0.2,
        seed: int = 0,
    ) -> None:
        if failures_to_open < 1 or not 0 < first_backoff_s <= max_backoff_s or not 0 <= jitter < 1:
            raise ValueError("failures_to_open >= 1, 0 < first_backoff_s <= max_backoff_s, 0 <= jitter < 1")
        self._clock = clock
        self._failures_to_open = failures_to_open
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._jitter = jitter
        self._random = random.Random(seed)  # noqa: S311 - spreads retries; no secret
        self._lock = threading.Lock()
        self._state = HealthState.CLOSED
        self._failures_in_a_row = 0
        self._backoff_s = first_backoff_s
        self._retry_at = 0.0
        self.failures = 0
        self.times_opened = 0
        """CLOSED to OPEN, failed retries not counted."""
        self.retries = 0
        self.last_fault: str | None = None
        self.on_change: Callable[[], None] | None = None
        """Called after it became available, or ceased to be, by the thread that made it so."""

    @property
    def state(self) -> HealthState:
        return self._state

    @property
    def is_available(self) -> bool:
        """Say whether it is CLOSED: ordinary use is fine."""
        return self._state is HealthState.CLOSED

    def may_try(self) -> bool:
        """Say whether the caller may use the tier now.

        When a back-off has just ended one caller is told True, and owes ``succeeded`` or ``failed``.
        """
        with self._lock:
            if self._state is HealthState.CLOSED:
                return True
            if self._state is HealthState.HALF_OPEN or self._clock.now() < self._retry_at:
                return False
            self._state = HealthState.HALF_OPEN
            self.retries += 1
            return True

    def would_let_in(self) -> bool:
        """Say whether ``may_try`` would say True; nobody is let in by asking."""
        return self.is_available or self.retry_in_s() == 0.0

    def retry_in_s(self) -> float | None:
        """Return how long the back-off still lasts; None while CLOSED or while a retry is on its way."""
        with self._lock:
            if self._state is not HealthState.OPEN:
                return None
            return max(0.0, self._retry_at - self._clock.now())

    def succeeded(self) -> None:
        """Note that the tier worked.

        While OPEN this is a straggler's success, from before the failure: it changes nothing.
        """
        with self._lock:
            if self._state is HealthState.OPEN:
                return
            has_changed = self._state is not HealthState.CLOSED
            self._state = HealthState.CLOSED
            self._failures_in_a_row = 0
            self._backoff_s = self._first_backoff_s
        if has_changed:
            self._tell()

    def failed(self, fault: str) -> None:
        """Note a failure that is the tier's own. ``fault`` is for operators: no path, address or secret."""
        with self._lock:
            self.failures += 1
            self.last_fault = fault
            self._failures_in_a_row += 1
            if self._state is HealthState.OPEN:
                return  # a straggler's failure does not lengthen the back-off
            has_changed = self._state is HealthState.CLOSED
            if not has_changed:
                self._backoff_s = min(2 * self._backoff_s, self._max_backoff_s)
            elif self._failures_in_a_row < self._failures_to_open:
                return
            else:
                self.times_opened += 1
            self._state = HealthState.OPEN
            spread = 1 + self._jitter * (2 * self._random.random() - 1)
            self._retry_at = self._clock.now() + self._backoff_s * spread
        if has_changed:
            self._tell()

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def __repr__(self) -> str:
        return f"Health({self._state.value} failures={self.failures} backoff={self._backoff_s:g}s)"
