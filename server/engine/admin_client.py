"""The front end's side of operations on the cache: calls by key, watchers, nothing left behind.

::

    administer -- AdminCall --> engine          exactly one of: result, refusal, EngineUnavailableError
       ^  `---- CancelAdmin -->   |             (the caller left before the end)
       `--- AdminReply, AdminProgress
    watch  -- Watch(on) at the first, Watch(off) after the last; again on for every new engine process
       ^--- CacheEvents ----------'

Everything happens on the event loop's thread. A caller that does not read grows nothing: of progress the
latest is kept, of events as many as fit, and the gap shows in their sequence.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from server.engine.admin_messages import (
    AdminCall,
    AdminErrorKind,
    AdminOp,
    AdminProgress,
    AdminRefusal,
    AdminReply,
    AdminResult,
    CacheEvents,
    CancelAdmin,
    Watch,
)
from server.engine.errors import EngineUnavailableError
from server.engine.messages import FailureKind, ToEngine
from server.process.errors import FrameTooLargeError

__all__ = ["AdminClient"]

MAX_WAITING_EVENTS = 10_000
"""Events that may wait for a watcher; the oldest messages go first."""


class AdminClient:
    """The open operations and watchers of one engine. Draws the keys, and never the same one twice."""

    def __init__(self, send: Callable[[ToEngine], None], check_available: Callable[[], None]) -> None:
        """``send`` reaches the engine without blocking, and drops what an engine that is gone cannot get.

        ``check_available`` raises ``EngineUnavailableError`` while the engine takes no operations.
        """
        self._send = send
        self._check_available = check_available
        self._calls: dict[int, _Call] = {}
        self._watchers: dict[_Watcher, None] = {}
        self._keys = itertools.count(1)
        self._is_over = False

    @property
    def num_open(self) -> int:
        """Return how many operations await their result."""
        return len(self._calls)

    @property
    def num_watchers(self) -> int:
        """Return how many watch."""
        return len(self._watchers)

    async def administer(self, op: AdminOp) -> AdminResult:
        """See ``interface.Engine``."""
        async with aclosing(self.administer_with_progress(op)) as messages:
            async for message in messages:
                if not isinstance(message, AdminProgress):
                    return message
        raise AssertionError("an operation ended without a result")

    async def administer_with_progress(self, op: AdminOp) -> AsyncGenerator[AdminProgress | AdminResult]:
        """See ``interface.Engine``."""
        self._check_available()
        call = _Call(next(self._keys))
        try:
            self._send(AdminCall(call.key, op))
        except FrameTooLargeError:
            yield AdminRefusal(AdminErrorKind.INVALID, "the request is too large", "request")
            return
        self._calls[call.key] = call
        try:
            while True:
                message = await call.next()
                yield message
                if not isinstance(message, AdminProgress):
                    return
        finally:
            if self._calls.pop(call.key, None) is not None and not call.is_ended:
                self._send(CancelAdmin(call.key))

    async def watch(self) -> AsyncGenerator[CacheEvents]:
        """See ``interface.Engine``."""
        if self._is_over:
            return
        watcher = _Watcher()
        self._watchers[watcher] = None
        # Also when it is on already: the announcement tells this watcher where its events begin.
        self._send(Watch(is_on=True))
        try:
            while (events := await watcher.next()) is not None:
                yield events
        finally:
            self._watchers.pop(watcher, None)
            if not self._watchers and not self._is_over:
                self._send(Watch(is_on=False))

    def dispatch(self, message: AdminReply | AdminProgress | CacheEvents) -> None:
        """Hand a message of the engine to those whom it concerns."""
        if isinstance(message, CacheEvents):
            for watcher in self._watchers:
                watcher.push(message)
            return
        call = self._calls.get(message.key)
        if call is None:
            return  # its caller has gone
        if isinstance(message, AdminReply):
            call.end(message.result)
        else:
            call.push(message)

    def engine_is_ready(self) -> None:
        """Another engine process has taken over: it shall tell its events, too."""
        if self._watchers:
            self._send(Watch(is_on=True))

    def fail_all(self, kind: FailureKind, reason: str) -> None:
        """End every open operation with ``EngineUnavailableError``: nobody will answer any more."""
        for call in list(self._calls.values()):
            call.end(EngineUnavailableError(kind, reason))

    def close(self) -> None:
        """The engine will not come back: end the watches. Operations are failed by ``fail_all``."""
        self._is_over = True
        for watcher in self._watchers:
            watcher.close()


class _Call:
    """One open operation: the latest progress, then the end."""

    __slots__ = ("_end", "_progress", "_waiter", "key")

    def __init__(self, key: int) -> None:
        self.key = key
        self._progress: AdminProgress | None = None
        self._end: AdminResult | EngineUnavailableError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_ended(self) -> bool:
        return self._end is not None

    async def next(self) -> AdminProgress | AdminResult:
        while self._progress is None and self._end is None:
            await self._wait()
        if self._progress is not None:
            progress, self._progress = self._progress, None
            return progress
        assert self._end is not None
        if isinstance(self._end, EngineUnavailableError):
            raise self._end
        return self._end

    def push(self, progress: AdminProgress) -> None:
        self._progress = progress
        self._wake()

    def end(self, result: AdminResult | EngineUnavailableError) -> None:
        if self._end is None:
            self._end = result
            self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Watcher:
    """What waits for one watcher; bounded."""

    def __init__(self) -> None:
        self._waiting: deque[CacheEvents] = deque()
        self._num_events = 0
        self._has_begun = False
        self._is_closed = False
        self._news = asyncio.Event()

    async def next(self) -> CacheEvents | None:
        """Return what comes next; None at the end."""
        while not self._waiting:
            if self._is_closed:
                return None
            self._news.clear()
            await self._news.wait()
        message = self._waiting.popleft()
        self._num_events -= len(message.events)
        return message

    def push(self, message: CacheEvents) -> None:
        if not self._has_begun and message.events:
            return  # of an earlier watch
        if not message.events and self._waiting and not self._waiting[-1].events:
            self._waiting[-1] = message  # of several announcements in a row the last one says it all
        else:
            self._has_begun = True
            self._waiting.append(message)
            self._num_events += len(message.events)
        # Announcements are few beside what they announce: one per engine process or watcher.
        while self._num_events > MAX_WAITING_EVENTS and len(self._waiting) > 1:
            self._num_events -= len(self._waiting.popleft().events)
        self._news.set()

    def close(self) -> None:
        self._is_closed = True
        self._news.set()
