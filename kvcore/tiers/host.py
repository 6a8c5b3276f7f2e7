"""Host memory as a tier: payloads in this process, as they were handed over or encoded.

Without a codec nothing is copied and no thread is needed: a store is whole at once, and a fetch is done
before ``fetch`` returns (``poll`` brings it). With one, a thread encodes what is stored and others decode
what is fetched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kvcore.clock import Clock, MonotonicClock
from kvcore.codec import Buffer, Codec, CodecError, CodecName, Divergence, NoCodec, codec_of
from kvcore.keys import TOKEN_BYTES, PrefixDigest
from kvcore.tiers.divergences import DivergenceLog
from kvcore.tiers.fetches import FetchBoard, PendingFetch
from kvcore.tiers.index import ForeignFile, IndexEntry, ObjectIndex
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    FetchFailure,
    ObjectFormat,
    ObjectKey,
    ObjectKind,
    Presence,
    StoreTicket,
    TierStats,
)
from kvcore.tiers.speed import SpeedMeter
from kvcore.tiers.workers import Workers

__all__ = ["HostTier"]

ENTRY_BYTES = 512
"""Charged for each object beside its payload and tokens: what the objects that describe it take."""

_MAX_DIVERGENCES = 4096
_COPY_PROBE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """What an entry stands for. ``described.payload`` is ``data``, in the bytes of ``codec``."""

    described: CacheObject
    codec: Codec
    num_bytes: int


class HostTier:
    """Objects in this process within ``max_bytes``. One engine's thread calls it; see ``Tier``."""

    name = "host"
    is_persistent = False

    def __init__(
        self,
        object_format: ObjectFormat,
        max_bytes: int,
        *,
        codec: Codec | None = None,
        clock: Clock | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._format = object_format
        self._codec = codec or NoCodec()
        self._clock = clock or MonotonicClock()
        self._lock = threading.Lock()
        self._index = ObjectIndex(max_bytes)
        self._contents: dict[ObjectKey | ForeignFile, _Kept] = {}
        self._reserved: dict[StoreTicket, IndexEntry] = {}
        self._last_ticket = 0
        self._board = FetchBoard(self.name, clock=self._clock, on_ready=on_ready)
        self._counters = TierStats(max_bytes=max_bytes)
        self._divergences = DivergenceLog(_MAX_DIVERGENCES)
        self._reads, self._writes = SpeedMeter(), SpeedMeter()
        self._is_closed = False
        self._workers: Workers | None = None
        if self._codec.name is CodecName.NONE:
            _measure_copy(self._reads)
            self._writes = self._reads
        else:
            self._workers = Workers("kv-host", num_readers=1)

    @property
    def is_lossy(self) -> bool:
        return self._codec.is_lossy

    def lookup(self, key: ObjectKey) -> Presence:
        with self._lock:
            self._drop_expired()
            entry = self._index.get(key)
            if entry is None:
                self._counters.misses += 1
                return Presence.NO
            return Presence.YES if entry.is_whole else Presence.COMING

    def prepare(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        with self._lock:
            self._drop_expired()
            if self._index.get(key) is not None:
                return None
            room = num_bytes + TOKEN_BYTES * self._format.block_size + ENTRY_BYTES
            reservation = None if self._is_closed else self._index.reserve(key, room)
            if reservation is None:
                self._counters.refused_stores += 1
                return None
            self._forget(reservation.evicted)
            self._last_ticket += 1
            ticket = StoreTicket(self._last_ticket)
            self._reserved[ticket] = reservation.entry
            return ticket

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        with self._lock:
            entry = self._reserved.pop(ticket)
            entry.namespace, entry.parent, entry.depth = stored.namespace, stored.parent, stored.depth
        expires_at = None if stored.expires_in_s is None else self._clock.now() + stored.expires_in_s
        if self._workers is None:
            self._keep(entry, stored, expires_at)
        elif not self._workers.submit_write(lambda: self._keep(entry, stored, expires_at)):
            self._give_up(entry, "closed")

    def abandon(self, ticket: StoreTicket) -> None:
        with self._lock:
            self._index.drop(self._reserved.pop(ticket))

    def fetch(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        with self._lock:
            self._drop_expired()
            entry, kept = self._index.get(key), self._contents.get(key)
            if entry is None or kept is None or not entry.is_whole or self._is_closed:
                self._counters.misses += 1
                return False
            self._index.touch(entry, self._clock.now())
            left = None if entry.expires_at is None else entry.expires_at - self._clock.now()
        fetch = self._board.start(key, namespace=namespace, timeout_s=timeout_s)
        if kept.described.namespace != namespace:
            self._board.fail(fetch, FetchFailure.MISMATCH)
        elif self._workers is None:
            found = replace(kept.described, expires_in_s=left)
            self._board.succeed(fetch, found, num_bytes=kept.num_bytes)
        elif not self._workers.submit_read(lambda: self._decode(fetch, kept, left)):
            self._board.retract(fetch)
            return False
        return True

    def cancel(self, keys: Iterable[ObjectKey]) -> None:
        self._board.cancel(keys)

    def poll(self) -> list[Fetched]:
        self._board.expire()
        return self._board.take()

    def remove(self, keys: Iterable[ObjectKey]) -> None:
        with self._lock:
            for key in keys:
                entry = self._index.get(key)
                if entry is not None:
                    self._discard(entry)

    def remove_prefixes(self, digests: Iterable[PrefixDigest]) -> int:
        with self._lock:
            chosen = self._index.below(digests)
            for entry in chosen:
                self._discard(entry)
            return sum(entry.is_whole for entry in chosen)

    def clear(self, namespace: PrefixDigest | None = None) -> int:
        with self._lock:
            chosen = self._index.select(namespace)
            for entry in chosen:
                self._discard(entry)
            return sum(entry.is_whole for entry in chosen)

    def keys(self) -> Iterable[ObjectKey]:
        with self._lock:
            return [entry.key for entry in self._index if isinstance(entry.key, ObjectKey)]

    def stats(self) -> TierStats:
        with self._lock:
            self._drop_expired()
            return replace(
                self._counters,
                num_objects=self._index.num_objects,
                num_bytes=self._index.num_bytes,
                hits=self._board.fetched,
                fetched=self._board.fetched,
                fetched_bytes=self._board.fetched_bytes,
                failures=dict(self._board.failures),
                latency_s=self._reads.latency_s,
                read_bytes_per_s=self._reads.bytes_per_s,
                write_bytes_per_s=self._writes.bytes_per_s,
            )

    def take_divergences(self) -> list[tuple[ObjectKey, Divergence]]:
        """Return what a lossy codec did to the objects stored since the last call (the latest)."""
        return self._divergences.take()

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless the index agrees with itself."""
        with self._lock:
            self._index.check_integrity()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        if self._workers is not None:
            self._workers.close()
        self._board.cancel_all()

    def _keep(self, entry: IndexEntry, stored: CacheObject, expires_at: float | None) -> None:
        """Encode and make visible. On the writer's thread, or the engine's without a codec."""
        started = time.perf_counter()
        codec = codec_of(self._codec, stored.key.kind)
        is_partial = stored.key.kind is ObjectKind.PARTIAL
        num_slots = len(stored.tokens) // TOKEN_BYTES if is_partial else None
        try:
            encoded = codec.encode(stored.payload, self._format, kind=stored.key.kind, num_slots=num_slots)
        except CodecError as error:
            self._give_up(entry, str(error))
            return
        payload_bytes = memoryview(encoded.data).nbytes
        if self._workers is not None:
            self._writes.observe(payload_bytes, time.perf_counter() - started)
        num_bytes = payload_bytes + len(stored.tokens) + ENTRY_BYTES
        kept = _Kept(replace(stored, payload=encoded.data), codec, payload_bytes)
        with self._lock:
            evicted = None if entry.is_gone else self._index.resize(entry, num_bytes)
            if evicted is None:
                self._counters.store_failures += 1
                self._index.drop(entry)
                return
            self._forget(evicted)
            entry.expires_at = expires_at
            self._index.admit(entry, self._clock.now())
            self._contents[stored.key] = kept
            self._counters.stored += 1
            self._counters.stored_bytes += payload_bytes
            self._divergences.note(stored.key, encoded.divergence)

    def _decode(self, fetch: PendingFetch, kept: _Kept, left: float | None) -> None:
        if fetch.is_over:
            return
        started = time.perf_counter()
        data: Buffer = kept.described.payload
        try:
            payload = kept.codec.decode(data, self._format, kind=fetch.key.kind)
        except CodecError:
            self._board.fail(fetch, FetchFailure.CORRUPT)
            return
        self._reads.observe(kept.num_bytes, time.perf_counter() - started)
        found = replace(kept.described, payload=payload, expires_in_s=left)
        self._board.succeed(fetch, found, num_bytes=kept.num_bytes, is_lossy=kept.codec.is_lossy)

    def _give_up(self, entry: IndexEntry, reason: str) -> None:
        with self._lock:
            self._index.drop(entry)
            self._counters.store_failures += 1
            self._counters.last_fault = reason

    def _drop_expired(self) -> None:
        for entry in self._index.take_expired(self._clock.now()):
            self._counters.expired += 1
            self._contents.pop(entry.key, None)

    def _forget(self, evicted: Iterable[IndexEntry]) -> None:
        for entry in evicted:
            self._counters.evicted += 1
            self._contents.pop(entry.key, None)

    def _discard(self, entry: IndexEntry) -> None:
        self._index.drop(entry)
        self._contents.pop(entry.key, None)


def _measure_copy(meter: SpeedMeter) -> None:
    """Note how fast this machine copies memory: that is all a fetch without a codec will cost."""
    source = bytes(_COPY_PROBE_BYTES)
    for _ in range(2):  # the first one also asks the system for memory
        started = time.perf_counter()
        bytearray(source)
        meter.observe(len(source), time.perf_counter() - started)
