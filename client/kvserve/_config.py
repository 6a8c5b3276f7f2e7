"""How a client is set up. The only place that reads the environment.

Arguments win over ``KVSERVE_TARGET`` and ``KVSERVE_API_KEY``, which win over the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

__all__ = ["DEFAULT_TARGET", "ClientConfig", "ClientOptions", "RetryPolicy", "Tls", "resolve_config"]

DEFAULT_TARGET = "localhost:50051"
DEFAULT_TIMEOUT_S = 300.0
DEFAULT_KEEPALIVE_S = 20.0
DEFAULT_MAX_MESSAGE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How calls that the server refused before their first message are tried again, by gRPC itself.

    UNAVAILABLE and RESOURCE_EXHAUSTED are tried again; after the first message a call is committed and
    never is. The waiting time doubles from ``initial_backoff_s``, with jitter, unless the server names
    another. The deadline of a call covers all of its attempts.
    """

    max_attempts: int = 4
    """The first one included; gRPC allows 2 to 5."""
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0

    def __post_init__(self) -> None:
        if not 2 <= self.max_attempts <= 5:
            raise ValueError("max_attempts must be from 2 to 5; retry=None turns retries off")
        if not 0 < self.initial_backoff_s <= self.max_backoff_s:
            raise ValueError("0 < initial_backoff_s <= max_backoff_s must hold")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Encrypt the connection. Without files: check the server against gRPC's own root certificates."""

    ca_file: str | Path | None = None
    """Certificate authorities to trust instead, PEM."""
    cert_file: str | Path | None = None
    """The client's own certificate chain, for servers that ask for one, PEM; needs ``key_file``."""
    key_file: str | Path | None = None
    server_name: str | None = None
    """Name to expect in the server's certificate, if it isn't the one in the target."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")


class ClientOptions(TypedDict, total=False):
    """Keyword arguments of ``Client`` and ``AsyncClient``."""

    api_key: str | None
    """Sent as ``authorization: Bearer ...``. Default: ``KVSERVE_API_KEY``."""
    timeout_s: float | None
    """Deadline of a call that names none. Default: 300. None: no deadline."""
    tls: Tls | None
    """Default: None, no encryption."""
    retry: RetryPolicy | None
    """None: never try again."""
    keepalive_s: float | None
    """Ping a silent connection this often while calls run, to notice a dead peer. Default: 20. None: no."""
    max_message_bytes: int
    """Largest request and largest single response message. Default: 4 MiB, as in the server."""
    channel_options: Mapping[str, int | str]
    """More gRPC channel arguments, for example ``{"grpc.primary_user_agent": "job/1"}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Everything that ``ClientOptions`` and the environment say, resolved once."""

    target: str
    api_key: str | None = field(repr=False)
    timeout_s: float | None
    tls: Tls | None
    retry: RetryPolicy | None
    keepalive_s: float | None
    max_message_bytes: int
    channel_options: Mapping[str, int | str]


def resolve_config(target: str | None, options: ClientOptions) -> ClientConfig:
    """Return the configuration; raise ValueError for one that can't work, TypeError for an unknown option."""
    unknown = sorted(set(options) - set(ClientOptions.__annotations__))
    if unknown:
        raise TypeError(f"unknown client option: {', '.join(unknown)}")
    api_key = options.get("api_key")
    if api_key is None:
        api_key = os.environ.get("KVSERVE_API_KEY") or None
    if api_key is not None and not (
        api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key
    ):
        raise ValueError("api_key must be printable ASCII without surrounding blanks")
    config = ClientConfig(
        target=target or os.environ.get("KVSERVE_TARGET") or DEFAULT_TARGET,
        api_key=api_key,
        timeout_s=options.get("timeout_s", DEFAULT_TIMEOUT_S),
        tls=options.get("tls"),
        retry=options.get("retry", RetryPolicy()),
        keepalive_s=options.get("keepalive_s", DEFAULT_KEEPALIVE_S),
        max_message_bytes=options.get("max_message_bytes", DEFAULT_MAX_MESSAGE_BYTES),
        channel_options=dict(options.get("channel_options", {})),
    )
    for name, value in (("timeout_s", config.timeout_s), ("keepalive_s", config.keepalive_s)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0; None turns it off")
    if config.max_message_bytes <= 0:
        raise ValueError("max_message_bytes must be above 0")
    return config
