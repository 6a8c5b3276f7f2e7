"""Files as the disk tier uses them: whole, small enough, and never through a link.

Everything that touches the file system goes through one of these methods, so that a test can plant a full
disk, a slow one or a flipped bit in front of real files. All of them may block and raise ``OSError``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from kvcore.codec import Buffer

__all__ = ["FileRefused", "Files", "fault_in_words"]

_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # the last: a FIFO would wait
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_MAX_BUFFERS = 16


class FileRefused(Exception):
    """Something lies there that this program did not write: a link, a folder, a file of a wrong size."""


class Files:
    """The file system."""

    def read(self, path: Path, *, max_bytes: int, min_bytes: int = 0) -> bytearray:
        """Return a regular file's content; its size is checked before memory is asked for."""
        descriptor = self.open(path, _READ_FLAGS)
        try:
            num_bytes = self._check(descriptor, max_bytes=max_bytes, min_bytes=min_bytes)
            data = bytearray(num_bytes)
            view = memoryview(data)
            done = 0
            while done < num_bytes:
                count = self.read_into(descriptor, view[done:])
                if count == 0:
                    raise FileRefused("it shrank while it was read")
                done += count
            return data
        finally:
            os.close(descriptor)

    def read_head(self, path: Path, num_bytes: int, *, max_bytes: int) -> tuple[bytes, os.stat_result]:
        """Return the first bytes of a regular file, and what the system knows of it."""
        descriptor = self.open(path, _READ_FLAGS)
        try:
            self._check(descriptor, max_bytes=max_bytes, min_bytes=0)
            head = bytearray(num_bytes)
            count = self.read_into(descriptor, memoryview(head))
            return bytes(head[:count]), os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def write(self, temporary: Path, path: Path, buffers: Sequence[Buffer]) -> None:
        """Write a file that is there as a whole or not at all, readable by its owner only.

        It is not forced to the medium: after a power cut it may be torn. Its checksum finds that, and the
        price is a recompute; waiting for the medium at every store would cost more than that ever can.
        """
        descriptor = self.open(temporary, _CREATE_FLAGS)
        try:
            try:
                self.write_all(descriptor, buffers)
            finally:
                os.close(descriptor)
            self.rename(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def open(self, path: Path, flags: int) -> int:
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise FileRefused("a symbolic link") from error
            raise

    def read_into(self, descriptor: int, view: memoryview) -> int:
        return os.readv(descriptor, [view])

    def write_all(self, descriptor: int, buffers: Sequence[Buffer]) -> None:
        left = [memoryview(buffer).cast("B") for buffer in buffers]
        while left:
            count = os.writev(descriptor, left[:_MAX_BUFFERS])
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def rename(self, source: Path, target: Path) -> None:
        """Move within one file system, over what is there; the target's folder is made if it is missing."""
        try:
            source.replace(target)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                target.parent.mkdir(0o700)
            source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def _check(self, descriptor: int, *, max_bytes: int, min_bytes: int) -> int:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileRefused("not a regular file")
        if not min_bytes <= status.st_size <= max_bytes:
            raise FileRefused(f"{status.st_size} bytes")
        return status.st_size


_WORDS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "disk quota exceeded",
    errno.EIO: "input/output error",
    errno.EROFS: "read-only file system",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files in the system",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.ENOENT: "the folder is missing",
    errno.ESTALE: "the mount is stale",
}


def fault_in_words(error: OSError) -> str:
    """Return what went wrong, for an operator, without a path."""
    return _WORDS.get(error.errno or 0) or f"{os.strerror(error.errno or 0)} ({error.errno})"
