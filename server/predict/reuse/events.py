"""Log lines of what happens to reuse."""

from __future__ import annotations

import logging

from server.predict.messages import EventKind, ReuseEvent

__all__ = ["log_event"]


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
