"""Redis as a tier: objects that several servers share, behind a network that may be slow, full or gone.

::

    engine's thread               queues (bounded)     threads, each with a connection of its own
      lookup -> KnownObjects .... unknown keys  --->   readers: STRLEN, a pipeline
      fetch  -------------------> fetches       --->            GETRANGE, some at a time; check, decode
      complete -----------------> stores        --->   writer:  encode; SET .. PX, some at a time
      remove, clear ------------> removals      --->            UNLINK, in order with the stores

While Redis is failing (``Health``), ``lookup`` says NO and ``fetch`` False at once, queued work is given up,
and a reader tries again after the back-off, so no request ever pays for the try. A write that Redis refuses
(out of memory, read-only) stops the stores alone.

Nothing in Redis is trusted (``commands``). What is not an object at all is deleted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

from kvcore.clock import Clock, MonotonicClock
from kvcore.codec import Codec, Divergence, NoCodec
from kvcore.keys import PrefixDigest
from kvcore.tiers.fetches import FetchBoard
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    ObjectFormat,
    ObjectKey,
    ObjectKind,
    Presence,
    StoreTicket,
    TierStats,
)
from kvcore.tiers.outages import OutageLog
from kvcore.tiers.redis.link import RedisLink
from kvcore.tiers.redis.options import RedisOptions
from kvcore.tiers.redis.reads import RedisReads
from kvcore.tiers.redis.shared import RedisShared
from kvcore.tiers.redis.worker import RedisWorker
from kvcore.tiers.redis.writes import RedisWrites

__all__ = ["RedisTier"]

_CLOSE_WITHIN_S = 1.5


class RedisTier:
    """See the module's text and ``kvcore.tiers.interface.Tier``."""

    def __init__(
        self,
        url: str,
        object_format: ObjectFormat,
        codec: Codec | None = None,
        *,
        options: RedisOptions | None = None,
        clock: Clock | None = None,
        on_ready: Callable[[], None] | None = None,
        outages: OutageLog | None = None,
    ) -> None:
        """Dial and measure once, for a second or two at most; a Redis that is not there is tried again later.

        ``outages`` is shared by the parts of a tier.

        Raises:
            TierStartError: the URL cannot work, whatever Redis does.
        """
        self._options = options = options or RedisOptions()
        self._clock = clock = clock or MonotonicClock()
        codec = codec or NoCodec()
        self._is_lossy = codec.is_lossy
        self._shared = shared = RedisShared(object_format, codec, options=options, clock=clock)
        outages = outages or OutageLog(self.name)
        outages.watch(shared.health)
        outages.watch(shared.write_health, "writing")
        self._board = FetchBoard("redis", clock=clock)
        self._reads = RedisReads(shared, self._board)
        self._writes = RedisWrites(shared)
        self._writer, *self._readers = self._workers = [
            RedisWorker(
                shared,
                RedisLink(
                    url,
                    connect_timeout_s=options.connect_timeout_s,
                    command_timeout_s=options.command_timeout_s,
                ),
            )
            for _ in range(1 + options.num_readers)
        ]
        self._reads.try_again(self._writer)
        on_ready = on_ready or (lambda: None)
        self._writer.start(self._writes.next_job, on_ready)
        for worker in self._readers:
            worker.start(self._reads.next_job, on_ready)

    def __repr__(self) -> str:
        return f"RedisTier({self._shared.health.state.value})"

    @property
    def name(self) -> str:
        return "redis"

    @property
    def is_persistent(self) -> bool:
        return True

    @property
    def is_lossy(self) -> bool:
        return self._is_lossy

    def lookup(self, key: ObjectKey) -> Presence:
        with self._shared.lock:
            if not self._shared.is_usable:
                return Presence.NO
            if self._writes.is_storing(key):
                return Presence.COMING
            if self._writes.is_removing(key) or self._shared.known.is_expired(key):
                return Presence.NO
            return self._reads.look(key)

    def prepare(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        with self._shared.lock:
            return self._writes.reserve(key, num_bytes)

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        with self._shared.lock:
            self._writes.complete(ticket, stored)

    def abandon(self, ticket: StoreTicket) -> None:
        with self._shared.lock:
            self._writes.abandon(ticket)

    def fetch(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        shared = self._shared
        with shared.lock:
            if (
                not shared.is_usable
                or self._writes.is_storing(key)
                or self._writes.is_removing(key)
                or shared.known.is_present(key) is False
                or shared.known.is_expired(key)
            ):
                return False
            return self._reads.begin(key, namespace=namespace, timeout_s=timeout_s)

    def cancel(self, keys: Iterable[ObjectKey]) -> None:
        self._board.cancel(keys)
        self._abort(lambda worker: worker.is_unwanted)

    def poll(self) -> list[Fetched]:
        num_late = self._board.expire()
        if num_late:
            with self._shared.lock:
                self._reads.note_late(num_late)
            self._abort(lambda worker: worker.is_unwanted)
        # The connection's timeout begins anew with every byte: this bounds the whole batch.
        overdue = self._clock.now() - 2 * self._options.command_timeout_s - self._options.connect_timeout_s
        self._abort(lambda worker: worker.is_busy_since_before(overdue))
        return self._board.take()

    def remove(self, keys: Iterable[ObjectKey]) -> None:
        with self._shared.lock:
            self._writes.remove(list(keys))

    def remove_prefixes(self, digests: Iterable[PrefixDigest]) -> int:
        """Remove these prefixes, whoever stored them, and what this server knows to continue them."""
        doomed = dict.fromkeys(digests)
        known = self._shared.known
        with self._shared.lock:
            while True:  # what is known and what is being written may continue each other
                coming = [stored.key.digest for stored in self._writes.select_below(doomed)]
                found = [d for d in (*known.continuing(doomed), *coming) if d not in doomed]
                if not found:
                    break
                doomed.update(dict.fromkeys(found))
            keys = [ObjectKey(digest, kind) for digest in doomed for kind in ObjectKind]
            num_known = sum(key in known for key in keys)
            self._writes.remove(keys)
            return num_known

    def clear(self, namespace: PrefixDigest | None = None) -> int:
        """Forget what this server has stored or fetched; what others alone know stays until its TTL."""
        with self._shared.lock:
            doomed = self._shared.known.select(namespace) + self._writes.select_waiting(namespace)
            doomed = list(dict.fromkeys(doomed))
            self._writes.remove(doomed)
            return len(doomed)

    def keys(self) -> Iterable[ObjectKey]:
        with self._shared.lock:
            return list(self._shared.known)

    def take_divergences(self) -> list[tuple[ObjectKey, Divergence]]:
        """Return what a lossy codec did to the objects written since the last call (the latest)."""
        return self._writes.divergences.take()

    def stats(self) -> TierStats:
        shared = self._shared
        with shared.lock:
            health = shared.health if not shared.health.is_available else shared.write_health
            is_faulty = not health.is_available
            return dataclasses.replace(
                shared.counters,
                num_objects=len(shared.known),
                num_bytes=shared.known.num_bytes,
                is_available=shared.health.is_available,
                fetched=self._board.fetched,
                fetched_bytes=self._board.fetched_bytes,
                failures=dict(self._board.failures),
                last_fault=health.last_fault if is_faulty else shared.counters.last_fault,
            )

    def close(self) -> None:
        """Write what was handed over, within ``_CLOSE_WITHIN_S``; then cut connections, end threads."""
        until = time.monotonic() + _CLOSE_WITHIN_S
        with self._shared.lock:
            self._shared.is_closed = True
            self._shared.readable.notify_all()
            self._shared.writable.notify_all()
        self._board.cancel_all()
        for worker in self._readers:
            worker.abort()
        self._writer.join(max(0.0, until - time.monotonic()))
        self._writer.abort()
        for worker in self._workers:
            worker.join(self._options.connect_timeout_s + 0.5)

    def _abort(self, is_doomed: Callable[[RedisWorker], bool]) -> None:
        with self._shared.lock:
            doomed = [worker for worker in self._workers if is_doomed(worker)]
        for worker in doomed:
            worker.abort()
