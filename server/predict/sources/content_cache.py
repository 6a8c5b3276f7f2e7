"""Fetched models on this machine's disk, under the digest of what they hold.

::

    <cache>/contents/<digest>/SHA256SUMS, config.json, ...   digest: SHA-256 of its SHA256SUMS; never altered
    <cache>/versions/<key>.json                              what a registry's version held, when last seen
    <cache>/staging/<random>/                                being fetched; renamed into contents when whole

Private to its user (0700). A folder is whole or not there: nothing reads staging, and a crash leaves there
what the next fetch removes. A power cut may leave a file short: its digest tells. Several processes may share
a cache. Nothing is evicted: models are as many as operators name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.predict.errors import ModelRefusedError
from server.predict.sources.manifest import SUMS_NAME

__all__ = ["ContentCache"]

log = logging.getLogger(__name__)


class ContentCache:
    """See the module. Any thread."""

    def __init__(self, folder: Path) -> None:
        """Make the folders. Raises ``ModelRefusedError`` if somebody else could write there."""
        self._contents, self._versions, self._staging = (
            folder / name for name in ("contents", "versions", "staging")
        )
        try:
            for path in (folder, self._contents, self._versions, self._staging):
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

    def store(self, folder: Path, sums: bytes, *, origin: dict[str, Any]) -> Path:
        """Move a staged ``folder`` of verified files, with ``sums`` beside them, to its place; return that.

        ``origin`` is remembered: under "key" what it is called, the rest tells one state from another.
        """
        digest = hashlib.sha256(sums).hexdigest()
        (folder / SUMS_NAME).write_bytes(sums)
        target = self._contents / digest
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            # The same files, fetched before; whether they are still the same is checked at every load.
        self._remember(origin, digest)
        return target

    def find(self, origin: dict[str, Any]) -> Path | None:
        """Return the folder of what was stored with this very ``origin``; None if there is none."""
        known = self._recall(origin)
        return None if known is None or known["origin"] != origin else self._folder_of(known)

    def find_any(self, origin: dict[str, Any]) -> Path | None:
        """Return what was last stored under ``origin["key"]``; None if there is nothing."""
        known = self._recall(origin)
        return None if known is None else self._folder_of(known)

    def discard(self, folder: Path) -> None:
        """Remove a folder whose files turned out damaged."""
        with self.stage() as grave, contextlib.suppress(FileNotFoundError):
            # In one step: nobody finds half of it.
            folder.rename(grave / "gone")

    def _folder_of(self, known: dict[str, Any]) -> Path | None:
        folder = self._contents / known["contents"]
        try:
            sums = (folder / SUMS_NAME).read_bytes()
        except OSError:
            return None
        return folder if hashlib.sha256(sums).hexdigest() == folder.name else None

    def _version_path(self, origin: dict[str, Any]) -> Path:
        key = json.dumps(origin["key"]).encode()
        return self._versions / f"{hashlib.sha256(key).hexdigest()}.json"

    def _recall(self, origin: dict[str, Any]) -> dict[str, Any] | None:
        try:
            known = json.loads(self._version_path(origin).read_bytes())
            is_sound = known["origin"]["key"] == origin["key"] and len(bytes.fromhex(known["contents"])) == 32
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return known if is_sound else None

    def _remember(self, origin: dict[str, Any], digest: str) -> None:
        path = self._version_path(origin)
        handle, name = tempfile.mkstemp(dir=self._staging)
        with os.fdopen(handle, "w") as stream:
            json.dump({"origin": origin, "contents": digest}, stream)
        Path(name).replace(path)

    def _remove_abandoned(self) -> None:
        """Remove what processes that are gone left behind; what is locked is in use."""
        for path in self._staging.iterdir():
            with contextlib.suppress(BlockingIOError, NotADirectoryError), _locked(path, fcntl.LOCK_NB):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Hold a folder's lock among all processes."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(handle)
