"""Read what a client sends: one message, or a stream of them; parsed, and checked for what parsing loses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message
from grpc import aio

from server.rpc.errors import DeadlinePassed, InvalidArgument
from server.rpc.wire import MAX_MESSAGES, find_flood, find_overflow

__all__ = ["RequestStream", "TimeLimit", "read_one"]

Context = aio.ServicerContext[Any, Any]
Parse = Callable[[bytes], Message]


class TimeLimit:
    """Ends the current task when its time is over. One timer, looked at again only when it fires.

    When it fires, the task is cancelled; :meth:`is_cause` tells that apart from a cancellation by others.
    Costs a tenth of ``asyncio.timeout``, and there is one per call.
    """

    __slots__ = ("_at_s", "_has_expired", "_loop", "_task", "_timer")

    def __init__(self, limit_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._has_expired = False
        self._at_s = self._loop.time() + limit_s
        self._timer = self._loop.call_at(self._at_s, self._check)

    def extend(self, by_s: float) -> None:
        """Let the time be over so much later."""
        self._at_s += by_s

    def is_cause(self) -> bool:
        """Say, once the task has got a ``CancelledError``, whether this limit alone was the cause."""
        return self._has_expired and self._task.uncancel() == 0

    def close(self) -> None:
        """Let the task run on. Idempotent."""
        self._timer.cancel()

    def _check(self) -> None:
        if self._loop.time() < self._at_s:
            self._timer = self._loop.call_at(self._at_s, self._check)
            return
        self._has_expired = True
        self._task.cancel()


async def read_one(context: Context, parse: Parse) -> Message:
    """Read exactly one message. Raises :class:`InvalidArgument`."""
    raw = await context.read()
    if raw is aio.EOF:
        raise InvalidArgument.of("request", "no message was sent")
    if await context.read() is not aio.EOF:
        raise InvalidArgument.of("request", "more than one message was sent")
    request = _parsed(raw, parse)
    overflow = find_overflow(request, raw)
    if overflow is not None:
        raise _cut(overflow)
    return request


class RequestStream:
    """The messages of one call, as an async iterator, for one reader.

    The first must come in time; between later ones a client may wait as long as the call's deadline lets it.
    What does not parse ends the stream with :class:`InvalidArgument`.
    """

    def __init__(self, context: Context, parse: Parse, *, first_timeout_s: float) -> None:
        self._context = context
        self._parse = parse
        self._first_timeout_s: float | None = first_timeout_s
        self.fault: InvalidArgument | None = None
        """What is wrong with the message that was returned last, although it parses. The stream may go on."""

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Any:
        raw = await (self._first() if self._first_timeout_s is not None else self._context.read())
        if raw is aio.EOF:
            raise StopAsyncIteration
        request = _parsed(raw, self._parse)
        overflow = find_overflow(request, raw)
        self.fault = None if overflow is None else _cut(overflow)
        return request

    async def _first(self) -> Any:
        try:
            async with asyncio.timeout(self._first_timeout_s):
                raw = await self._context.read()
        except TimeoutError as error:
            raise DeadlinePassed("the request did not arrive in time") from error
        self._first_timeout_s = None
        return raw


def _parsed(raw: Any, parse: Parse) -> Message:
    # Generated code parses with a method of the message's class.
    message_type = getattr(parse, "__self__", None)
    if isinstance(message_type, type) and issubclass(message_type, Message):
        flood = find_flood(message_type.DESCRIPTOR, raw)
        if flood is not None:
            raise InvalidArgument.of(flood, f"must have at most {MAX_MESSAGES} items")
    try:
        return parse(raw)
    except Exception as error:  # DecodeError, and whatever else a parser makes of hostile bytes
        raise InvalidArgument.of("request", "is not a valid message") from error


def _cut(path: str) -> InvalidArgument:
    return InvalidArgument.of(path, "does not fit 32 bits")
