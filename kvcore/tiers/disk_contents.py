"""What is in a disk tier's folder: the index in memory, and the files that leave it.

::

    start    load:  index file or headers ---> index        what is damaged ---> quarantine
    then     drop_expired, evict, discard:    out of the index at once, the files on the writer's thread
             quarantine                       the same, for a look
    end      save:  index ---> index file

The index is the truth while the tier is open. ``lock`` guards it, the counters and ``is_closed``; the
methods under "with the lock held" expect it, the others take it when they need it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvcore.clock import Clock
from kvcore.tiers.disk_files import Files, fault_in_words
from kvcore.tiers.disk_folder import DiskFolder
from kvcore.tiers.disk_index import SkippedFile, entry_of_row, load_rows, page_bytes, row_of_entry, save_rows
from kvcore.tiers.health import Health
from kvcore.tiers.index import ForeignFile, IndexEntry, ObjectIndex
from kvcore.tiers.interface import ObjectFormat, ObjectKey, TierStats

__all__ = ["DiskContents"]

log = logging.getLogger(__name__)

Job = Callable[[], None]


class DiskContents:
    """See the module's text. Shared by the engine's thread, the readers and the writer of one tier."""

    def __init__(
        self,
        folder: DiskFolder,
        object_format: ObjectFormat,
        max_bytes: int,
        *,
        files: Files,
        clock: Clock,
        wall_clock: Callable[[], float],
        write_health: Health,
        submit_write: Callable[[Job], bool],
    ) -> None:
        """Begin empty. ``submit_write`` queues a job for the writer; ``load`` does not call it."""
        self.folder = folder
        self.format = object_format
        self.files = files
        self.clock = clock
        self.wall_clock = wall_clock
        self.lock = threading.Lock()
        self.index = ObjectIndex(max_bytes)
        self.counters = TierStats(max_bytes=max_bytes)
        self.last_fault: str | None = None
        self.is_closed = False
        self._write_health = write_health
        self._submit_write = submit_write

    def note_fault(self, health: Health, fault: str) -> None:
        """Leave one direction alone for a while."""
        self.last_fault = fault
        health.failed(fault)

    def forget(self, entry: IndexEntry) -> None:
        """Drop an entry whose file is gone already."""
        with self.lock:
            self.index.drop(entry)

    def quarantine(self, entry: IndexEntry) -> None:
        """Take a damaged file out of use."""
        with self.lock:
            if entry.is_gone:
                return
            self.index.drop(entry)
            assert isinstance(entry.key, ObjectKey)
            path = self.folder.path_of(entry.key)
            self._submit_write(lambda: self._move_away([path]))

    # -- with the lock held

    def drop_expired(self) -> None:
        """Let go of what is past its lifetime."""
        expired = self.index.take_expired(self.clock.now())
        if expired:
            self.counters.expired += len(expired)
            self._submit_write(lambda: self.unlink(expired))

    def evict(self, evicted: Sequence[IndexEntry]) -> None:
        """Let go of the files of entries that made room and have left the index."""
        if evicted:
            self.counters.evicted += len(evicted)
            self._submit_write(lambda: self.unlink(evicted))

    def discard(self, entries: Sequence[IndexEntry]) -> None:
        """Let go of entries and their files."""
        for entry in entries:
            self.index.drop(entry)
        if entries:
            self._submit_write(lambda: self.unlink(entries))

    # -- on the writer's thread

    def unlink(self, entries: Iterable[IndexEntry]) -> None:
        """Remove files of entries that have left the index. Raises no error.

        A file that stays is found at the next start.
        """
        for entry in entries:
            key = entry.key
            path = self.folder.root / key.path if isinstance(key, ForeignFile) else self.folder.path_of(key)
            try:
                self.files.unlink(path)
            except OSError as error:
                self.note_fault(self._write_health, fault_in_words(error))

    def _move_away(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                self.folder.quarantine(path)
            except OSError as error:
                self.note_fault(self._write_health, fault_in_words(error))
            else:
                with self.lock:
                    self.counters.quarantined += 1

    # -- start and end

    def load(self, on_progress: Callable[[int, int], None] | None) -> list[IndexEntry]:
        """Fill the index; return the entries whose files have to go."""
        now, now_unix = self.clock.now(), self.wall_clock()
        entries = []
        for row in load_rows(self.folder, self.format, self.files, on_progress=on_progress):
            if isinstance(row, SkippedFile):
                self._move_away([row.path])
            else:
                entries.append(entry_of_row(row, now, now_unix))
        for path, status in self.folder.foreign_files():
            used_at = now - max(0.0, now_unix - status.st_mtime)
            key = ForeignFile(str(path.relative_to(self.folder.root)))
            entries.append(IndexEntry(key, page_bytes(status.st_size), used_at))
        for entry in entries:
            self.index.load(entry)
        expired = self.index.take_expired(now)
        self.counters.expired += len(expired)
        evicted = self.index.make_room(0) or []
        self.counters.evicted += len(evicted)
        return expired + evicted

    def save(self) -> None:
        """Write the index file, for a quick start the next time."""
        now, now_unix = self.clock.now(), self.wall_clock()
        rows = [row_of_entry(e, e.key, now, now_unix) for e in self.index if isinstance(e.key, ObjectKey)]
        try:
            save_rows(self.folder.index_path, self.folder.temporary_path(), rows, self.files)
        except OSError as error:
            log.warning(
                "disk tier: index not written (%s); the next start reads headers", fault_in_words(error)
            )
