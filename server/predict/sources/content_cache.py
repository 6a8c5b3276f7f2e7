"""Fetched models on this machine's disk, under the digest of what they hold, within a budget of bytes.

::

    <cache>/contents/<digest>/SHA256SUMS, config.json, ...   digest: SHA-256 of its SHA256SUMS; never altered
    <cache>/versions/<key>.json                              what a registry's version held, when last seen
    <cache>/used/<digest>                                    empty; its time says when it was last used
    <cache>/staging/<random>/                                on its way in or out: fetched, or removed

Private to its user (0700). A folder is whole or not there: it comes from staging and goes there in one step,
nothing reads staging, and a crash leaves there what the next fetch removes. A power cut may leave a file
short: its digest tells.

Several processes may share a cache. Whoever uses a folder has a shared lock on it, from the time it was found
until the model that was loaded from it is gone; the kernel ends it with the process. What nobody has locked
may leave to make room for what is fetched, the least recently used first: candidates first, and nothing if
all of them would not be enough.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.predict.errors import ModelRefusedError, ModelTooLargeError
from server.predict.sources.manifest import SUMS_NAME

__all__ = ["DEFAULT_MAX_BYTES", "ContentCache", "HeldFolder"]

DEFAULT_MAX_BYTES = 64 << 30
_DIGEST = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


class HeldFolder:
    """A folder of the cache that stays there until it is closed."""

    __slots__ = ("_handle", "_used", "is_new", "path")

    def __init__(self, path: Path, used: Path, handle: int) -> None:
        """``handle`` has the lock; ``used`` is the file whose time says when it was last used."""
        self.path = path
        self.is_new = False
        """It was stored just now."""
        self._used = used
        self._handle: int | None = handle

    def close(self) -> None:
        """Let go. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                self._used.touch()
            os.close(handle)


@dataclass(frozen=True, slots=True)
class _Stored:
    path: Path
    num_bytes: int
    used_s: float


