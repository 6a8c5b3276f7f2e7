"""What the engine's thread, the readers and the writer of one Redis tier have in common, under one lock."""

from __future__ import annotations

import threading

from kvcore.clock import Clock
from kvcore.codec import Codec
from kvcore.tiers.health import Health
from kvcore.tiers.interface import ObjectFormat, TierStats
from kvcore.tiers.redis.commands import RedisCommands
from kvcore.tiers.redis.known import KnownObjects
from kvcore.tiers.redis.options import RedisOptions

__all__ = ["SLOW", "RedisShared"]

SLOW = "Redis did not answer in time"


class RedisShared:
    """``lock`` guards ``known``, ``counters``, ``is_closed`` and the queues of both sides."""

    def __init__(
        self, object_format: ObjectFormat, codec: Codec, *, options: RedisOptions, clock: Clock
    ) -> None:
        self.format = object_format
        self.options = options
        self.clock = clock
        self.commands = RedisCommands(object_format, codec)
        self.health = Health(clock)
        self.write_health = Health(clock, first_backoff_s=1.0)
        """Of writing alone: a Redis that is full or read-only still serves what it has."""
        self.lock = threading.Lock()
        self.readable = threading.Condition(self.lock)
        """There may be something for the readers."""
        self.writable = threading.Condition(self.lock)
        """There may be something for the writer."""
        self.known = KnownObjects(clock, options)
        self.counters = TierStats()
        self.is_closed = False

    @property
    def is_usable(self) -> bool:
        """Say whether there is any use in asking Redis for something."""
        return self.health.is_available and not self.is_closed

    def follow(self, rate: float, num_bytes: int, seconds: float) -> float:
        """Return a rate after one more batch; small batches tell nothing about it."""
        if num_bytes < self.options.batch_bytes // 4:
            return rate
        new = num_bytes / max(seconds - self.counters.latency_s, 1e-6)
        return new if rate == 0 else rate + 0.2 * (new - rate)
