"""Calls over an asyncio gRPC channel."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from kvserve._calls import Call
from kvserve._config import ClientConfig
from kvserve._errors import Cancelled, Error, MisuseError, error_from_rpc
from kvserve._transport import channel_arguments, channel_credentials

__all__ = ["AsyncGrpcTransport"]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")


def _is_task_cancelled() -> bool:
    """Tell who was cancelled, this task or only the call: grpc.aio raises CancelledError for both.

    It does so even when the server answers with the status CANCELLED. An ``asyncio.CancelledError`` that
    nobody asked for would end the caller's task silently.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _cancelled() -> Error:
    return Cancelled("the call was cancelled")  # grpc.aio keeps no text of the server's.


class _GrpcResponses(Generic[Response]):
    """The answers of a running call."""

    def __init__(self, rpc: Any) -> None:
        self._rpc = rpc

    async def read(self) -> Response | None:
        try:
            message = await self._rpc.read()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        except asyncio.CancelledError:
            if _is_task_cancelled():
                raise
            raise _cancelled() from None
        return None if message is grpc.aio.EOF else message

    def cancel(self) -> None:
        self._rpc.cancel()


class _GrpcDuplex(_GrpcResponses[Response]):
    """A call that takes many requests."""

    async def write(self, request: Any, /) -> bool:
        try:
            await self._rpc.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        except asyncio.CancelledError:
            if _is_task_cancelled():
                raise
            return False
        return True

    async def end_writes(self) -> None:
        if not self._rpc.done():
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._rpc.done_writing()


class AsyncGrpcTransport:
    """One channel, made by the first call, because it belongs to the event loop that runs then."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._channel: grpc.aio.Channel | None = None
        self._closed = False
        self._running: set[Any] = set()
        """Calls that have not ended; closing a channel does not end them in every version of grpc.aio."""

    async def unary(self, call: Call[Any, Response], /) -> Response:
        try:
            response: Response = await self._start(call, self._open_channel().unary_unary)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        except asyncio.CancelledError:
            if _is_task_cancelled():
                raise
            raise _cancelled() from None
        return response

    def stream(self, call: Call[Any, Response], /) -> _GrpcResponses[Response]:
        return _GrpcResponses(self._start(call, self._open_channel().unary_stream))

    def duplex(self, call: Call[Request, Response], /) -> _GrpcDuplex[Response]:
        return _GrpcDuplex(self._start(call, self._open_channel().stream_stream, is_duplex=True))

    async def aclose(self) -> None:
        self._closed = True
        for rpc in list(self._running):
            rpc.cancel()
        if self._channel is not None:
            await self._channel.close()

    def _start(self, call: Call[Any, Any], kind: Any, *, is_duplex: bool = False) -> Any:
        method = kind(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.parse,
        )
        rpc = method(
            *(() if is_duplex else (call.request,)),
            timeout=call.timeout_s,
            metadata=call.metadata,
            wait_for_ready=call.wait_for_ready,
        )
        self._running.add(rpc)
        rpc.add_done_callback(self._running.discard)
        return rpc

    def _open_channel(self) -> grpc.aio.Channel:
        if self._closed:
            raise MisuseError("the client is closed")
        if self._channel is None:
            arguments = channel_arguments(self._config)
            self._channel = (
                grpc.aio.insecure_channel(self._config.target, arguments)
                if self._config.tls is None
                else grpc.aio.secure_channel(
                    self._config.target, channel_credentials(self._config.tls), arguments
                )
            )
        return self._channel
