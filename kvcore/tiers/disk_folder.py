"""The folder of a disk tier: where what lies, and that nobody else can put something there.

::

    root/                     0700, ours, no link; one server at a time
      lock                    flock'ed while a tier is open
      quarantine/             what was found damaged, for a look; a few, the oldest go first
      <32 hex digits>/        one for each model, dtype, shape, vocabulary, layout and object version
        index                 written at the end, read and removed at the next start; may be missing
        tmp/                  files being written; emptied at the start
        00/ ... ff/           <digest>.<kind>: one object each, 0600

All methods may block; they are for the start and the tier's threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from kvcore.keys import LAYOUT_VERSION, PrefixDigest
from kvcore.tiers.disk_files import Files, fault_in_words
from kvcore.tiers.errors import TierStartError
from kvcore.tiers.interface import ObjectFormat, ObjectKey, ObjectKind
from kvcore.tiers.objects import OBJECT_VERSION

__all__ = ["DiskFolder", "key_of_name", "make_private_folder", "name_of_key"]

MAX_QUARANTINED_FILES = 32
MAX_QUARANTINED_BYTES = 64 << 20

_MODEL_NAME = re.compile(r"[0-9a-f]{32}")
_SHARD_NAME = re.compile(r"[0-9a-f]{2}")
_OBJECT_NAME = re.compile(rf"([0-9a-f]{{64}})\.({'|'.join(ObjectKind)})")


class DiskFolder:
    """The opened, locked folder of one tier."""

    def __init__(self, root: Path, object_format: ObjectFormat, files: Files) -> None:
        """Open it, made if need be. Raises ``TierStartError`` with what an operator has to do."""
        self.root = root
        self.model = root / model_name(object_format)
        self._files = files
        self._numbers = itertools.count()
        make_private_folder(root)
        self._lock = _lock(root / "lock")
        try:
            for folder in (self.model, self.model / "tmp", root / "quarantine"):
                make_private_folder(folder)
            self._empty_temporary()
        except BaseException:
            self.close()
            raise

    @property
    def index_path(self) -> Path:
        return self.model / "index"

    def path_of(self, key: ObjectKey) -> Path:
        """Return where an object lies, or would."""
        name = name_of_key(key)
        return self.model / name[:2] / name

    def temporary_path(self) -> Path:
        """Return a name for a file being written; each is given once."""
        return self.model / "tmp" / f"{os.getpid()}-{next(self._numbers)}"

    def objects(self) -> Iterator[tuple[ObjectKey, Path]]:
        """Iterate over this model's objects by their names; nothing is opened."""
        for path in _shard_files(self.model):
            key = key_of_name(path.name)
            if key is not None:
                yield key, path

    def foreign_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Iterate over the objects of other models and versions."""
        for model in _folders(self.root, _MODEL_NAME):
            if model != self.model:
                for path in _shard_files(model):
                    with contextlib.suppress(OSError):
                        yield path, path.lstat()

    def quarantine(self, path: Path) -> None:
        """Move a file, or whatever lies there, out of the way."""
        folder = self.root / "quarantine"
        self._files.rename(path, folder / f"{next(self._numbers)}-{os.getpid()}-{path.name}")
        kept = sorted(((p, p.lstat()) for p in folder.iterdir()), key=lambda item: -item[1].st_ctime_ns)
        num_bytes = 0
        for number, (old, status) in enumerate(kept):
            num_bytes += status.st_size
            if number >= MAX_QUARANTINED_FILES or num_bytes > MAX_QUARANTINED_BYTES:
                num_bytes -= status.st_size
                with contextlib.suppress(OSError):
                    self._files.unlink(old)

    def close(self) -> None:
        """Let another server have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _empty_temporary(self) -> None:
        try:
            for left in (self.model / "tmp").iterdir():
                self._files.unlink(left)
        except OSError as error:
            raise TierStartError("disk", f"{self.model}: {fault_in_words(error)}") from error


def make_private_folder(folder: Path) -> None:
    """Make a folder that only we can use, or see that it is one. Raises ``TierStartError``."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise TierStartError("disk", f"{folder} is a symbolic link: name the folder itself")
        if not stat.S_ISDIR(status.st_mode):
            raise TierStartError("disk", f"{folder} is not a folder")
        if status.st_uid != os.geteuid():
            raise TierStartError("disk", f"{folder} belongs to another user: give it a folder of its own")
        if status.st_mode & 0o022:
            raise TierStartError(
                "disk", f"others can write to {folder}: chmod it to 700 and look what is in it"
            )
        if status.st_mode & 0o055:
            folder.chmod(0o700)
    except OSError as error:
        raise TierStartError("disk", f"{folder}: {fault_in_words(error)}") from error


def model_name(object_format: ObjectFormat) -> str:
    """Return the folder's name for objects that are interchangeable."""
    what = (
        LAYOUT_VERSION,
        OBJECT_VERSION,
        object_format.fingerprint,
        object_format.dtype,
        object_format.block_shape,
        object_format.vocab_size,
    )
    return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


def name_of_key(key: ObjectKey) -> str:
    """Return the file name of an object."""
    return f"{key.digest.hex()}.{key.kind.value}"


def key_of_name(name: str) -> ObjectKey | None:
    """Return the object that a file name stands for; None if it is none of ours."""
    matched = _OBJECT_NAME.fullmatch(name)
    if matched is None:
        return None
    return ObjectKey(PrefixDigest(bytes.fromhex(matched[1])), ObjectKind(matched[2]))


def _lock(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise TierStartError("disk", f"{path}: {fault_in_words(error)}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        reason = (
            f"{path.parent} is in use by another server: give each its own folder, or share through Redis"
        )
        raise TierStartError("disk", reason) from error
    except OSError as error:
        os.close(descriptor)
        raise TierStartError("disk", f"{path}: {fault_in_words(error)}") from error
    return descriptor


def _folders(root: Path, name: re.Pattern[str]) -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(root) as found:
        for item in found:
            if name.fullmatch(item.name) and item.is_dir(follow_symlinks=False):
                yield root / item.name


def _shard_files(model: Path) -> Iterator[Path]:
    for shard in _folders(model, _SHARD_NAME):
        with contextlib.suppress(OSError), os.scandir(shard) as found:
            for item in found:
                yield shard / item.name
