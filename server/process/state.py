"""The state of what is kept running, and waiting for it."""

from __future__ import annotations

import asyncio
import logging
from enum import Enum
from typing import Generic, TypeVar

__all__ = ["StateCell"]

log = logging.getLogger(__name__)

StateT = TypeVar("StateT", bound=Enum)


class StateCell(Generic[StateT]):
    """Holds a member of an enum of states. Event loop's thread only."""

    __slots__ = ("_last", "_name", "_value", "_waiters")

    def __init__(self, value: StateT, *, last: StateT, name: str) -> None:
        """``last``: the state after its end, whether it was asked to end or not. ``name`` is for the log."""
        self._last = last
        self._name = name
        self._value = value
        self._waiters: dict[StateT, list[asyncio.Future[None]]] = {}

    @property
    def value(self) -> StateT:
        return self._value

    def set(self, value: StateT) -> None:
        """Change the state and wake who waits for it, even if it changes again before they run."""
        self._change(value, value.value)

    def stop(self) -> None:
        """It has ended, because it was asked to."""
        self._change(self._last, "stopped")

    async def wait(self, value: StateT) -> None:
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

    def _change(self, value: StateT, word: str) -> None:
        if value is self._value:
            return
        log.info("%s is %s", self._name, word)
        self._value = value
        for waiter in self._waiters.pop(value, []):
            if not waiter.done():
                waiter.set_result(None)