class ContentCache:
    """See the module. Any thread."""

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Make the folders. Raises ``ModelRefusedError`` if somebody else could write there."""
        self._max_bytes = max_bytes
        self._contents, self._versions, self._used, self._staging = (
            folder / name for name in ("contents", "versions", "used", "staging")
        )
        try:
            for path in (folder, self._contents, self._versions, self._used, self._staging):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                status = path.stat()
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    raise ModelRefusedError("the cache for fetched models is not this user's alone")
        except OSError as error:
            log.warning("the cache for fetched models can not be used", exc_info=error)
            raise ModelRefusedError("the cache for fetched models can not be used") from None

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        """Give an empty folder to fetch into; remove it afterwards unless it was stored."""
        with _locked(self._staging):
            self._remove_abandoned()
            path = Path(tempfile.mkdtemp(dir=self._staging))
            in_use = contextlib.ExitStack()
            # The kernel lets go of it with the process, however that ends.
            in_use.enter_context(_locked(path))
        with in_use:
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def make_room(self, num_bytes: int) -> None:
        """Remove what is not used, the longest unused first, so that so much can be fetched.

        What others fetch at the same time is not counted: together they may exceed the budget until the next
        fetch. Raises ``ModelTooLargeError``, and removes nothing, if there is no room to be made.
        """
        if num_bytes > self._max_bytes:
            raise ModelTooLargeError("the model is larger than the cache for fetched models")
        removed: list[_Stored] = []
        # Held until they are in the grave, so that nobody begins to use them meanwhile.
        with self.stage() as grave, contextlib.ExitStack() as locks, _locked(self._contents):
            stored = sorted(self._stored(), key=lambda folder: folder.used_s)
            num_stored = sum(folder.num_bytes for folder in stored)
            num_budget = num_stored + num_bytes - self._max_bytes
            num_disk = num_bytes - shutil.disk_usage(self._staging).free
            num_lacking = max(num_budget, num_disk)
            for folder in stored:
                if num_lacking <= 0:
                    break
                with contextlib.suppress(BlockingIOError, FileNotFoundError):
                    locks.enter_context(_locked(folder.path, fcntl.LOCK_NB))
                    removed.append(folder)
                    num_lacking -= folder.num_bytes
            if num_lacking > 0:
                raise ModelTooLargeError(
                    f"the model takes {num_bytes >> 20} MiB, and the disk has less"
                    if num_disk > num_budget
                    else "the cache for fetched models is full of models that are loaded"
                )
            for folder in removed:
                folder.path.rename(grave / folder.path.name)
            self._forget({folder.path.name for folder in removed})
        if removed:
            num_removed = sum(folder.num_bytes for folder in removed)
            log.info(
                "removed %d fetched models (%d MiB) that were not used for longest: %d MiB of %d are kept, "
                "%d MiB are to be fetched",
                *(len(removed), num_removed >> 20, (num_stored - num_removed) >> 20, self._max_bytes >> 20),
                num_bytes >> 20,
            )

    def store(self, folder: Path, sums: bytes, *, origin: dict[str, Any]) -> HeldFolder:
        """Move a ``folder`` of verified files from the staged one to its place, with ``sums`` beside them.

        ``origin`` is remembered: under "key" what it is called, the rest tells one state from another.
        """
        digest = hashlib.sha256(sums).hexdigest()
        (folder / SUMS_NAME).write_bytes(sums)
        target = self._contents / digest
        record = folder.parent / "record"
        record.write_text(json.dumps({"origin": origin, "contents": digest}))
        with _locked(self._contents):
            held = self._folder_of(digest)
            if held is None:
                # Whatever lies there now is no such folder any more.
                with contextlib.suppress(FileNotFoundError):
                    target.rename(folder.parent / "damaged")
                folder.rename(target)
                held = self._folder_of(digest)
                if held is None:
                    raise ModelRefusedError("the fetched files were removed again")
                held.is_new = True
            # Else the same files, fetched before; whether they are still the same is checked at every load.
            record.replace(self._version_path(origin))
        self._trim()
        return held

    def find(self, origin: dict[str, Any]) -> HeldFolder | None:
        """Return the folder of what was stored with this very ``origin``; None if there is none."""
        known = self._recall(origin)
        return None if known is None or known["origin"] != origin else self._folder_of(known["contents"])

    def find_any(self, origin: dict[str, Any]) -> HeldFolder | None:
        """Return what was last stored under ``origin["key"]``; None if there is nothing."""
        known = self._recall(origin)
        return None if known is None else self._folder_of(known["contents"])

    def discard(self, folder: HeldFolder) -> None:
        """Let go of a folder whose files turned out damaged, and remove it."""
        folder.close()
        with self.stage() as grave, contextlib.suppress(FileNotFoundError):
            # In one step: nobody finds half of it.
            folder.path.rename(grave / "gone")

    def _trim(self) -> None:
        """Keep to the budget where others have fetched at the same time, as far as nobody uses it."""
        try:
            self.make_room(0)
        except (ModelTooLargeError, OSError) as error:
            log.warning("the cache for fetched models exceeds its budget", exc_info=error)

    def _folder_of(self, digest: str) -> HeldFolder | None:
        """Return a folder, held, if it is there and its list of digests is what it was."""
        held = self._hold(self._contents / digest)
        if held is None:
            return None
        try:
            sums = (held.path / SUMS_NAME).read_bytes()
        except OSError:
            sums = b""
        if hashlib.sha256(sums).hexdigest() == held.path.name:
            return held
        held.close()
        return None

    def _hold(self, folder: Path) -> HeldFolder | None:
        """Take a folder's lock, and note that it is used; None if it is not there, or about to go."""
        try:
            handle = _open(folder)
        except OSError:
            return None
        used = self._used / folder.name
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), folder.stat()):
                raise FileNotFoundError
        except OSError:
            os.close(handle)
            return None
        with contextlib.suppress(OSError):
            used.touch()
        return HeldFolder(folder, used, handle)

    def _stored(self) -> list[_Stored]:
        stored = []
        for folder in self._contents.iterdir():
            if _DIGEST.fullmatch(folder.name) is None or not folder.is_dir():
                continue
            num_bytes = 0
            try:
                for path in folder.iterdir():
                    num_bytes += path.lstat().st_size
                used_s = folder.stat().st_mtime
                with contextlib.suppress(FileNotFoundError):
                    used_s = (self._used / folder.name).stat().st_mtime
            except FileNotFoundError:
                continue  # discarded meanwhile
            stored.append(_Stored(folder, num_bytes, used_s))
        return stored

    def _forget(self, digests: set[str]) -> None:
        for digest in digests:
            (self._used / digest).unlink(missing_ok=True)
        for path in self._versions.iterdir() if digests else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(path.read_bytes())["contents"] in digests:
                    path.unlink()

    def _version_path(self, origin: dict[str, Any]) -> Path:
        key = json.dumps(origin["key"]).encode()
        return self._versions / f"{hashlib.sha256(key).hexdigest()}.json"

    def _recall(self, origin: dict[str, Any]) -> dict[str, Any] | None:
        try:
            known = json.loads(self._version_path(origin).read_bytes())
            is_sound = known["origin"]["key"] == origin["key"] and _DIGEST.fullmatch(known["contents"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return known if is_sound else None

    def _remove_abandoned(self) -> None:
        """Remove what processes that are gone left behind; what is locked is in use."""
        for path in self._staging.iterdir():
            try:
                with _locked(path, fcntl.LOCK_NB):
                    shutil.rmtree(path, ignore_errors=True)
            except NotADirectoryError:
                path.unlink(missing_ok=True)
            except (BlockingIOError, FileNotFoundError):
                pass


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


@contextlib.contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Hold a folder's lock among all processes."""
    handle = _open(folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(handle)
