"""The seam between the clients and the wire: what a transport does, and how gRPC channels are set up.

A transport sends calls and raises ``kvserve.Error``; it knows nothing about what the calls mean. There is
one over gRPC for each kind of client (``kvserve._grpc_sync``, ``kvserve._grpc_aio``) and one without a
network for tests (``kvserve.testing.MockTransport``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from kvserve._calls import Call
from kvserve._config import ClientConfig, RetryPolicy, Tls

__all__ = [
    "AsyncDuplex",
    "AsyncResponses",
    "AsyncTransport",
    "Duplex",
    "Pending",
    "Responses",
    "Transport",
    "channel_arguments",
    "channel_credentials",
]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
Response_co = TypeVar("Response_co", covariant=True)
Request_contra = TypeVar("Request_contra", contravariant=True)


class Responses(Protocol[Response_co]):
    """The answers of a running call. Whoever started the call cancels it; dropping this object does not."""

    def read(self) -> Response_co | None:
        """Block until the next message; return None at the end. Raises ``kvserve.Error``."""
        ...

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end; callable from any thread."""
        ...


class Duplex(Responses[Response_co], Protocol[Request_contra, Response_co]):
    """A running call that takes any number of requests. One thread may write while another reads."""

    def write(self, request: Request_contra, /) -> bool:
        """Send a request; block while the other side takes none. False: the call is over; read how."""
        ...

    def end_writes(self) -> None:
        """Say that no more requests come. Idempotent, harmless after the end."""
        ...


class Pending(Protocol[Response_co]):
    """A unary call that runs. Whoever started it waits for it or cancels it."""

    def result(self) -> Response_co:
        """Block until the answer. Raises ``kvserve.Error``."""
        ...

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        ...


class Transport(Protocol):
    """Sends calls, blocking."""

    def unary(self, call: Call[Any, Response], /) -> Response:
        """Return the answer. Raises ``kvserve.Error``."""
        ...

    def start(self, call: Call[Any, Response], /) -> Pending[Response]:
        """Start a unary call; never blocks."""
        ...

    def stream(self, call: Call[Any, Response], /) -> Responses[Response]:
        """Start a call; never blocks."""
        ...

    def duplex(self, call: Call[Request, Response], /) -> Duplex[Request, Response]:
        """Start a call that takes many requests, without one; never blocks. ``call.request`` is not sent."""
        ...

    def close(self) -> None:
        """Cancel what runs and let go of the connection. Idempotent."""
        ...


class AsyncResponses(Protocol[Response_co]):
    """The answers of a running call. Whoever started the call cancels it; dropping this object does not."""

    async def read(self) -> Response_co | None:
        """Wait for the next message; return None at the end. Raises ``kvserve.Error``."""
        ...

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        ...


class AsyncDuplex(AsyncResponses[Response_co], Protocol[Request_contra, Response_co]):
    """A running call that takes any number of requests. One task may write while another reads."""

    async def write(self, request: Request_contra, /) -> bool:
        """Send a request; wait while the other side takes none. False: the call is over; read how."""
        ...

    async def end_writes(self) -> None:
        """Say that no more requests come. Idempotent, harmless after the end."""
        ...


class AsyncTransport(Protocol):
    """Sends calls on the running event loop."""

    async def unary(self, call: Call[Any, Response], /) -> Response:
        """Return the answer. Raises ``kvserve.Error``. Cancelling the task cancels the call."""
        ...

    def stream(self, call: Call[Any, Response], /) -> AsyncResponses[Response]:
        """Start a call; never blocks."""
        ...

    def duplex(self, call: Call[Request, Response], /) -> AsyncDuplex[Request, Response]:
        """Start a call that takes many requests, without one; never blocks. ``call.request`` is not sent."""
        ...

    async def aclose(self) -> None:
        """Cancel what runs and let go of the connection. Idempotent."""
        ...


def channel_arguments(config: ClientConfig) -> list[tuple[str, int | str]]:
    """Return the gRPC channel arguments for this configuration."""
    arguments: dict[str, int | str] = {
        "grpc.max_send_message_length": config.max_message_bytes,
        "grpc.max_receive_message_length": config.max_message_bytes,
        # A request that doesn't fit this buffer could not be sent a second time.
        "grpc.per_rpc_retry_buffer_size": config.max_message_bytes + 64 * 1024,
        # One client, one connection: closing a client or losing its connection concerns no other client.
        "grpc.use_local_subchannel_pool": 1,
        # A server that comes back is found within seconds, not within gRPC's two minutes.
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 2000,
        "grpc.service_config_disable_resolution": 1,
        "grpc.enable_retries": 0 if config.retry is None else 1,
    }
    if config.retry is not None:
        arguments["grpc.service_config"] = _service_config(config.retry)
    if config.keepalive_s is not None:
        arguments["grpc.keepalive_time_ms"] = round(config.keepalive_s * 1000)
        arguments["grpc.keepalive_timeout_ms"] = 10_000
        # A stream may be silent for long: waiting in the queue, or in a long prefill.
        arguments["grpc.http2.max_pings_without_data"] = 0
    if config.tls is not None and config.tls.server_name is not None:
        arguments["grpc.ssl_target_name_override"] = config.tls.server_name
    if _is_local(config.target):
        arguments["grpc.enable_http_proxy"] = 0
    return list((arguments | dict(config.channel_options)).items())


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Read the certificates. Raises OSError where a file can't be read."""

    def read(path: str | Path | None) -> bytes | None:
        return None if path is None else Path(path).read_bytes()

    return grpc.ssl_channel_credentials(
        root_certificates=read(tls.ca_file),
        private_key=read(tls.key_file),
        certificate_chain=read(tls.cert_file),
    )


def _service_config(retry: RetryPolicy) -> str:
    return json.dumps(
        {
            "methodConfig": [
                {
                    "name": [{}],
                    "retryPolicy": {
                        "maxAttempts": retry.max_attempts,
                        "initialBackoff": f"{retry.initial_backoff_s:.9f}s",
                        "maxBackoff": f"{retry.max_backoff_s:.9f}s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                    },
                }
            ],
            # While most calls fail, stop trying again: a server in trouble gets less traffic, not more.
            "retryThrottling": {"maxTokens": 50, "tokenRatio": 0.5},
        }
    )


def _is_local(target: str) -> bool:
    return target.startswith(("localhost:", "127.", "[::1]:", "unix:"))
