"""The gRPC server object: limits of the transport, TLS, the port."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc import aio

__all__ = [
    "ListenError",
    "ListenOptions",
    "Services",
    "TlsFiles",
    "bind",
    "check_port_free",
    "make_server",
]


class ListenError(Exception):
    """The server cannot listen where it was told to; the text is for the operator."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With ``client_ca``, clients must present a certificate that it signed."""

    certificate: Path
    key: Path = field(repr=False)
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Where to listen, and what a connection may do."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0: any free port."""
    tls: TlsFiles | None = None
    max_message_bytes: int = 4 << 20
    max_concurrent_rpcs: int = 4096
    """A backstop: admission is the service's business, and health checks count here too."""
    max_connections: int = 1024
    max_call_s: float = 3600.0

    def channel_arguments(self) -> list[tuple[str, int]]:
        """Return the transport's limits."""
        return [
            ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it unnoticed
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_metadata_size", 8 << 10),
            ("grpc.absolute_max_metadata_size", 16 << 10),
            ("grpc.max_concurrent_streams", 100),
            # Else calls that have ended count as long as Python holds their objects: a client with 90 open
            # calls, each followed by the next at once, saw every other one refused.
            ("grpc.http.overload_protection", 0),
            # Calls that have come and that Python has not taken yet. Beyond the first number (1,000 unless
            # set) the core ends some with a bare CANCELLED, beyond the second (3,000) all, whoever they are
            # from: a burst of calls would fail, and resets on one connection would fail everybody else's.
            ("grpc.server.max_pending_requests", 4 * self.max_concurrent_rpcs),
            ("grpc.server.max_pending_requests_hard_limit", 8 * self.max_concurrent_rpcs),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", 5_000),
            # Dead peers are noticed in 15 s; clients may ping a silent stream every 5 s.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.max_connection_idle_ms", 5 * 60_000),
            ("grpc.max_connection_age_ms", 30 * 60_000),
            ("grpc.max_connection_age_grace_ms", int(self.max_call_s * 1000)),
        ]


class Services:
    """What the generated ``add_...Servicer_to_server`` takes for a server: registers nothing by method.

    For every call that arrives, grpc's event loop looks through one future for each method registered by
    itself: with 35 of them a tenth of what a small call costs. Looked up by name, methods cost nothing.
    """

    def __init__(self, server: aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Serve these."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Leave them: they are the same as the generic ones."""


def check_port_free(host: str, port: int) -> None:
    """Raise :class:`ListenError` if nobody could listen there: asked before a model is loaded for minutes."""
    if port == 0:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def make_server(options: ListenOptions, interceptors: Sequence[aio.ServerInterceptor]) -> aio.Server:
    """Return the server, without services and not listening yet. Needs the running event loop."""
    return aio.server(
        interceptors=list(interceptors),
        options=options.channel_arguments(),
        maximum_concurrent_rpcs=options.max_concurrent_rpcs,
    )


def bind(server: aio.Server, options: ListenOptions) -> int:
    """Listen; return the port. Raises :class:`ListenError`."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.port}"
    try:
        if options.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(options.tls))
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address}: the address is in use or not available") from error


def _credentials(files: TlsFiles) -> grpc.ServerCredentials:
    try:
        certificate = files.certificate.read_bytes()
        key = files.key.read_bytes()
        client_ca = None if files.client_ca is None else files.client_ca.read_bytes()
    except OSError as error:
        raise ListenError(f"cannot read {error.filename}: {error.strerror}") from error
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )
