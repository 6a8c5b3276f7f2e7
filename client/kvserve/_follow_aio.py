"""Calls that are followed while they run, for asyncio: work in steps, and watches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Self

from kvserve._cache_streams import Event, ProgressState, Step, WatchState
from kvserve._calls import Call
from kvserve._errors import MisuseError
from kvserve._transport import AsyncResponses, AsyncTransport

__all__ = ["AsyncProgress", "AsyncWatch"]


class AsyncProgress(ProgressState[Step], Generic[Step]):
    """Work that takes its time: await it for the result, or follow it step by step.

    ``result = await client.cache.warm(...)``, or ``async with client.cache.warm(...) as steps`` and
    ``async for step in steps``. Leaving the block before the end ends the call, and so the work.
    """

    def __init__(
        self, call: Call[Any, Any], convert: Callable[[Any], Step], transport: AsyncTransport
    ) -> None:
        super().__init__(call, convert)
        self._transport = transport
        self._responses: AsyncResponses[Any] | None = None

    async def __aenter__(self) -> Self:
        if self._responses is not None:
            raise MisuseError("this work was started already; call the method again")
        self._responses = self._transport.stream(self._call)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[Step]:
        """Iterate over the steps. Raises ``kvserve.Error``; ``Cancelled`` after ``cancel()``."""
        if self._responses is None:
            raise MisuseError("open it first: async with client.cache.warm(...) as steps; or await it")
        return self._steps(self._responses)

    async def _steps(self, responses: AsyncResponses[Any]) -> AsyncIterator[Step]:
        try:
            while (message := await responses.read()) is not None:
                yield self._add(message)
            self._check_complete()
        finally:
            responses.cancel()

    async def wait(self) -> Step:
        """Wait for the end and return the result; starts the work if its block was not entered.

        Cancelling the task outside a block ends the work.
        """
        if self._responses is None:
            async with self:
                return await self.wait()
        if not self.is_finished:
            async for _ in self:
                pass
        return self.result

    def __await__(self) -> Generator[Any, None, Step]:
        return self.wait().__await__()

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        if self._responses is not None:
            self._responses.cancel()


class AsyncWatch(WatchState[Event], Generic[Event]):
    """What happens from now on; a call that ends only when its block is left.

    Use it as ``async with ... as events`` and ``async for event in events``.
    ``Unavailable`` says that the server or the connection went: what was seen so far may be out of date.
    """

    def __init__(self, call: Call[Any, Any], transport: AsyncTransport) -> None:
        super().__init__(call)
        self._transport = transport
        self._responses: AsyncResponses[Any] | None = None

    async def __aenter__(self) -> Self:
        if self._responses is not None:
            raise MisuseError("a watch can be entered only once; call watch() again")
        self._responses = self._transport.stream(self._call)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[Event]:
        """Iterate over the events. Raises ``kvserve.Error``; ``Cancelled`` after ``cancel()``."""
        if self._responses is None:
            raise MisuseError("open the watch first: async with client.cache.watch(...) as events")
        return self._events(self._responses)

    async def _events(self, responses: AsyncResponses[Any]) -> AsyncIterator[Event]:
        try:
            while (message := await responses.read()) is not None:
                for event in self._add(message):
                    yield event
        finally:
            responses.cancel()

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        if self._responses is not None:
            self._responses.cancel()
