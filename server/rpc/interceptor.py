"""The one place where calls begin and end: authentication, reading the request, time limits, statuses.

Every unary request is taken as a stream of raw messages, for three reasons: a call without a good key is
refused before its message is read; a message that never comes, or comes twice, is noticed; and bytes that do
not parse answer INVALID_ARGUMENT instead of UNKNOWN with a parser's text. Servicers still look like
those of the generated code: ``async def Method(self, request, context)``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
from grpc import aio

from server.rpc.auth import Authenticator
from server.rpc.call import Call, CallObserver, current_call
from server.rpc.errors import CallError, DeadlinePassed, InternalError, InvalidArgument, trailing_metadata
from server.rpc.wire import find_overflow

__all__ = ["CallInterceptor", "CallLimits"]

_log = logging.getLogger(__name__)
_HEALTH = "/grpc.health.v1.Health/"
_OURS = "/kvserve."
_ABORT_TIMEOUT_S = 1.0
"""How long the status may wait behind messages that the client does not read, before the stream is reset."""

Handler = Callable[[Any, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Times, in seconds, that a call may take."""

    receive_timeout_s: float = 2.0
    """From the headers to the end of the request message."""
    max_call_s: float = 3600.0
    """Deadline of calls that name none, or a later one."""


class CallInterceptor(aio.ServerInterceptor):
    """Wraps every method of the kvserve services. Health stays open; other services need a key as well."""

    def __init__(
        self, authenticator: Authenticator, *, limits: CallLimits, observers: Sequence[CallObserver] = ()
    ) -> None:
        self._authenticator = authenticator
        self._limits = limits
        self._observers = tuple(observers)
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_active(self) -> int:
        """Return how many calls are being served."""
        return self._num_active

    async def wait_idle(self) -> None:
        """Return when no call is being served."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler for one call; runs when its headers have arrived."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # None: the method is unknown; the core answers UNIMPLEMENTED.
        if handler is None or method.startswith(_HEALTH):
            return handler
        metadata = tuple(handler_call_details.invocation_metadata or ())
        try:
            caller = self._authenticator.authenticate(metadata, method)
        except CallError as error:
            return self._refusing(error)
        if not method.startswith(_OURS):
            return handler
        serve = handler.unary_stream if handler.response_streaming else handler.unary_unary
        parse = handler.request_deserializer

        async def behaviour(_requests: object, context: aio.ServicerContext[Any, Any]) -> Any:
            call = Call(method, caller)
            async with self._guard(call, context, metadata):
                request = await self._receive(call, context, parse)
                return await cast("Handler", serve)(request, context)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        wrapped: grpc.RpcMethodHandler[Any, Any] = cast("Any", make)(
            behaviour, None, handler.response_serializer
        )
        return wrapped

    def _refusing(self, error: CallError) -> grpc.RpcMethodHandler[Any, Any]:
        async def behaviour(_requests: object, context: aio.ServicerContext[Any, Any]) -> None:
            await _abort(context, error)

        handler: grpc.RpcMethodHandler[Any, Any] = cast("Any", grpc.stream_stream_rpc_method_handler)(
            behaviour, None, None
        )
        return handler

    @asynccontextmanager
    async def _guard(
        self,
        call: Call,
        context: aio.ServicerContext[Any, Any],
        metadata: tuple[tuple[str, str | bytes], ...],
    ) -> AsyncIterator[None]:
        """Count and observe a call, hold it to its deadline, and turn what it raises into a status."""
        left_s = cast("float | None", context.time_remaining())
        limit_s = self._limits.max_call_s if left_s is None else min(left_s, self._limits.max_call_s)
        call.deadline_s = call.started_s + limit_s
        current_call.set(call)
        code = grpc.StatusCode.OK
        self._enter(call, metadata)
        try:
            try:
                async with asyncio.timeout(limit_s) as limit:
                    yield
            except TimeoutError as error:
                # Not by the clock: the event loop's timers may be a moment early.
                if not limit.expired():  # somebody else's timeout: nobody should let one through
                    raise
                raise DeadlinePassed("the deadline passed before the call finished") from error
        except CallError as error:
            code = error.code
            await _abort(context, error)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED if call.remaining_s() else grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        except Exception:  # noqa: BLE001 - the last place where it can be told from a good end
            code = grpc.StatusCode.INTERNAL
            reference = call.request_id or secrets.token_hex(8)
            _log.exception("call failed", extra={"request_id": reference, "method": call.method})
            await _abort(context, InternalError(f"internal error; reference {reference}"))
        finally:
            self._leave(call, code)

    def _enter(self, call: Call, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self._num_active += 1
        self._idle.clear()
        for observer in self._observers:
            observer.begin(call, metadata)

    def _leave(self, call: Call, code: grpc.StatusCode) -> None:
        for observer in self._observers:
            observer.end(call, code)
        self._num_active -= 1
        if self._num_active == 0:
            self._idle.set()

    async def _receive(
        self, call: Call, context: aio.ServicerContext[Any, Any], parse: Callable[[bytes], Any] | None
    ) -> Any:
        """Read exactly one message and parse it."""
        try:
            async with asyncio.timeout(self._limits.receive_timeout_s):
                raw = await context.read()
                if raw is aio.EOF:
                    raise InvalidArgument.of("request", "no message was sent")
                if await context.read() is not aio.EOF:
                    raise InvalidArgument.of("request", "more than one message was sent")
        except TimeoutError as error:
            raise DeadlinePassed("the request did not arrive in time") from error
        assert parse is not None
        try:
            request = parse(raw)
        except Exception as error:  # DecodeError, and whatever else a parser makes of hostile bytes
            raise InvalidArgument.of("request", "is not a valid message") from error
        overflow = find_overflow(request, raw)
        if overflow is not None:
            raise InvalidArgument.of(overflow, "does not fit 32 bits")
        call.received_s = time.perf_counter()
        return request


async def _abort(context: aio.ServicerContext[Any, Any], error: CallError) -> None:
    """End the call with an error's status and details. Raises what ``context.abort`` raises."""
    try:
        async with asyncio.timeout(_ABORT_TIMEOUT_S):
            await context.abort(error.code, error.message, cast("Any", trailing_metadata(error)))
    except TimeoutError:
        # The client takes nothing more: returning without a status resets the stream.
        _log.info("the client does not read; stream reset", extra={"code": error.code.name})
        raise asyncio.CancelledError from error
