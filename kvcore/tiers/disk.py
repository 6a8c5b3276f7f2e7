"""A folder as a tier: objects that survive the process, one file each.

::

    engine's thread            reader threads (2)              writer thread (1)
      lookup  <- index
      prepare -> index                                         removes what left for it
      complete ------------------------------------------->    encodes, writes under another name, renames
      fetch ---------------->  read, check, decode
      poll  <----------------  outcome                         moves what was damaged to the quarantine

The index is in memory and is the truth while the tier is open: nobody else writes into the folder (a lock
sees to it). The file's checksum and name are the truth about its content. There is no fsync: a crash of the
process loses nothing that was renamed; a power cut may tear files, which their checksums find.

Reading and writing fail apart: a full disk still serves what it has. Either is left alone after a fault for
a while that doubles (``Health``) and is tried again by whoever asks next. Room is counted in whole pages of
4 KiB, other models' files included; they leave in order of use like any other.

Lifetimes run on the monotonic clock. The wall clock is asked at the start, and written into headers.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from kvcore.clock import Clock, MonotonicClock
from kvcore.codec import Codec, CodecError, Divergence, NoCodec
from kvcore.keys import PrefixDigest
from kvcore.tiers.disk_files import FileRefused, Files, fault_in_words
from kvcore.tiers.disk_folder import DiskFolder
from kvcore.tiers.disk_index import SkippedFile, entry_of_row, load_rows, page_bytes, row_of_entry, save_rows
from kvcore.tiers.fetches import FetchBoard, PendingFetch
from kvcore.tiers.health import Health, HealthState
from kvcore.tiers.index import ForeignFile, IndexEntry, ObjectIndex
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    FetchFailure,
    ObjectFormat,
    ObjectKey,
    Presence,
    StoreTicket,
    TierStats,
)
from kvcore.tiers.objects import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    ObjectError,
    decode,
    encode,
    max_object_bytes,
)
from kvcore.tiers.speed import SpeedMeter
from kvcore.tiers.workers import Workers

__all__ = ["DiskTier"]

log = logging.getLogger(__name__)

_PROBE_BYTES = (4 << 10, 256 << 10)
_MAX_DIVERGENCES = 4096


class DiskTier:
    """Objects in a folder within ``max_bytes``. One engine's thread calls it; see ``Tier``."""

    name = "disk"
    is_persistent = True

    def __init__(
        self,
        path: Path | str,
        object_format: ObjectFormat,
        max_bytes: int,
        *,
        codec: Codec | None = None,
        clock: Clock | None = None,
        wall_clock: Callable[[], float] = time.time,
        on_ready: Callable[[], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        files: Files | None = None,
        num_readers: int = 2,
        max_queued_reads: int = 1024,
        max_pending_bytes: int = 64 << 20,
        stuck_after_s: float = 1.0,
    ) -> None:
        """Open the folder and learn what is in it; ``on_progress(done, total)`` tells how far that is.

        ``max_pending_bytes``: payloads that may wait to be written. ``stuck_after_s``: a read that takes
        longer while fetches time out makes the tier back off. Raises ``TierStartError`` for a folder that
        cannot be used.
        """
        self._format = object_format
        self._codec = codec or NoCodec()
        self._clock = clock or MonotonicClock()
        self._wall_clock = wall_clock
        self._files = files or Files()
        self._max_pending_bytes = max_pending_bytes
        self._stuck_after_s = stuck_after_s
        self._lock = threading.Lock()
        self._index = ObjectIndex(max_bytes)
        self._reserved: dict[StoreTicket, IndexEntry] = {}
        self._last_ticket = 0
        self._pending_bytes = 0
        self._counters = TierStats(max_bytes=max_bytes)
        self._divergences: deque[tuple[ObjectKey, Divergence]] = deque(maxlen=_MAX_DIVERGENCES)
        self._reads, self._writes = SpeedMeter(), SpeedMeter()
        self._read_health, self._write_health = Health(self._clock), Health(self._clock, seed=1)
        self._last_fault: str | None = None
        self._trial: PendingFetch | None = None
        """The fetch whose outcome decides whether reading works again."""
        self._is_closed = False
        self._board = FetchBoard(self.name, clock=self._clock, on_ready=on_ready)
        self._folder = DiskFolder(Path(path), object_format, self._files)
        try:
            left = self._load(on_progress)
        except BaseException:
            self._folder.close()
            raise
        self._workers = Workers("kv-disk", num_readers=num_readers, max_queued_reads=max_queued_reads)
        self._workers.submit_write(lambda: self._unlink(left))
        self._workers.submit_write(self._probe)

    # -- the engine's thread

    def lookup(self, key: ObjectKey) -> Presence:
        with self._lock:
            self._drop_expired()
            entry = self._index.get(key)
            if entry is None or not _may_be_tried(self._read_health):
                self._counters.misses += 1
                return Presence.NO
            return Presence.YES if entry.is_whole else Presence.COMING

    def prepare(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        num_bytes += HEADER_BYTES + 4 * self._format.block_size + CHECKSUM_BYTES
        with self._lock:
            self._drop_expired()
            if self._index.get(key) is not None:
                return None
            is_willing = (
                not self._is_closed
                and _may_be_tried(self._write_health)
                and self._pending_bytes + num_bytes <= self._max_pending_bytes
            )
            reservation = self._index.reserve(key, page_bytes(num_bytes)) if is_willing else None
            if reservation is None:
                self._counters.refused_stores += 1
                return None
            entry = reservation.entry
            self._pending_bytes += entry.num_bytes
            self._evict(reservation.evicted)
            self._last_ticket += 1
            ticket = StoreTicket(self._last_ticket)
            self._reserved[ticket] = entry
            return ticket

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        with self._lock:
            entry = self._reserved.pop(ticket)
            pending_bytes = entry.num_bytes
            entry.namespace, entry.parent, entry.depth = stored.namespace, stored.parent, stored.depth
            if stored.expires_in_s is not None:
                entry.expires_at = self._clock.now() + stored.expires_in_s
        if not self._workers.submit_write(lambda: self._write(entry, stored, pending_bytes)):
            self._give_up(entry, "closed", pending_bytes)

    def abandon(self, ticket: StoreTicket) -> None:
        with self._lock:
            entry = self._reserved.pop(ticket)
            self._pending_bytes -= entry.num_bytes
            self._index.drop(entry)

    def fetch(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        with self._lock:
            self._drop_expired()
            entry = self._index.get(key)
            if entry is None or not entry.is_whole or self._is_closed:
                self._counters.misses += 1
                return False
            if not self._read_health.may_try():
                self._counters.misses += 1
                return False
            fetch = self._board.start(key, namespace=namespace, timeout_s=timeout_s)
            if self._read_health.state is HealthState.HALF_OPEN:
                self._trial = fetch
            if not self._workers.submit_read(lambda: self._read(fetch, entry)):
                self._board.retract(fetch)
                self._counters.misses += 1
                return False
            self._index.touch(entry, self._clock.now())
            return True

    def cancel(self, keys: Iterable[ObjectKey]) -> None:
        self._board.cancel(keys)

    def poll(self) -> list[Fetched]:
        timeouts = self._board.expire()
        if timeouts and self._workers.longest_read_s() > self._stuck_after_s:
            self._note_fault(self._read_health, "reads hang")
        trial = self._trial
        if trial is not None and trial.is_over:
            self._trial = None
            if self._read_health.state is HealthState.HALF_OPEN:  # timed out, cancelled, or never begun
                self._note_fault(self._read_health, "the retry did not end in time")
        return self._board.take()

    def remove(self, keys: Iterable[ObjectKey]) -> None:
        with self._lock:
            self._discard([entry for key in keys if (entry := self._index.get(key)) is not None])

    def remove_prefixes(self, digests: Iterable[PrefixDigest]) -> int:
        with self._lock:
            chosen = self._index.below(digests)
            self._discard(chosen)
            return sum(entry.is_whole for entry in chosen)

    def clear(self, namespace: PrefixDigest | None = None) -> int:
        with self._lock:
            chosen = self._index.select(namespace)
            self._discard(chosen)
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
                is_available=self._read_health.is_available and self._write_health.is_available,
                hits=self._board.fetched,
                fetched=self._board.fetched,
                fetched_bytes=self._board.fetched_bytes,
                failures=dict(self._board.failures),
                latency_s=self._reads.latency_s,
                read_bytes_per_s=self._reads.bytes_per_s,
                write_bytes_per_s=self._writes.bytes_per_s,
                last_fault=self._last_fault,
            )

    def take_divergences(self) -> list[tuple[ObjectKey, Divergence]]:
        """Return what a lossy codec did to the objects stored since the last call (the latest)."""
        with self._lock:
            taken = list(self._divergences)
            self._divergences.clear()
            return taken

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless the index agrees with itself."""
        with self._lock:
            self._index.check_integrity()

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        has_ended = self._workers.close()
        self._board.cancel_all()
        if has_ended:  # a stuck thread might still change what the index would say
            self._save()
        self._folder.close()

    # -- the tier's threads

    def _write(self, entry: IndexEntry, stored: CacheObject, pending_bytes: int) -> None:
        started = time.perf_counter()
        now_unix = self._wall_clock()
        try:
            encoded = encode(stored, self._format, self._codec, now_unix=now_unix)
        except (ObjectError, CodecError) as error:
            self._give_up(entry, str(error), pending_bytes)
            return
        with self._lock:
            evicted = None if entry.is_gone else self._index.resize(entry, page_bytes(encoded.num_bytes))
        self._unlink(evicted or ())
        if evicted is None or not self._write_health.may_try():
            self._give_up(entry, None, pending_bytes)
            return
        path = self._folder.path_of(stored.key)
        try:
            self._files.write(self._folder.temporary_path(), path, encoded.buffers)
        except OSError as error:
            fault = fault_in_words(error)
            self._note_fault(self._write_health, fault)
            self._give_up(entry, fault, pending_bytes)
            return
        self._write_health.succeeded()
        self._writes.observe(encoded.num_bytes, time.perf_counter() - started)
        with self._lock:
            self._pending_bytes -= pending_bytes
            self._counters.evicted += len(evicted)
            if entry.is_gone:  # removed meanwhile: its removal is queued behind this
                self._counters.store_failures += 1
                return
            self._index.admit(entry, self._clock.now())
            self._counters.stored += 1
            self._counters.stored_bytes += encoded.num_bytes
            if encoded.divergence is not None:
                self._divergences.append((stored.key, encoded.divergence))

    def _read(self, fetch: PendingFetch, entry: IndexEntry) -> None:
        if fetch.is_over:
            return
        key = fetch.key
        started = time.perf_counter()
        try:
            data = self._files.read(
                self._folder.path_of(key),
                max_bytes=max_object_bytes(self._format, key.kind),
                min_bytes=HEADER_BYTES + CHECKSUM_BYTES,
            )
        except FileNotFoundError:
            self._read_health.succeeded()
            self._forget(entry)
            self._board.fail(fetch, FetchFailure.MISSING)
            return
        except FileRefused:
            self._read_health.succeeded()
            self._quarantine(entry)
            self._board.fail(fetch, FetchFailure.CORRUPT)
            return
        except OSError as error:
            self._note_fault(self._read_health, fault_in_words(error))
            if error.errno == errno.EIO:  # the medium; this file would only fail again
                with self._lock:
                    self._discard([entry])
            self._board.fail(fetch, FetchFailure.UNREACHABLE)
            return
        self._read_health.succeeded()
        try:
            decoded = decode(data, self._format, key, entry.namespace, accept_lossy=self._codec.is_lossy)
        except ObjectError as error:
            log.warning("disk tier: %r is %s", key, error)
            self._quarantine(entry)
            self._board.fail(fetch, error.failure, num_bytes=len(data))
            return
        self._reads.observe(len(data), time.perf_counter() - started)
        if entry.namespace != fetch.namespace:  # a sound file, and somebody who may not have it
            self._board.fail(fetch, FetchFailure.MISMATCH, num_bytes=len(data))
            return
        left = None if entry.expires_at is None else entry.expires_at - self._clock.now()
        if left is not None and left <= 0:
            self._board.fail(fetch, FetchFailure.EXPIRED, num_bytes=len(data))
            return
        found = replace(decoded.found, expires_in_s=left)
        self._board.succeed(fetch, found, num_bytes=len(data), is_lossy=decoded.is_lossy)

    def _probe(self) -> None:
        """Measure the folder's speed with a file of its own: what a fetch costs is known before the first."""
        path = self._folder.temporary_path()
        for num_bytes in _PROBE_BYTES:
            data = os.urandom(num_bytes)  # nothing that a file system stores for less
            try:
                started = time.perf_counter()
                self._files.write(self._folder.temporary_path(), path, [data])
                self._writes.observe(num_bytes, time.perf_counter() - started)
                started = time.perf_counter()
                self._files.read(path, max_bytes=num_bytes)
                self._reads.observe(num_bytes, time.perf_counter() - started)
                self._files.unlink(path)
            except FileRefused as error:
                self._note_fault(self._read_health, f"what was written is {error}")
            except OSError as error:
                self._note_fault(self._write_health, fault_in_words(error))

    def _unlink(self, entries: Iterable[IndexEntry]) -> None:
        """Remove files of entries that have left the index. On the writer's thread. Raises no error.

        A file that stays is found at the next start.
        """
        for entry in entries:
            key = entry.key
            path = self._folder.root / key.path if isinstance(key, ForeignFile) else self._folder.path_of(key)
            try:
                self._files.unlink(path)
            except OSError as error:
                self._note_fault(self._write_health, fault_in_words(error))

    def _quarantine(self, entry: IndexEntry) -> None:
        """Take a damaged file out of use."""
        with self._lock:
            if entry.is_gone:
                return
            self._index.drop(entry)
            assert isinstance(entry.key, ObjectKey)
            path = self._folder.path_of(entry.key)
            self._workers.submit_write(lambda: self._move_away([path]))

    def _move_away(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                self._folder.quarantine(path)
            except OSError as error:
                self._note_fault(self._write_health, fault_in_words(error))
            else:
                with self._lock:
                    self._counters.quarantined += 1

    def _forget(self, entry: IndexEntry) -> None:
        with self._lock:
            self._index.drop(entry)

    def _give_up(self, entry: IndexEntry, fault: str | None, pending_bytes: int) -> None:
        with self._lock:
            self._pending_bytes -= pending_bytes
            self._index.drop(entry)
            self._counters.store_failures += 1
            self._last_fault = fault or self._last_fault

    def _note_fault(self, health: Health, fault: str) -> None:
        if health.is_available:
            log.warning("disk tier: %s; left alone for a while", fault)
        self._last_fault = fault
        health.failed(fault)

    # -- with the lock held

    def _drop_expired(self) -> None:
        expired = self._index.take_expired(self._clock.now())
        if expired:
            self._counters.expired += len(expired)
            self._workers.submit_write(lambda: self._unlink(expired))

    def _evict(self, evicted: Sequence[IndexEntry]) -> None:
        if evicted:
            self._counters.evicted += len(evicted)
            self._workers.submit_write(lambda: self._unlink(evicted))

    def _discard(self, entries: Sequence[IndexEntry]) -> None:
        for entry in entries:
            self._index.drop(entry)
        if entries:
            self._workers.submit_write(lambda: self._unlink(entries))

    # -- start and end

    def _load(self, on_progress: Callable[[int, int], None] | None) -> list[IndexEntry]:
        """Fill the index; return the entries whose files have to go."""
        now, now_unix = self._clock.now(), self._wall_clock()
        entries = []
        for row in load_rows(self._folder, self._format, self._files, on_progress=on_progress):
            if isinstance(row, SkippedFile):
                self._move_away([row.path])
            else:
                entries.append(entry_of_row(row, now, now_unix))
        for path, status in self._folder.foreign_files():
            used_at = now - max(0.0, now_unix - status.st_mtime)
            key = ForeignFile(str(path.relative_to(self._folder.root)))
            entries.append(IndexEntry(key, page_bytes(status.st_size), used_at))
        for entry in entries:
            self._index.load(entry)
        expired = self._index.take_expired(now)
        self._counters.expired += len(expired)
        evicted = self._index.make_room(0) or []
        self._counters.evicted += len(evicted)
        return expired + evicted

    def _save(self) -> None:
        now, now_unix = self._clock.now(), self._wall_clock()
        rows = [row_of_entry(e, e.key, now, now_unix) for e in self._index if isinstance(e.key, ObjectKey)]
        try:
            save_rows(self._folder.index_path, self._folder.temporary_path(), rows, self._files)
        except OSError as error:
            log.warning(
                "disk tier: index not written (%s); the next start reads headers", fault_in_words(error)
            )


def _may_be_tried(health: Health) -> bool:
    """Say whether somebody who asks would be let in, without being that somebody."""
    return health.is_available or health.retry_in_s() == 0.0
