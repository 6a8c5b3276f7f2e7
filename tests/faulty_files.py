"""Real files with planted faults: an error, a pause, a flipped bit."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

from kvcore.tiers.disk_files import Files


class FaultyFiles(Files):
    """``Files`` that fail as told, from any thread. ``None`` is no fault."""

    def __init__(self) -> None:
        self.open_error: int | None = None
        self.read_error: int | None = None
        self.write_error: int | None = None
        """After half of the bytes are written."""
        self.damage: Callable[[memoryview], None] | None = None
        """Applied to what is read."""
        self.may_read = threading.Event()
        """Reads wait for it."""
        self.may_read.set()
        self.num_waiting = 0

    def open(self, path, flags):
        if self.open_error is not None and not flags & os.O_CREAT:
            raise OSError(self.open_error, os.strerror(self.open_error), str(path))
        return super().open(path, flags)

    def read_into(self, descriptor, view):
        if not self.may_read.is_set():
            self.num_waiting += 1
            assert self.may_read.wait(60)
        if self.read_error is not None:
            raise OSError(self.read_error, os.strerror(self.read_error))
        count = super().read_into(descriptor, view)
        if self.damage is not None:
            self.damage(view[:count])
        return count

    def write_all(self, descriptor, buffers):
        if self.write_error is None:
            super().write_all(descriptor, buffers)
            return
        data = b"".join(buffers)
        super().write_all(descriptor, [data[: len(data) // 2]])
        raise OSError(self.write_error, os.strerror(self.write_error))


FAULTS = {
    "disk full": errno.ENOSPC,
    "input/output error": errno.EIO,
    "read-only": errno.EROFS,
    "too many open files": errno.EMFILE,
    "no permission": errno.EACCES,
}
