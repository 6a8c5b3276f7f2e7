"""A disk tier's reading side: fetches that are begun by the engine and ended by reader threads.

::

    file --- missing ------------------------------------> MISSING, forgotten
         --- refused: not a file of ours, too long -------> CORRUPT, quarantined
         --- an error of the medium ----------------------> UNREACHABLE, and reading is left alone for a while
         --- read --- not the object that it should be ---> CORRUPT, MISMATCH, EXPIRED, quarantined
                  --- sound, of another namespace --------> MISMATCH, stays
                  --- sound ------------------------------> the object

After a fault the next fetch that is begun when the back-off is over is the trial: its outcome decides
whether reading works again. A trial that never ends counts as failed.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from kvcore.codec import Codec
from kvcore.keys import PrefixDigest
from kvcore.tiers.disk_contents import DiskContents, Job
from kvcore.tiers.disk_files import FileRefused, fault_in_words
from kvcore.tiers.fetches import FetchBoard, PendingFetch
from kvcore.tiers.health import Health, HealthState
from kvcore.tiers.index import IndexEntry
from kvcore.tiers.interface import FetchFailure, ObjectKey
from kvcore.tiers.objects import CHECKSUM_BYTES, HEADER_BYTES, ObjectError, decode, max_object_bytes
from kvcore.tiers.speed import SpeedMeter

__all__ = ["DiskReader"]

log = logging.getLogger(__name__)


class DiskReader:
    """Bring objects from their files. ``begin`` and ``watch`` belong to the engine's thread."""

    def __init__(
        self,
        contents: DiskContents,
        board: FetchBoard,
        codec: Codec,
        *,
        health: Health,
        submit_read: Callable[[Job], bool],
        stuck_after_s: float,
    ) -> None:
        self.health = health
        self.speed = SpeedMeter()
        self._contents = contents
        self._board = board
        self._codec = codec
        self._submit_read = submit_read
        self._stuck_after_s = stuck_after_s
        self._trial: PendingFetch | None = None
        """The fetch whose outcome decides whether reading works again."""

    def begin(self, key: ObjectKey, entry: IndexEntry, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        """Start to bring a whole entry; False while reading is left alone or too much waits."""
        if not self.health.may_try():
            return False
        fetch = self._board.start(key, namespace=namespace, timeout_s=timeout_s)
        if self.health.state is HealthState.HALF_OPEN:
            self._trial = fetch
        if not self._submit_read(lambda: self._read(fetch, entry)):
            self._board.retract(fetch)
            return False
        return True

    def watch(self, hanging_s: float | None) -> None:
        """Note reads that hang, and a trial that is over without an outcome.

        ``hanging_s``: how long the slowest read has been running while fetches time out; None: none does.
        """
        if hanging_s is not None and hanging_s > self._stuck_after_s:
            self._contents.note_fault(self.health, "reads hang")
        trial = self._trial
        if trial is not None and trial.is_over:
            self._trial = None
            if self.health.state is HealthState.HALF_OPEN:  # timed out, cancelled, or never begun
                self._contents.note_fault(self.health, "the retry did not end in time")

    def _read(self, fetch: PendingFetch, entry: IndexEntry) -> None:
        """Bring one object. On a reader's thread."""
        if fetch.is_over:
            return
        contents, key = self._contents, fetch.key
        started = time.perf_counter()
        try:
            data = contents.files.read(
                contents.folder.path_of(key),
                max_bytes=max_object_bytes(contents.format, key.kind),
                min_bytes=HEADER_BYTES + CHECKSUM_BYTES,
            )
        except FileNotFoundError:
            self.health.succeeded()
            contents.forget(entry)
            self._board.fail(fetch, FetchFailure.MISSING)
            return
        except FileRefused:
            self.health.succeeded()
            contents.quarantine(entry)
            self._board.fail(fetch, FetchFailure.CORRUPT)
            return
        except OSError as error:
            contents.note_fault(self.health, fault_in_words(error))
            if error.errno == errno.EIO:  # the medium; this file would only fail again
                with contents.lock:
                    contents.discard([entry])
            self._board.fail(fetch, FetchFailure.UNREACHABLE)
            return
        self.health.succeeded()
        try:
            decoded = decode(data, contents.format, key, entry.namespace, accept_lossy=self._codec.is_lossy)
        except ObjectError as error:
            log.warning("disk tier: %r is %s", key, error)
            contents.quarantine(entry)
            self._board.fail(fetch, error.failure, num_bytes=len(data))
            return
        self.speed.observe(len(data), time.perf_counter() - started)
        if entry.namespace != fetch.namespace:  # a sound file, and somebody who may not have it
            self._board.fail(fetch, FetchFailure.MISMATCH, num_bytes=len(data))
            return
        left = None if entry.expires_at is None else entry.expires_at - contents.clock.now()
        if left is not None and left <= 0:
            self._board.fail(fetch, FetchFailure.EXPIRED, num_bytes=len(data))
            return
        found = replace(decoded.found, expires_in_s=left)
        self._board.succeed(fetch, found, num_bytes=len(data), is_lossy=decoded.is_lossy)
