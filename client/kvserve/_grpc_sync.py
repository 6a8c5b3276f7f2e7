"""Calls over a blocking gRPC channel."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import grpc

from kvserve._calls import Call
from kvserve._config import ClientConfig
from kvserve._errors import Cancelled, MisuseError, error_from_rpc
from kvserve._transport import channel_arguments, channel_credentials

__all__ = ["GrpcTransport"]

Response = TypeVar("Response")


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
        future = self._method(call, self._channel.unary_unary).future(call.request, **_terms(call))
        try:
            response: Response = future.result()
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        except grpc.FutureCancelledError as error:
            raise Cancelled("the call was cancelled") from error
        finally:
            future.cancel()
        return response

    def stream(self, call: Call[Any, Response], /) -> _GrpcResponses[Response]:
        return _GrpcResponses(self._method(call, self._channel.unary_stream)(call.request, **_terms(call)))

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
