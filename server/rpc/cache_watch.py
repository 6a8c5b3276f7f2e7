"""Events of the cache, from one engine to many watchers, each with its filter and its own pace.

::

    engine.watch() --> WatchHub --> Watcher (bounded queue) --> WatchCache stream
                          |   `---> Watcher ...
                          `- runs while anybody watches: the engine tells nothing otherwise

What a watcher reads too slowly is dropped, counted, and told with the next event that it gets. Events that
the engine itself could not tell (a gap in the sequence) count as lost for everybody: nobody knows which
filters they would have passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from kvserve.v1 import cache_admin_pb2 as pb
from server.engine.admin_messages import CacheEvents
from server.engine.interface import Engine
from server.rpc.cache_admin_convert import event_of, kind_of, reset_of
from server.rpc.cache_admin_read import WatchFilter
from server.rpc.errors import CallError, InternalError, Unavailable

__all__ = ["WatchHub", "WatchObserver", "Watcher"]

log = logging.getLogger(__name__)

MAX_WAITING_EVENTS = 4096


class WatchObserver(Protocol):
    """Sees watching: metrics."""

    def watchers(self, count: int) -> None:
        """Note how many watch now."""
        ...

    def watch_lost(self, count: int) -> None:
        """Note events that some watcher should have got and did not."""
        ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    event: pb.CacheEvent
    is_reset: bool = False


class Watcher:
    """One reader of events. Made by :class:`WatchHub`; give it back with ``leave``."""

    def __init__(self, wanted: WatchFilter, *, max_waiting: int) -> None:
        self._wanted = wanted
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting] = deque()
        self._num_lost = 0
        """Since the event queued last."""
        self._epoch: int | None = None
        self._end: CallError | None = None
        self._news = asyncio.Event()
        self.has_begun = asyncio.Event()
        """Set once every event from now on comes here."""

    async def next(self) -> pb.CacheEvent:
        """Wait for the next event. Raises a :class:`CallError` when there will be none any more."""
        while not self._waiting:
            if self._end is not None:
                raise self._end
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft().event

    def begin(self, epoch: int) -> None:
        """Note whose events come from here on: of another engine than before means that all is gone."""
        if self._epoch is not None and self._epoch != epoch and self._wants(pb.CACHE_EVENT_KIND_RESET):
            # It is never dropped: it replaces one that waits at the end, or the newest event there.
            if self._waiting and (self._waiting[-1].is_reset or len(self._waiting) >= self._max_waiting):
                replaced = self._waiting.pop()
                self._num_lost += replaced.event.num_lost + (not replaced.is_reset)
            self._push(_Waiting(reset_of(epoch=epoch, num_lost=self._num_lost), is_reset=True))
        self._epoch = epoch
        self.has_begun.set()

    def take(self, message: CacheEvents) -> int:
        """Queue what passes the filter; return how many events did not fit."""
        num_dropped = 0
        namespace = self._wanted.namespace
        for note in message.events:
            if (namespace and note.namespace != namespace) or not self._wants(kind_of(note)):
                continue
            if len(self._waiting) >= self._max_waiting:
                self._num_lost += 1
                num_dropped += 1
            else:
                self._push(_Waiting(event_of(note, epoch=message.epoch, num_lost=self._num_lost)))
        return num_dropped

    def lose(self, count: int) -> None:
        """Note events that the engine could not tell."""
        self._num_lost += count

    def end(self, error: CallError) -> None:
        """Let the reader have what waits, and then ``error``."""
        self._end = error
        self.has_begun.set()
        self._news.set()

    def _wants(self, kind: int) -> bool:
        return not self._wanted.kinds or kind in self._wanted.kinds

    def _push(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self._num_lost = 0
        self._news.set()


class WatchHub:
    """The watchers of one engine. Event loop's thread only."""

    def __init__(
        self, engine: Engine, *, observer: WatchObserver | None = None, max_waiting: int = MAX_WAITING_EVENTS
    ) -> None:
        """``max_waiting`` events may wait for each watcher."""
        self._engine = engine
        self._observer = observer
        self._max_waiting = max_waiting
        self._watchers: dict[Watcher, None] = {}
        self._follower: asyncio.Task[None] | None = None
        self._epoch: int | None = None
        self._last_sequence: int | None = None
        self._is_closed = False

    def join(self, wanted: WatchFilter) -> Watcher:
        """Return a watcher that gets events from now on (see ``Watcher.has_begun``)."""
        if self._is_closed:
            raise Unavailable("the server is shutting down", reason="DRAINING")
        watcher = Watcher(wanted, max_waiting=self._max_waiting)
        self._watchers[watcher] = None
        if self._follower is None:
            self._epoch = self._last_sequence = None
            self._follower = asyncio.create_task(self._follow(), name="cache-watch")
        elif self._epoch is not None:
            watcher.begin(self._epoch)
        self._say_watchers()
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """Forget a watcher; the last one switches the engine's events off. Idempotent."""
        self._watchers.pop(watcher, None)
        if not self._watchers and self._follower is not None:
            self._follower.cancel()
            self._follower = None
        self._say_watchers()

    async def close(self) -> None:
        """End all watchers: the server is shutting down."""
        self._is_closed = True
        for watcher in self._watchers:
            watcher.end(Unavailable("the server is shutting down", reason="DRAINING"))
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower

    async def _follow(self) -> None:
        error: CallError = Unavailable("the engine is not running", reason="ENGINE_LOST")
        try:
            async with aclosing(self._engine.watch()) as messages:
                async for message in messages:
                    self._take(message)
        except Exception:
            log.exception("watching the cache failed")
            error = InternalError("watching the cache failed")
        # Cancelled, it does not come here: those who cancel it have looked after the watchers.
        self._follower = None
        for watcher in self._watchers:
            watcher.end(error)

    def _take(self, message: CacheEvents) -> None:
        if message.epoch != self._epoch:
            self._epoch, self._last_sequence = message.epoch, None
            for watcher in self._watchers:
                watcher.begin(message.epoch)
        if not message.events:
            return
        first, last = message.events[0].sequence, message.events[-1].sequence
        before = first - 1 if self._last_sequence is None else self._last_sequence
        num_missing = max(0, last - before - len(message.events))
        self._last_sequence = last
        num_lost = 0
        for watcher in self._watchers:
            if num_missing:
                watcher.lose(num_missing)
            num_lost += num_missing + watcher.take(message)
        if num_lost and self._observer is not None:
            self._observer.watch_lost(num_lost)

    def _say_watchers(self) -> None:
        if self._observer is not None:
            self._observer.watchers(len(self._watchers))
