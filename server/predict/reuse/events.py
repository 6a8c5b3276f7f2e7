"""What happens to reuse, told to the log and to whoever listens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from server.predict.messages import EventKind, ReuseEvent

__all__ = ["EventBox", "log_event"]


class EventBox:
    """Keeps events while a lock is held and tells them without it: whoever listens may ask for a report."""

    def __init__(self, lock: threading.Lock, log: logging.Logger, tell: Callable[[ReuseEvent], None]) -> None:
        self._lock = lock
        self._log = log
        self._tell = tell
        self._events: list[ReuseEvent] = []

    def put(self, event: ReuseEvent) -> None:
        """Keep an event. With the lock."""
        self._events.append(event)

    def empty(self) -> None:
        """Tell what is kept. Without the lock."""
        if not self._events:
            return
        with self._lock:
            events, self._events = self._events, []
        for event in events:
            log_event(self._log, event)
            self._tell(event)


def log_event(log: logging.Logger, event: ReuseEvent) -> None:
    """Write it: a broken budget as a warning, the rest as information, lifetimes of keys for debugging.

    Warnings are for all keys together: single ones can be thousands, and have been cut already.
    """
    where = f"{event.model}/{event.version} {event.policy}" + (f" key {event.key}" if event.key else "")
    if event.interval is not None:
        level = logging.WARNING if event.kind is EventKind.ALARM and not event.key else logging.INFO
        log.log(
            level,
            "reuse %s: %s: %s is %.4g (%.4g to %.4g), the limit %.4g",
            event.kind.value,
            where,
            event.measure,
            event.interval.estimate,
            event.interval.lower,
            event.interval.upper,
            event.limit,
        )
        return
    # 0 is both no reuse and no end; which of them, the kind says.
    no_number = "0 s" if event.kind is EventKind.STOPPED else "without end"
    log.log(
        logging.DEBUG if event.key else logging.INFO,
        "reuse %s: %s: lifetime %s",
        event.kind.value,
        where,
        f"{event.lifetime_s:g} s" if event.lifetime_s else no_number,
    )
