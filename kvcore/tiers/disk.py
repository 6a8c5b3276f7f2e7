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

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from kvcore.clock import Clock, MonotonicClock
from kvcore.codec import Codec, Divergence, NoCodec
from kvcore.keys import TOKEN_BYTES, PrefixDigest
from kvcore.tiers.disk_contents import DiskContents
from kvcore.tiers.disk_files import FileRefused, Files, fault_in_words
from kvcore.tiers.disk_folder import DiskFolder
from kvcore.tiers.disk_reader import DiskReader
from kvcore.tiers.disk_writer import DiskWriter
from kvcore.tiers.fetches import FetchBoard
from kvcore.tiers.health import Health
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    ObjectFormat,
    ObjectKey,
    Presence,
    StoreTicket,
    TierStats,
)
from kvcore.tiers.objects import CHECKSUM_BYTES, HEADER_BYTES
from kvcore.tiers.outages import OutageLog
from kvcore.tiers.workers import Workers

__all__ = ["DiskTier"]

_PROBE_BYTES = (4 << 10, 256 << 10)


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
        outages: OutageLog | None = None,
    ) -> None:
        """Open the folder and learn what is in it; ``on_progress(done, total)`` tells how far that is.

        ``max_pending_bytes``: payloads that may wait to be written. ``stuck_after_s``: a read that takes
        longer while fetches time out makes the tier back off. ``outages`` is shared by the parts of a tier.
        Raises ``TierStartError`` for a folder that cannot be used.
        """
        self._format = object_format
        self._codec = codec = codec or NoCodec()
        files, clock = files or Files(), clock or MonotonicClock()
        self._board = FetchBoard(self.name, clock=clock, on_ready=on_ready)
        self._folder = DiskFolder(Path(path), object_format, files)
        health, write_health = Health(clock), Health(clock, seed=1)
        outages = outages or OutageLog(self.name)
        outages.watch(health, "reading")
        outages.watch(write_health, "writing")
        self._contents = DiskContents(
            self._folder,
            object_format,
            max_bytes,
            files=files,
            clock=clock,
            wall_clock=wall_clock,
            write_health=write_health,
            submit_write=lambda job: self._workers.submit_write(job),
        )
        try:
            left = self._contents.load(on_progress)
        except BaseException:
            self._folder.close()
            raise
        self._workers = Workers("kv-disk", num_readers=num_readers, max_queued_reads=max_queued_reads)
        self._reader = DiskReader(
            self._contents,
            self._board,
            codec,
            health=health,
            submit_read=self._workers.submit_read,
            stuck_after_s=stuck_after_s,
        )
        self._writer = DiskWriter(
            self._contents,
            codec,
            health=write_health,
            submit_write=self._workers.submit_write,
            max_pending_bytes=max_pending_bytes,
        )
        self._workers.submit_write(lambda: self._contents.unlink(left))
        self._workers.submit_write(self._probe)

    # -- the engine's thread

    @property
    def is_lossy(self) -> bool:
        return self._codec.is_lossy

    def lookup(self, key: ObjectKey) -> Presence:
        contents = self._contents
        with contents.lock:
            contents.drop_expired()
            entry = contents.index.get(key)
            if entry is None or not self._reader.health.would_let_in():
                contents.counters.misses += 1
                return Presence.NO
            return Presence.YES if entry.is_whole else Presence.COMING

    def prepare(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        return self._writer.reserve(
            key, num_bytes + HEADER_BYTES + TOKEN_BYTES * self._format.block_size + CHECKSUM_BYTES
        )

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        self._writer.complete(ticket, stored)

    def abandon(self, ticket: StoreTicket) -> None:
        self._writer.abandon(ticket)

    def fetch(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        contents = self._contents
        with contents.lock:
            contents.drop_expired()
            entry = contents.index.get(key)
            if (
                entry is None
                or not entry.is_whole
                or contents.is_closed
                or not self._reader.begin(key, entry, namespace=namespace, timeout_s=timeout_s)
            ):
                contents.counters.misses += 1
                return False
            contents.index.touch(entry, contents.clock.now())
            return True

    def cancel(self, keys: Iterable[ObjectKey]) -> None:
        self._board.cancel(keys)

    def poll(self) -> list[Fetched]:
        num_late = self._board.expire()
        self._reader.watch(self._workers.longest_read_s() if num_late else None)
        return self._board.take()

    def remove(self, keys: Iterable[ObjectKey]) -> None:
        contents = self._contents
        with contents.lock:
            contents.discard([entry for key in keys if (entry := contents.index.get(key)) is not None])

    def remove_prefixes(self, digests: Iterable[PrefixDigest]) -> int:
        with self._contents.lock:
            chosen = self._contents.index.below(digests)
            self._contents.discard(chosen)
            return sum(entry.is_whole for entry in chosen)

    def clear(self, namespace: PrefixDigest | None = None) -> int:
        with self._contents.lock:
            chosen = self._contents.index.select(namespace)
            self._contents.discard(chosen)
            return sum(entry.is_whole for entry in chosen)

    def keys(self) -> Iterable[ObjectKey]:
        with self._contents.lock:
            return [entry.key for entry in self._contents.index if isinstance(entry.key, ObjectKey)]

    def stats(self) -> TierStats:
        contents = self._contents
        with contents.lock:
            contents.drop_expired()
            return replace(
                contents.counters,
                num_objects=contents.index.num_objects,
                num_bytes=contents.index.num_bytes,
                is_available=self._reader.health.is_available and self._writer.health.is_available,
                hits=self._board.fetched,
                fetched=self._board.fetched,
                fetched_bytes=self._board.fetched_bytes,
                failures=dict(self._board.failures),
                latency_s=self._reader.speed.latency_s,
                read_bytes_per_s=self._reader.speed.bytes_per_s,
                write_bytes_per_s=self._writer.speed.bytes_per_s,
                last_fault=contents.last_fault,
            )

    def take_divergences(self) -> list[tuple[ObjectKey, Divergence]]:
        """Return what a lossy codec did to the objects stored since the last call (the latest)."""
        return self._writer.divergences.take()

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless the index agrees with itself."""
        with self._contents.lock:
            self._contents.index.check_integrity()

    def close(self) -> None:
        with self._contents.lock:
            if self._contents.is_closed:
                return
            self._contents.is_closed = True
        has_ended = self._workers.close()
        self._board.cancel_all()
        if has_ended:  # a stuck thread might still change what the index would say
            self._contents.save()
        self._folder.close()

    # -- the writer's thread

    def _probe(self) -> None:
        """Measure the folder's speed with a file of its own: what a fetch costs is known before the first."""
        contents = self._contents
        path = self._folder.temporary_path()
        for num_bytes in _PROBE_BYTES:
            data = os.urandom(num_bytes)  # nothing that a file system stores for less
            try:
                started = time.perf_counter()
                contents.files.write(self._folder.temporary_path(), path, [data])
                self._writer.speed.observe(num_bytes, time.perf_counter() - started)
                started = time.perf_counter()
                contents.files.read(path, max_bytes=num_bytes)
                self._reader.speed.observe(num_bytes, time.perf_counter() - started)
                contents.files.unlink(path)
            except FileRefused as error:
                contents.note_fault(self._reader.health, f"what was written is {error}")
            except OSError as error:
                contents.note_fault(self._writer.health, fault_in_words(error))
