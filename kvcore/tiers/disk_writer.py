"""A disk tier's writing side: room that is reserved by the engine and filled by the writer's thread.

::

    reserve ---> complete ---> encode, make room for its true size, write under another name, rename
      room         |             |                                             |
      and budget   abandon       give up: counted, the room is free again      whole: lookup says YES

Payloads that wait stay within ``max_pending_bytes``. A removal of what is being written is queued behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvcore.codec import Codec, CodecError
from kvcore.tiers.disk_contents import DiskContents, Job
from kvcore.tiers.disk_files import fault_in_words
from kvcore.tiers.disk_index import page_bytes
from kvcore.tiers.divergences import DivergenceLog
from kvcore.tiers.health import Health
from kvcore.tiers.index import IndexEntry
from kvcore.tiers.interface import CacheObject, ObjectKey, StoreTicket
from kvcore.tiers.objects import ObjectError, encode
from kvcore.tiers.speed import SpeedMeter

__all__ = ["DiskWriter"]

_MAX_DIVERGENCES = 4096


class DiskWriter:
    """Write objects into their files. All but the writing itself belongs to the engine's thread."""

    def __init__(
        self,
        contents: DiskContents,
        codec: Codec,
        *,
        health: Health,
        submit_write: Callable[[Job], bool],
        max_pending_bytes: int,
    ) -> None:
        self.health = health
        self.speed = SpeedMeter()
        self.divergences = DivergenceLog(_MAX_DIVERGENCES)
        self._contents = contents
        self._codec = codec
        self._submit_write = submit_write
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        self._reserved: dict[StoreTicket, IndexEntry] = {}
        self._last_ticket = 0

    def reserve(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        """Make room for a file; None: it is there or on its way already, or cannot be taken now."""
        contents = self._contents
        with contents.lock:
            contents.drop_expired()
            if contents.index.get(key) is not None:
                return None
            is_willing = (
                not contents.is_closed
                and self.health.would_let_in()
                and self._pending_bytes + num_bytes <= self._max_pending_bytes
            )
            reservation = contents.index.reserve(key, page_bytes(num_bytes)) if is_willing else None
            if reservation is None:
                contents.counters.refused_stores += 1
                return None
            entry = reservation.entry
            self._pending_bytes += entry.num_bytes
            contents.evict(reservation.evicted)
            self._last_ticket += 1
            ticket = StoreTicket(self._last_ticket)
            self._reserved[ticket] = entry
            return ticket

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        """Queue the content of a reserved file."""
        with self._contents.lock:
            entry = self._reserved.pop(ticket)
            pending_bytes = entry.num_bytes
            entry.namespace, entry.parent, entry.depth = stored.namespace, stored.parent, stored.depth
            if stored.expires_in_s is not None:
                entry.expires_at = self._contents.clock.now() + stored.expires_in_s
        if not self._submit_write(lambda: self._write(entry, stored, pending_bytes)):
            self._give_up(entry, "closed", pending_bytes)

    def abandon(self, ticket: StoreTicket) -> None:
        """Give a reservation back."""
        with self._contents.lock:
            entry = self._reserved.pop(ticket)
            self._pending_bytes -= entry.num_bytes
            self._contents.index.drop(entry)

    def _write(self, entry: IndexEntry, stored: CacheObject, pending_bytes: int) -> None:
        """Write one object. On the writer's thread."""
        contents = self._contents
        started = time.perf_counter()
        try:
            encoded = encode(stored, contents.format, self._codec, now_unix=contents.wall_clock())
        except (ObjectError, CodecError) as error:
            self._give_up(entry, str(error), pending_bytes)
            return
        with contents.lock:
            evicted = None if entry.is_gone else contents.index.resize(entry, page_bytes(encoded.num_bytes))
        contents.unlink(evicted or ())
        if evicted is None or not self.health.may_try():
            self._give_up(entry, None, pending_bytes)
            return
        path = contents.folder.path_of(stored.key)
        try:
            contents.files.write(contents.folder.temporary_path(), path, encoded.buffers)
        except OSError as error:
            fault = fault_in_words(error)
            contents.note_fault(self.health, fault)
            self._give_up(entry, fault, pending_bytes)
            return
        self.health.succeeded()
        self.speed.observe(encoded.num_bytes, time.perf_counter() - started)
        with contents.lock:
            self._pending_bytes -= pending_bytes
            contents.counters.evicted += len(evicted)
            if entry.is_gone:  # removed meanwhile: its removal is queued behind this
                contents.counters.store_failures += 1
                return
            contents.index.admit(entry, contents.clock.now())
            contents.counters.stored += 1
            contents.counters.stored_bytes += encoded.num_bytes
            self.divergences.note(stored.key, encoded.divergence)

    def _give_up(self, entry: IndexEntry, fault: str | None, pending_bytes: int) -> None:
        contents = self._contents
        with contents.lock:
            self._pending_bytes -= pending_bytes
            contents.index.drop(entry)
            contents.counters.store_failures += 1
            contents.last_fault = fault or contents.last_fault
