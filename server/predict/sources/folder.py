"""A model's folder as it was when it was checked: which files, where they really are, and that they stay so.

A file that was verified and a file that is loaded are one file only if nobody changed it between: every file
is remembered by device, inode, size and both times. The change time is the kernel's own: nobody can set it
back, so that a file (or folder) that is swapped and put back is noticed as well.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.predict.errors import ModelRefusedError

__all__ = ["CheckedFile", "Hold", "Identity", "SourceFolder", "identity_of", "list_folder"]

MAX_ENTRIES = 10_000
MAX_DEPTH = 8
_NEVER_READ = {".git", ".cache"}
"""Version control and download bookkeeping at a folder's top. A loader reads nothing there."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one state of one file, or of a folder's list of names, from any other."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """One file of a model."""

    name: str
    """Relative to the folder, with forward slashes."""
    path: Path
    """Where its bytes are, links followed."""
    identity: Identity
    sha256: str | None = None
    """Hexadecimal; None: no manifest asked for it."""


class Hold(Protocol):
    """Keeps files where they are."""

    def close(self) -> None:
        """Let go. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """A local folder that may be loaded. Immutable; any thread. Whoever got it closes it."""

    folder: Path
    root: Path
    """Links inside stay below it."""
    kind: str
    """"folder", "hub" or "mlflow"."""
    files: tuple[CheckedFile, ...]
    folders: tuple[tuple[Path, Identity], ...]
    notes: tuple[str, ...] = ()
    """For operators: what a moving name stood for, what was not checked."""
    hold: Hold | None = None
    """On a folder that is ours to remove."""

    @property
    def is_verified(self) -> bool:
        """Say whether every file was compared with a manifest's digest."""
        return all(file.sha256 is not None for file in self.files)

    @property
    def num_bytes(self) -> int:
        return sum(file.identity.num_bytes for file in self.files)

    def close(self) -> None:
        """Let go of the files: they may be removed from now on. Idempotent."""
        if self.hold is not None:
            self.hold.close()

    def check_unchanged(self) -> None:
        """Call after the last byte was read: raise ``ModelRefusedError`` if anything changed since the check.

        Also if a file came or went, or a link leads to another one. Reads no contents.
        """
        for file in self.files:
            if _identity_or_none(self.folder / file.name) != file.identity:
                raise ModelRefusedError(f"{file.name} changed while the model was being loaded")
        for folder, identity in self.folders:
            if _identity_or_none(folder) != identity:
                raise ModelRefusedError("the model's folder changed while it was being loaded")


def list_folder(folder: Path, root: Path) -> tuple[list[CheckedFile], list[tuple[Path, Identity]]]:
    """Return every file below ``folder``, by name, and the folders that were walked. Reads no contents.

    ``folder`` is resolved. Raises ``ModelRefusedError``: a link to outside ``root`` (resolved) or to a
    folder, something that is neither file nor folder, too many or too deep, unreadable.
    """
    files: list[CheckedFile] = []
    folders: list[tuple[Path, Identity]] = []
    try:
        for entry, name in _walk(folder, folders):
            files.append(_check_file(entry, name, root))
    except OSError as error:
        log.info("a model's folder can not be listed", exc_info=error)
        raise ModelRefusedError("the model's folder can not be read") from None
    return sorted(files, key=lambda file: file.name), folders


def identity_of(status: os.stat_result) -> Identity:
    """Return the identity that ``status`` shows."""
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _walk(folder: Path, folders: list[tuple[Path, Identity]]) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield what is in ``folder`` and below, without following links; note the folders."""
    num_entries = 0
    pending: list[tuple[Path, str, int]] = [(folder, "", 1)]
    while pending:
        path, prefix, depth = pending.pop()
        folders.append((path, identity_of(path.stat())))
        with os.scandir(path) as entries:
            for entry in entries:
                num_entries += 1
                if num_entries > MAX_ENTRIES:
                    raise ModelRefusedError(f"the model's folder has more than {MAX_ENTRIES} entries")
                name = prefix + entry.name
                if not entry.is_dir(follow_symlinks=False):
                    yield entry, name
                elif depth == MAX_DEPTH:
                    raise ModelRefusedError(f"the model's folders are nested deeper than {MAX_DEPTH}")
                elif prefix or entry.name not in _NEVER_READ:
                    pending.append((Path(entry.path), f"{name}/", depth + 1))


def _check_file(entry: os.DirEntry[str], name: str, root: Path) -> CheckedFile:
    shown = name if name.isprintable() and len(name) <= 200 else "a file with a strange name"
    try:
        path = Path(entry.path).resolve(strict=True)
        status = path.stat()
    except (OSError, RuntimeError):
        raise ModelRefusedError(f"{shown} can not be read, or links to nothing") from None
    if not path.is_relative_to(root):
        raise ModelRefusedError(f"{shown} links to a file outside the model's folder")
    if not stat.S_ISREG(status.st_mode):
        raise ModelRefusedError(f"{shown} is not a plain file")
    return CheckedFile(name, path, identity_of(status))


def _identity_or_none(path: Path) -> Identity | None:
    try:
        return identity_of(path.stat())
    except OSError:
        return None
