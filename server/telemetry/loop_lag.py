"""Measure how late the event loop is: what blocks it delays every stream at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

__all__ = ["watch_loop_lag"]

_log = logging.getLogger(__name__)
INTERVAL_S = 0.25
WARN_ABOVE_S = 0.5


async def watch_loop_lag(observe: Callable[[float], None]) -> None:
    """Report the lateness of a timer, four times a second, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        lag_s = max(0.0, loop.time() - due_s)
        observe(lag_s)
        if lag_s > WARN_ABOVE_S:
            _log.warning("event loop was blocked", extra={"lag_s": round(lag_s, 3)})
