"""Limits of a Redis tier."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RedisOptions"]


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """Limits of a Redis tier; the defaults suit a Redis in the same data centre."""

    connect_timeout_s: float = 0.25
    command_timeout_s: float = 1.0
    """Without any byte from Redis; twice that for a whole batch."""
    lookup_patience_s: float = 0.04
    """A lookup that has no answer by then says NO: what a request waits at most for a Redis that hangs."""
    default_ttl_s: float = 86_400.0
    """Of objects without a lifetime of their own; no object stays longer."""
    present_s: float = 60.0
    """How long a YES is believed."""
    absent_s: float = 1.5
    """How long a NO is believed: another server may be storing it."""
    max_known: int = 100_000
    max_queued_bytes: int = 256 << 20
    """Of objects reserved or waiting to be written."""
    max_queued_fetches: int = 8_192
    batch_bytes: int = 1 << 19
    """About what one round trip moves: larger ones delay the first object, smaller ones the last."""
    num_readers: int = 2
