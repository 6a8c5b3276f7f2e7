"""What the streams about the cache and the models know, whichever client reads them.

Like a generate stream, each of them owns its call: entering the block starts it, leaving the block ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from kvserve._cache_convert import event_from_pb
from kvserve._cache_results import CacheEvent, CacheEventKind
from kvserve._calls import Call
from kvserve._errors import Internal, MisuseError
from kvserve._models_convert import reuse_event_from_pb
from kvserve._models_results import ReuseEvent
from kvserve.v1 import cache_admin_pb2 as pb

__all__ = ["CacheWatchState", "Event", "ProgressState", "ReuseWatchState", "Step", "WatchState"]


class _Step(Protocol):
    @property
    def done(self) -> bool: ...


Step = TypeVar("Step", bound=_Step)
Event = TypeVar("Event")


class ProgressState(Generic[Step]):
    """The part of a long call that does no input or output. Base of ``Progress`` and ``AsyncProgress``."""

    def __init__(self, call: Call[Any, Any], convert: Callable[[Any], Step]) -> None:
        self._call = call
        self._convert = convert
        self._last: Step | None = None

    @property
    def last(self) -> Step | None:
        """Return the newest step; None before the first."""
        return self._last

    @property
    def result(self) -> Step:
        """Return the last step of all. Raises ``MisuseError`` before the work was seen to end."""
        if self._last is None or not self._last.done:
            raise MisuseError("no result: the work was not watched to its end; .last is what came so far")
        return self._last

    @property
    def is_finished(self) -> bool:
        """Return whether the work was seen to end."""
        return self._last is not None and self._last.done

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._call.method.name}: {self._last}>"

    def _add(self, message: Any) -> Step:
        self._last = self._convert(message)
        return self._last

    def _check_complete(self) -> None:
        """Raise ``Internal`` if the server ended the stream without its last message."""
        if not self.is_finished:
            raise Internal("the server ended the call without its last message")


class WatchState(Generic[Event]):
    """The part of a watch that does no input or output. Base of all watches."""

    def __init__(self, call: Call[Any, Any]) -> None:
        self._call = call
        self._num_lost = 0

    @property
    def num_lost(self) -> int:
        """Return how many events this watcher should have got so far and did not."""
        return self._num_lost

    def _add(self, message: Any) -> tuple[Event, ...]:
        """Return what this message tells the reader."""
        raise NotImplementedError


class ReuseWatchState(WatchState[ReuseEvent]):
    """A watch of reuse: its server counts what is lost."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.num_lost} lost>"

    def _add(self, message: pb.ReuseEvent) -> tuple[ReuseEvent, ...]:
        self._num_lost += message.num_lost
        return (reuse_event_from_pb(message),)


class CacheWatchState(WatchState[CacheEvent]):
    """A watch of the cache.

    It holds the server to its word. Without filters every event of the engine should come, so that a gap in
    the sequence is a loss, also where the server didn't count it. A new epoch means that the engine started
    again; a RESET tells the reader, whatever kinds it asked for, if the server's own was filtered or lost.
    """

    def __init__(self, call: Call[pb.WatchCacheRequest, pb.CacheEvent]) -> None:
        super().__init__(call)
        self._gets_all = not call.request.kinds and not call.request.namespace
        self._epoch: int | None = None
        self._sequence: int | None = None
        """Of the newest event; None where the next one has no predecessor to be counted from."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: epoch {self._epoch} at {self._sequence}, {self._num_lost} lost>"

    def _add(self, message: pb.CacheEvent) -> tuple[CacheEvent, ...]:
        """Return what this message tells the reader: one event, or two after a restart of the engine."""
        num_lost = message.num_lost
        is_new_epoch = self._epoch is not None and message.epoch != self._epoch
        if self._gets_all and not is_new_epoch and self._sequence is not None:
            num_lost = message.num_lost = max(num_lost, message.sequence - self._sequence - 1)
        self._num_lost += num_lost
        # A RESET is the server's word, and need not be numbered as the engine's are.
        is_reset = message.kind == pb.CACHE_EVENT_KIND_RESET
        self._epoch, self._sequence = message.epoch, None if is_reset else message.sequence
        event = event_from_pb(message)
        if is_new_epoch and not is_reset:
            reset = CacheEvent(
                sequence=event.sequence, epoch=event.epoch, kind=CacheEventKind.RESET, time_s=event.time_s
            )
            return (reset, event)
        return (event,)
