"""What happens by the clock: deadlines of calls wherever they are, statistics, and events of reuse.

Waiting inputs are also dropped by the compute thread before each batch; this thread sees to the rest: calls
that wait for a model or a tokenizer, and those that expire while a long batch is computed.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from kvcore.clock import Clock
from server.predict.calls import OpenCall
from server.predict.deadlines import Deadlines
from server.predict.messages import EventKind, FromPredict, PredictStats, ReuseEvent, ReuseEvents

__all__ = ["Housekeeper"]

log = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0
MAX_EVENTS = 4096
"""So many wait to be sent; of more the newest are lost, and counted."""


class Housekeeper:
    """A thread. ``lock`` is the host's, and guards ``deadlines`` too."""

    def __init__(
        self,
        lock: threading.Lock,
        clock: Clock,
        *,
        deadlines: Deadlines[OpenCall],
        expire: Callable[[Sequence[OpenCall]], None],
        send: Callable[[FromPredict], None],
        stats: Callable[[], PredictStats],
    ) -> None:
        """``expire``, ``send`` and ``stats`` are called without the lock."""
        self._clock = clock
        self._deadlines = deadlines
        self._expire = expire
        self._send = send
        self._stats = stats
        self._changed = threading.Condition(lock)
        self._events_lock = threading.Lock()
        self._events: deque[ReuseEvent] = deque()
        self._num_lost = 0
        self._wakes_s = 0.0
        """When it wakes by itself; with the lock."""
        self._has_news = False
        self._is_closed = False
        self._last_stats: PredictStats | None = None
        self._next_stats_s = clock.now()
        self._thread = threading.Thread(target=self._run, name="predict-housekeeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake_by(self, deadline_s: float) -> None:
        """Be awake at a deadline. With the lock held."""
        if deadline_s < self._wakes_s:
            self._changed.notify()

    def wake(self) -> None:
        """Look at once. Without the lock."""
        with self._changed:
            self._has_news = True
            self._changed.notify()

    def note_event(self, event: ReuseEvent) -> None:
        """Pass an event on, soon and with others. Any thread, without the lock."""
        with self._events_lock:
            if len(self._events) < MAX_EVENTS:
                self._events.append(event)
            else:
                self._num_lost += 1
        self.wake()

    def close(self) -> None:
        """Send what is left and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                now_s = self._clock.now()
                due = self._deadlines.due(now_s)
                if not due and not self._has_news and not self._is_closed:
                    self._wait(now_s)
                is_closed = self._is_closed
                self._has_news = False
            try:
                self._expire(due)
                self._send_events()
                self._send_stats(is_last=is_closed)
            except Exception:
                log.exception("housekeeping failed")
            if is_closed:
                return

    def _wait(self, now_s: float) -> None:
        self._wakes_s = self._next_stats_s if self._next_stats_s > now_s else now_s + STATS_INTERVAL_S
        if (deadline_s := self._deadlines.first_s) is not None:
            self._wakes_s = min(self._wakes_s, deadline_s)
        self._changed.wait(self._wakes_s - now_s)

    def _send_events(self) -> None:
        with self._events_lock:
            events, self._events = self._events, deque()
            num_lost, self._num_lost = self._num_lost, 0
        if num_lost:
            events.append(ReuseEvent(kind=EventKind.LOST, num_lost=num_lost))
        if events:
            self._send(ReuseEvents(tuple(events)))

    def _send_stats(self, *, is_last: bool) -> None:
        """Send a snapshot if it is time and it says something new."""
        now_s = self._clock.now()
        if now_s < self._next_stats_s and not is_last:
            return
        self._next_stats_s = now_s + STATS_INTERVAL_S
        stats = self._stats()
        if stats != self._last_stats:
            self._last_stats = stats
            self._send(stats)
