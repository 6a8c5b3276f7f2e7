"""Snapshots: what is on the device, written to a folder while serving goes on, and read back into the tiers.

::

    save      nodes ──► saves of the next plans ──► queue ──► thread ──► folder, renamed when it is whole
    restore   folder ──► thread ──► queue ──► tiers (host, disk, Redis), from where requests bring it up

Both are pieces of work between two steps (``SnapshotWork``); the files belong to a thread of their own, and
the queue between the two is short, so neither waits long for the other nor fills the memory.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from kvcore.keys import PrefixDigest
from kvcore.manager import CacheManager
from kvcore.node import Node, NodeState
from kvcore.tails import Tail
from kvcore.tiers.errors import SnapshotError
from kvcore.tiers.interface import CacheObject, ObjectFormat, ObjectKind, Presence
from kvcore.tiers.objects import ObjectError
from kvcore.tiers.snapshot import read_snapshot, snapshot_path, write_snapshot
from kvcore.tiers.stack import StoreReason
from server.engine.admin_messages import AdminErrorKind, SnapshotDone
from server.engine.cache_ops.interface import OperationRefused, SnapshotStep, SnapshotWork
from server.engine.tiering.tiering import Tiering
from server.engine.tiering.wanted import Wanted, block_object, logits_object, partial_object

__all__ = ["Snapshots"]

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 32
"""Objects between the worker and the folder, or between the folder and the tiers."""
JOIN_S = 0.05
"""For the thread to notice that nobody wants its work any more: the engine does not wait for a stuck disk."""

Export = Callable[[], Wanted | None]


class Snapshots:
    """Save and restore under one root. Engine's thread; each work blocks for nothing but memory."""

    def __init__(
        self,
        root: Path | None,
        cache: CacheManager,
        tiering: Tiering | None,
        *,
        object_format: ObjectFormat,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._cache = cache
        self._tiering = tiering
        self._format = object_format
        self._wall_clock = wall_clock
        self._left: dict[Path, _Writer] = {}
        """Writers of saves; one that is stuck may still be there when its save has been given up."""

    def save(self, name: str, *, namespace: PrefixDigest | None, replace: bool) -> SnapshotWork:
        """Write what is on the device now, of one namespace or of all; what goes meanwhile is left out.

        Raises ``OperationRefused``: UNSUPPORTED, EXISTS, INVALID (``name``); FAILED while it is written.
        """
        path, tiering = self._path(name)
        if path.exists() and not replace:
            raise OperationRefused(AdminErrorKind.EXISTS, f"there is a snapshot {name!r}", "name")
        exports = self._exports(namespace)
        building = path.parent / f".{name}.next" if replace else path
        left = self._left.get(building)
        if left is not None and not left.is_over:
            reason = f"an earlier save of {name!r} is still being ended"
            raise OperationRefused(AdminErrorKind.FAILED, reason, "name")
        writer = self._left[building] = _Writer(building, self._format, len(exports), self._wall_clock())
        return self._save(exports, tiering, writer, path)

    def restore(self, name: str) -> SnapshotWork:
        """Read a snapshot into the tiers.

        Raises ``OperationRefused``: UNSUPPORTED, NOT_FOUND, INVALID (``name``), FAILED.
        """
        path, tiering = self._path(name)
        if not path.exists():
            raise OperationRefused(AdminErrorKind.NOT_FOUND, f"there is no snapshot {name!r}", "name")
        return self._restore(_Reader(path, self._format, self._wall_clock()), tiering)

    # -- inside -------------------------------------------------------------------------------------

    def _path(self, name: str) -> tuple[Path, Tiering]:
        if self._root is None or self._tiering is None:
            raise OperationRefused(AdminErrorKind.UNSUPPORTED, "no folder for snapshots is configured")
        try:
            return snapshot_path(self._root, name), self._tiering
        except SnapshotError as error:
            raise OperationRefused(AdminErrorKind.INVALID, str(error), "name") from error

    def _save(self, exports: list[Export], tiering: Tiering, writer: _Writer, path: Path) -> SnapshotWork:
        num_done = num_bytes = num_skipped = num_asked = 0
        arrived: list[CacheObject | None] = []
        try:
            while num_done + num_skipped < len(exports):
                while num_asked < len(exports) and num_asked - num_done - num_skipped < MAX_IN_FLIGHT:
                    tiering.offloader.export(exports[num_asked], arrived.append)
                    num_asked += 1
                while arrived and writer.has_room:
                    stored = arrived.pop(0)
                    if stored is None:
                        num_skipped += 1
                        continue
                    writer.put(stored)
                    num_done += 1
                    num_bytes += len(stored.payload)
                writer.check()
                yield SnapshotStep(num_done, len(exports), num_bytes, num_skipped)
            while not writer.finish():
                writer.check()
                yield SnapshotStep(num_done, len(exports), num_bytes, num_skipped)
            while not writer.is_over:
                yield SnapshotStep(num_done, len(exports), num_bytes, num_skipped)
            writer.check()
            _move_into_place(writer.path, path)
        finally:
            writer.stop()
            if writer.is_over:
                self._left.pop(writer.path, None)
        return SnapshotDone(num_done, num_bytes, num_skipped)

    def _restore(self, reader: _Reader, tiering: Tiering) -> SnapshotWork:
        num_done = num_bytes = num_skipped = 0
        try:
            while not reader.is_over:
                for found in reader.take():
                    if isinstance(found, CacheObject) and _keep(tiering, found):
                        num_done += 1
                        num_bytes += len(found.payload)
                    else:
                        num_skipped += 1
                reader.check()
                yield SnapshotStep(num_done, max(reader.num_total, num_done), num_bytes, num_skipped)
        finally:
            reader.stop()
        return SnapshotDone(num_done, num_bytes, num_skipped)

    def _exports(self, namespace: PrefixDigest | None) -> list[Export]:
        """Return what there is to write, parents first: blocks, and the ends of exact prompts."""
        exports: list[Export] = []
        for root in self._cache.tree.roots.values():
            if namespace is not None and root.space.seed != namespace:
                continue
            stack = [root]
            while stack:
                node = stack.pop()
                if not node.is_root:
                    exports.append(_of_block(self._cache, node))
                for tail in (node.tails or {}).values():
                    if isinstance(tail.key, bytes):
                        kinds = (ObjectKind.PARTIAL, ObjectKind.LOGITS) if tail.key else (ObjectKind.LOGITS,)
                        exports.extend(_of_tail(self._cache, tail, kind) for kind in kinds)
                stack.extend(child for child in node.children.values() if child.owner is None)
        return exports


def _of_block(cache: CacheManager, node: Node) -> Export:
    def find() -> Wanted | None:
        is_there = node.parent is not None and node.state is NodeState.READY
        return block_object(node) if is_there and node not in cache.restorer.loading else None

    return find


def _of_tail(cache: CacheManager, tail: Tail, kind: ObjectKind) -> Export:
    def find() -> Wanted | None:
        if (tail.node.tails or {}).get(tail.key) is not tail or tail in cache.restorer.loading_tails:
            return None
        if kind is ObjectKind.LOGITS:
            return logits_object(tail)
        if not isinstance(tail.key, bytes):
            return None
        node, _ = cache.tree.find_partial(tail.node, tail.key, None, float("-inf"))
        return None if node is None or node in cache.restorer.loading else partial_object(tail, node)

    return find


def _keep(tiering: Tiering, stored: CacheObject) -> bool:
    stack = tiering.blocks if stored.key.kind is ObjectKind.BLOCK else tiering.tails
    start = (stored.depth - 1) * tiering.cache.block_size
    ticket = stack.prepare(stored.key, reason=StoreReason.EVICTED, start_position=start)
    if ticket is None:
        return stack.lookup(stored.key).presence is Presence.YES
    stack.complete(ticket, stored)
    return True


def _move_into_place(written: Path, path: Path) -> None:
    if written == path:
        return
    old = path.parent / f".{path.name}.old"
    try:
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        written.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OperationRefused(AdminErrorKind.FAILED, "the snapshot could not replace the old one") from error


class _Worker(ABC):
    """A thread, the queue to or from it, and how it ended."""

    def __init__(self) -> None:
        self._queue: queue.Queue[CacheObject | ObjectError | None] = queue.Queue(MAX_IN_FLIGHT)
        self._cancelled = threading.Event()
        self._error: SnapshotError | None = None
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``OperationRefused`` if the thread has failed."""
        if self._error is not None:
            raise OperationRefused(AdminErrorKind.FAILED, str(self._error))

    def stop(self) -> None:
        """End the thread, whatever it has done."""
        self._cancelled.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(JOIN_S)

    def _run(self) -> None:
        try:
            self._work()
        except SnapshotError as error:
            self._error = error
        except Exception:
            log.exception("the thread of a snapshot has failed")
            self._error = SnapshotError("an unexpected fault, see the log")

    @abstractmethod
    def _work(self) -> None:
        """Do it all, on the thread."""


class _Writer(_Worker):
    """Writes what it is given. Its thread takes from the queue until None."""

    def __init__(self, path: Path, object_format: ObjectFormat, num_expected: int, now_unix: float) -> None:
        self.path = path
        self._format = object_format
        self._num_expected = num_expected
        self._now_unix = now_unix
        if path.name.startswith("."):  # left by a save that was killed
            shutil.rmtree(path, ignore_errors=True)
        super().__init__()

    @property
    def has_room(self) -> bool:
        return not self._queue.full()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def put(self, stored: CacheObject) -> None:
        """Hand one object over; there must be room."""
        self._queue.put_nowait(stored)

    def finish(self) -> bool:
        """Say that nothing more comes. False: there is no room to say it; try later."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return False
        return True

    def _objects(self) -> Iterator[CacheObject]:
        while not self._cancelled.is_set():
            stored = self._queue.get()
            if not isinstance(stored, CacheObject):
                return
            yield stored

    def _work(self) -> None:
        write_snapshot(
            self.path,
            self._objects(),
            self._format,
            now_unix=self._now_unix,
            num_expected=self._num_expected,
            is_cancelled=self._cancelled.is_set,
        )
        if self._cancelled.is_set():
            shutil.rmtree(self.path, ignore_errors=True)


class _Reader(_Worker):
    """Reads a snapshot into the queue."""

    def __init__(self, path: Path, object_format: ObjectFormat, now_unix: float) -> None:
        self._path = path
        self._format = object_format
        self._now_unix = now_unix
        self.num_total = 0
        super().__init__()

    @property
    def is_over(self) -> bool:
        """Say whether everything has been taken."""
        return not self._thread.is_alive() and self._queue.empty()

    def take(self) -> list[CacheObject | ObjectError]:
        """Return what is there now."""
        found: list[CacheObject | ObjectError] = []
        with contextlib.suppress(queue.Empty):
            while len(found) < MAX_IN_FLIGHT:
                entry = self._queue.get_nowait()
                if entry is not None:
                    found.append(entry)
        return found

    def _progress(self, _done: int, total: int) -> None:
        self.num_total = total

    def _work(self) -> None:
        for found in read_snapshot(
            self._path,
            self._format,
            now_unix=self._now_unix,
            on_progress=self._progress,
            is_cancelled=self._cancelled.is_set,
        ):
            while not self._cancelled.is_set():
                try:
                    self._queue.put(found, timeout=0.1)
                    break
                except queue.Full:
                    continue
