"""Calls that are followed while they run, blocking: work in steps, and watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self

from kvserve._cache_streams import Event, ProgressState, Step, WatchState
from kvserve._calls import Call
from kvserve._errors import MisuseError
from kvserve._transport import Responses, Transport

__all__ = ["Progress", "Watch"]


class Progress(ProgressState[Step], Generic[Step]):
    """Work that takes its time: wait for the result, or follow it step by step.

    ``result = client.cache.warm(...).wait()``, or ``with client.cache.warm(...) as steps`` and
    ``for step in steps``. Nothing happens before either. Leaving the block before the end ends the call,
    and so the work.
    """

    def __init__(self, call: Call[Any, Any], convert: Callable[[Any], Step], transport: Transport) -> None:
        super().__init__(call, convert)
        self._transport = transport
        self._responses: Responses[Any] | None = None

    def __enter__(self) -> Self:
        if self._responses is not None:
            raise MisuseError("this work was started already; call the method again")
        self._responses = self._transport.stream(self._call)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Step]:
        """Iterate over the steps. Raises ``kvserve.Error``; ``Cancelled`` after ``cancel()``."""
        if self._responses is None:
            raise MisuseError("open it first: with client.cache.warm(...) as steps; or wait()")
        return self._steps(self._responses)

    def _steps(self, responses: Responses[Any]) -> Iterator[Step]:
        try:
            while (message := responses.read()) is not None:
                yield self._add(message)
            self._check_complete()
        finally:
            responses.cancel()

    def wait(self) -> Step:
        """Wait for the end and return the result; starts the work if its block was not entered."""
        if self._responses is None:
            with self:
                return self.wait()
        if not self.is_finished:
            for _ in self:
                pass
        return self.result

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        if self._responses is not None:
            self._responses.cancel()


class Watch(WatchState[Event], Generic[Event]):
    """What happens from now on; a call that ends only when its block is left.

    Use it as ``with ... as events`` and ``for event in events``.
    ``Unavailable`` says that the server or the connection went: what was seen so far may be out of date.
    """

    def __init__(self, call: Call[Any, Any], transport: Transport) -> None:
        super().__init__(call)
        self._transport = transport
        self._responses: Responses[Any] | None = None

    def __enter__(self) -> Self:
        if self._responses is not None:
            raise MisuseError("a watch can be entered only once; call watch() again")
        self._responses = self._transport.stream(self._call)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Event]:
        """Iterate over the events. Raises ``kvserve.Error``; ``Cancelled`` after ``cancel()``."""
        if self._responses is None:
            raise MisuseError("open the watch first: with client.cache.watch(...) as events")
        return self._events(self._responses)

    def _events(self, responses: Responses[Any]) -> Iterator[Event]:
        try:
            while (message := responses.read()) is not None:
                yield from self._add(message)
        finally:
            responses.cancel()

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        if self._responses is not None:
            self._responses.cancel()
