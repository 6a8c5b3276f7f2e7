"""An engine's state, and waiting for it."""

from __future__ import annotations

import asyncio
import logging

from server.engine.interface import EngineState

__all__ = ["StateCell"]

log = logging.getLogger(__name__)


class StateCell:
    """Holds an ``EngineState``. Event loop's thread only."""

    __slots__ = ("_value", "_waiters")

    def __init__(self, value: EngineState = EngineState.LOADING) -> None:
        self._value = value
        self._waiters: dict[EngineState, list[asyncio.Future[None]]] = {}

    @property
    def value(self) -> EngineState:
        return self._value

    def set(self, value: EngineState) -> None:
        """Change the state and wake who waits for it, even if it changes again before they run."""
        self._change(value, value.value)

    def stop(self) -> None:
        """It is DEAD, because it was asked to end."""
        self._change(EngineState.DEAD, "stopped")

    def _change(self, value: EngineState, word: str) -> None:
        if value is self._value:
            return
        log.info("engine is %s", word)
        self._value = value
        for waiter in self._waiters.pop(value, []):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, value: EngineState) -> None:
        """Return at once if the state is ``value``, otherwise when it becomes so."""
        if value is self._value:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(value, []).append(waiter)
        try:
            await waiter
        finally:
            waiters = self._waiters.get(value, [])
            if waiter in waiters:
                waiters.remove(waiter)
