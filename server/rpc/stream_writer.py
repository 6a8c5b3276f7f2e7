"""Write to a client that may not read."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio

from server.rpc.errors import ReaderTooSlow

__all__ = ["StreamWriter"]


class StreamWriter:
    """Writes messages of one call, none of which may wait longer than a timeout for the client to take it.

    ``write`` returns when the transport has taken the message: while a slow client's window is full the
    caller waits, and what becomes ready meanwhile is merged behind it. One timer per call, not one per
    message: it is looked at again only when it fires.
    """

    def __init__(self, context: aio.ServicerContext[Any, Any], *, timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_since: float | None = None
        self._expired = False

    async def write(self, message: Any) -> None:
        """Hand over one message. Raises :class:`ReaderTooSlow` if the client takes nothing for too long."""
        self._waiting_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._check)
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            if self._expired and self._task is not None and self._task.uncancel() == 0:
                raise ReaderTooSlow("the client reads too slowly") from None
            raise
        finally:
            self._waiting_since = None

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._waiting_since is None:
            return  # the next write starts a new timer
        waited_s = self._loop.time() - self._waiting_since
        if waited_s < self._timeout_s:
            self._timer = self._loop.call_later(self._timeout_s - waited_s, self._check)
        elif self._task is not None:
            self._expired = True
            self._task.cancel()
