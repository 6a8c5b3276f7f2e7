"""Calls over a blocking gRPC channel."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from kvserve._calls import Call
from kvserve._config import ClientConfig
from kvserve._errors import Cancelled, MisuseError, error_from_rpc
from kvserve._transport import channel_arguments, channel_credentials

__all__ = ["GrpcTransport"]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")

_MAX_OUTGOING = 32
"""Requests of one call that wait for the wire; beyond that their writer waits."""


class _GrpcResponses(Generic[Response]):
    """The answers of a running call."""

    def __init__(self, rpc: Any) -> None:
        self._rpc = rpc

    def read(self) -> Response | None:
        try:
            message: Response | None = next(self._rpc, None)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return message

    def cancel(self) -> None:
        self._rpc.cancel()


class _GrpcPending(Generic[Response]):
    """A unary call that runs."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def result(self) -> Response:
        try:
            response: Response = self._future.result()
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        except grpc.FutureCancelledError as error:
            raise Cancelled("the call was cancelled") from error
        return response

    def cancel(self) -> None:
        self._future.cancel()


class _Outbox:
    """Requests on their way from a writer's thread to the thread of gRPC that sends them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._requests: deque[Any] = deque()
        self._is_ended = False
        self._is_over = False

    def put(self, request: Any) -> bool:
        """Add a request once there is room; return False, and drop it, if the call is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or len(self._requests) < _MAX_OUTGOING)
            if self._is_over:
                return False
            if self._is_ended:
                raise MisuseError("no more requests were to come")
            self._requests.append(request)
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """Let the sender stop after what is here."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody go: the call is over."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._is_ended or bool(self._requests))
                if self._is_over or not self._requests:
                    return
                request = self._requests.popleft()
                self._changed.notify_all()
            yield request


class _GrpcDuplex(_GrpcResponses[Response]):
    """A call that takes many requests."""

    def __init__(self, rpc: Any, outbox: _Outbox) -> None:
        super().__init__(rpc)
        self._outbox = outbox
        if not rpc.add_callback(outbox.close):
            outbox.close()

    def write(self, request: Any, /) -> bool:
        return self._outbox.put(request)

    def end_writes(self) -> None:
        self._outbox.end()


class GrpcTransport:
    """One channel; connects with the first call. Any thread may use it."""

    def __init__(self, config: ClientConfig) -> None:
        arguments = channel_arguments(config)
        self._closed = False
        self._channel = (
            grpc.insecure_channel(config.target, arguments)
            if config.tls is None
            else grpc.secure_channel(config.target, channel_credentials(config.tls), arguments)
        )

    def unary(self, call: Call[Any, Response], /) -> Response:
        # As a future, so that an interrupt in this thread (Ctrl-C) can end the call on its way out.
        pending = self.start(call)
        try:
            return pending.result()
        finally:
            pending.cancel()

    def start(self, call: Call[Any, Response], /) -> _GrpcPending[Response]:
        method = self._method(call, self._channel.unary_unary)
        return _GrpcPending(method.future(call.request, **_terms(call)))

    def stream(self, call: Call[Any, Response], /) -> _GrpcResponses[Response]:
        return _GrpcResponses(self._method(call, self._channel.unary_stream)(call.request, **_terms(call)))

    def duplex(self, call: Call[Request, Response], /) -> _GrpcDuplex[Response]:
        outbox = _Outbox()
        rpc = self._method(call, self._channel.stream_stream)(iter(outbox), **_terms(call))
        return _GrpcDuplex(rpc, outbox)

    def close(self) -> None:
        self._closed = True
        self._channel.close()

    def _method(self, call: Call[Any, Any], kind: Any) -> Any:
        if self._closed:
            raise MisuseError("the client is closed")
        return kind(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.parse,
        )


def _terms(call: Call[Any, Any]) -> dict[str, Any]:
    return {
        "timeout": call.timeout_s,
        "metadata": call.metadata,
        "wait_for_ready": call.wait_for_ready,
    }
