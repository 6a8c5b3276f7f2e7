"""The one place where calls begin and end: authentication, reading the request, time limits, statuses.

Every request is taken as a stream of raw messages, for three reasons: a call without a good key is
refused before its message is read; a message that never comes, or comes twice, is noticed; and bytes that do
not parse answer INVALID_ARGUMENT instead of UNKNOWN with a parser's text. Servicers still look like
those of the generated code: ``async def Method(self, request, context)``, and
``async def Method(self, requests: RequestStream, context)`` where the client streams.

What is the same for all calls of a method is made once: the core takes a third of a millisecond of processor
time for a call, and what stands here adds to it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
from grpc import aio

from server.rpc.auth import Authenticator
from server.rpc.call import Call, CallObserver, current_call
from server.rpc.errors import CallError, DeadlinePassed, InternalError, trailing_metadata
from server.rpc.receiving import RequestStream, TimeLimit, read_one

__all__ = ["CallInterceptor", "CallLimits"]

_log = logging.getLogger(__name__)
_HEALTH = "/grpc.health.v1.Health/"
_OURS = ("/kvserve.", "/inference.")
_ABORT_TIMEOUT_S = 1.0
"""How long the status may wait behind messages that the client does not read, before the call is given up."""

Context = aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Any], Awaitable[Any]]
Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Times, in seconds, that a call may take."""

    receive_timeout_s: float = 2.0
    """From the headers to the end of the request message, or of the first one of a stream."""
    max_call_s: float = 3600.0
    """Deadline of calls that name none, or a later one."""


class CallInterceptor(aio.ServerInterceptor):
    """Wraps every method of our services. Health stays open; other services need a key as well."""

    def __init__(
        self, authenticator: Authenticator, *, limits: CallLimits, observers: Sequence[CallObserver] = ()
    ) -> None:
        self._authenticator = authenticator
        self._limits = limits
        self._observers = tuple(observers)
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
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
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        # None: the method is unknown; the core answers UNIMPLEMENTED.
        if handler is None or method.startswith(_HEALTH):
            return handler
        if not method.startswith(_OURS):
            try:
                self._authenticator.authenticate(
                    tuple(handler_call_details.invocation_metadata or ()), method
                )
            except CallError as error:
                return _refusing(error)
            return handler
        wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        serve = cast(
            "Handler",
            (
                (handler.stream_stream if handler.response_streaming else handler.stream_unary)
                if handler.request_streaming
                else (handler.unary_stream if handler.response_streaming else handler.unary_unary)
            ),
        )
        parse = cast("Any", handler.request_deserializer)
        receive_timeout_s = self._limits.receive_timeout_s

        async def serve_one(call: Call, context: Context, limit_s: float) -> Any:
            # Until the request is there, the time to receive it is the limit; from there on the call's own.
            wait_s = min(receive_timeout_s, limit_s)
            limit = TimeLimit(wait_s)
            is_received = False
            try:
                request = await read_one(context, parse)
                is_received = True
                limit.extend(limit_s - wait_s)
                call.received_s = time.perf_counter()
                return await serve(request, context)
            except asyncio.CancelledError:
                if not limit.is_cause():
                    raise
                if is_received or wait_s == limit_s:
                    raise _too_late() from None
                raise DeadlinePassed("the request did not arrive in time") from None
            finally:
                limit.close()

        async def serve_stream(call: Call, context: Context, limit_s: float) -> Any:
            limit = TimeLimit(limit_s)
            call.received_s = call.started_s
            try:
                requests = RequestStream(context, parse, first_timeout_s=receive_timeout_s)
                return await serve(requests, context)
            except asyncio.CancelledError:
                if not limit.is_cause():
                    raise
                raise _too_late() from None
            finally:
                limit.close()

        begin = serve_stream if handler.request_streaming else serve_one

        async def behaviour(_requests: object, context: Context) -> Any:
            # Nothing of the client's messages is read before this has run.
            metadata = cast("Metadata", tuple(context.invocation_metadata() or ()))
            try:
                caller = self._authenticator.authenticate(metadata, method)
            except CallError as error:
                await _abort(context, error)
                return None
            return await self._guard(Call(method, caller), context, metadata, begin)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        wrapped: grpc.RpcMethodHandler[Any, Any] = cast("Any", make)(
            behaviour, None, handler.response_serializer
        )
        return wrapped

    async def _guard(
        self,
        call: Call,
        context: Context,
        metadata: Metadata,
        serve: Callable[[Call, Context, float], Awaitable[Any]],
    ) -> Any:
        """Count and observe a call, give it its deadline, and turn what it raises into a status."""
        left_s = cast("float | None", context.time_remaining())
        limit_s = self._limits.max_call_s if left_s is None else min(left_s, self._limits.max_call_s)
        call.deadline_s = call.started_s + limit_s
        current_call.set(call)
        code = grpc.StatusCode.OK
        self._enter(call, metadata)
        try:
            return await serve(call, context, limit_s)
        except CallError as error:
            code = error.code
            await _abort(context, error)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED if call.remaining_s() else grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        except aio.InternalError as error:  # the core takes nothing more for this call: it is over
            code = grpc.StatusCode.CANCELLED if call.remaining_s() else grpc.StatusCode.DEADLINE_EXCEEDED
            _log.debug("the call had ended before it was answered", extra={"method": call.method})
            raise asyncio.CancelledError from error
        except Exception:  # noqa: BLE001 - the last place where it can be told from a good end
            code = grpc.StatusCode.INTERNAL
            reference = call.request_id or secrets.token_hex(8)
            _log.exception("call failed", extra={"request_id": reference, "method": call.method})
            await _abort(context, InternalError(f"internal error; reference {reference}"))
        finally:
            self._leave(call, code)

    def _enter(self, call: Call, metadata: Metadata) -> None:
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


def _too_late() -> DeadlinePassed:
    return DeadlinePassed("the deadline passed before the call finished")


def _refusing(error: CallError) -> grpc.RpcMethodHandler[Any, Any]:
    async def behaviour(_requests: object, context: Context) -> None:
        await _abort(context, error)

    handler: grpc.RpcMethodHandler[Any, Any] = cast("Any", grpc.stream_stream_rpc_method_handler)(
        behaviour, None, None
    )
    return handler


async def _abort(context: Context, error: CallError) -> None:
    """End the call with an error's status and details. Raises what ``context.abort`` raises."""
    try:
        async with asyncio.timeout(_ABORT_TIMEOUT_S):
            await context.abort(error.code, error.message, cast("Any", trailing_metadata(error)))
    except TimeoutError:
        # The client takes nothing more. The call ends here; what it has not read stays with the core until
        # it reads or the connection ends.
        _log.info("the client does not read; call given up", extra={"code": error.code.name})
        raise asyncio.CancelledError from error
    except aio.InternalError:  # the call is over for the core: nobody is there any more
        raise asyncio.CancelledError from error
