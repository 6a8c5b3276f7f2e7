"""Events of reuse, for whoever watches. A slow watcher grows nothing: it is told how many it lost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable

from server.predict.messages import EventKind, ReuseEvent

__all__ = ["ReuseHub"]

MAX_WAITING_EVENTS = 1000
"""Events that may wait for a watcher; the oldest go first."""


class ReuseHub:
    """The watchers, over the lives of all predict processes. Event loop's thread only."""

    def __init__(self, *, max_waiting: int = MAX_WAITING_EVENTS) -> None:
        self._max_waiting = max_waiting
        self._watchers: dict[_Watcher, None] = {}
        self._is_over = False

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    async def watch(self) -> AsyncGenerator[ReuseEvent]:
        """See ``interface.PredictBackend``. Ends with ``close``, after what waits."""
        if self._is_over:
            return
        watcher = _Watcher(self._max_waiting)
        self._watchers[watcher] = None
        try:
            while (event := await watcher.next()) is not None:
                yield event
        finally:
            self._watchers.pop(watcher, None)

    def dispatch(self, events: Iterable[ReuseEvent]) -> None:
        """Hand events to every watcher."""
        for watcher in self._watchers:
            watcher.push(events)

    def close(self) -> None:
        """There will be no more events. Idempotent."""
        self._is_over = True
        for watcher in self._watchers:
            watcher.close()


class _Watcher:
    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: deque[ReuseEvent] = deque()
        self._num_lost = 0
        """Before those that wait."""
        self._is_closed = False
        self._news = asyncio.Event()

    async def next(self) -> ReuseEvent | None:
        while not self._waiting:
            if self._is_closed:
                return None
            self._news.clear()
            await self._news.wait()
        if self._num_lost:
            num_lost, self._num_lost = self._num_lost, 0
            return ReuseEvent(kind=EventKind.LOST, num_lost=num_lost)
        return self._waiting.popleft()

    def push(self, events: Iterable[ReuseEvent]) -> None:
        self._waiting.extend(events)
        while len(self._waiting) > self._max_waiting:
            gone = self._waiting.popleft()
            # The process may have lost some itself.
            self._num_lost += gone.num_lost if gone.kind is EventKind.LOST else 1
        self._news.set()

    def close(self) -> None:
        self._is_closed = True
        self._news.set()
