"""An MLflow registry: find a version, decide by its list of files, fetch what a loader needs, once.

The client is a process of its own (:mod:`server.predict.sources.mlflow_client`). A version that was fetched
before is taken from the cache, and also when the registry cannot be reached; its files are compared with
their digests each time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.predict.errors import ModelRefusedError
from server.predict.model import LoadProgress
from server.predict.sources.content_cache import ContentCache, HeldFolder
from server.predict.sources.folder import Identity, list_folder
from server.predict.sources.manifest import format_sums, hash_files
from server.predict.sources.mlmodel import (
    MAX_FILES,
    MLMODEL,
    ArtifactFile,
    check_listing,
    check_location,
    choose_files,
    read_mlmodel,
)
from server.predict.sources.names import MlflowName
from server.predict.sources.registry_process import (
    Done,
    FoundVersion,
    Listing,
    RegistryProcess,
    RegistryUnreachable,
)

__all__ = ["FetchedModel", "MlflowRegistry"]

MAX_FOLDERS = 200

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A registered model on this machine's disk, with ``SHA256SUMS`` beside its files. Held until closed."""

    folder: HeldFolder
    notes: tuple[str, ...]
    digests: Mapping[Identity, str] = field(default_factory=dict)
    """Of files that were fetched, and hashed, just now."""


class MlflowRegistry:
    """One registry. Any thread; each fetch has a client process of its own."""

    def __init__(self, uri: str, cache: ContentCache) -> None:
        self._uri = uri
        self._cache = cache

    def fetch(self, name: MlflowName, *, on_progress: LoadProgress) -> FetchedModel:
        """Return a version's folder, fetched if need be. Blocks.

        Raises ``ModelRefusedError``, or ``ModelTooLargeError``: the cache has no room for it.
        """
        try:
            with RegistryProcess(self._uri) as registry:
                return self._fetch(registry, name, on_progress)
        except RegistryUnreachable:
            # An alias may stand for another version by now; a version stays what it was.
            key = [self._uri, name.name, name.version]
            folder = None if name.version is None else self._cache.find_any({"key": key})
            if folder is None:
                raise
            log.warning("the MLflow registry can not be reached; %s is taken from the cache", name.name)
            return FetchedModel(folder, ("the registry was not asked: it can not be reached",))

    def discard(self, fetched: FetchedModel) -> None:
        """Remove a cached folder whose files are not what they were, so that they are fetched again."""
        self._cache.discard(fetched.folder)

    def _fetch(self, registry: RegistryProcess, name: MlflowName, on_progress: LoadProgress) -> FetchedModel:
        on_progress("fetching", 0, 0)
        found = registry.ask("find", FoundVersion, name=name.name, version=name.version, alias=name.alias)
        version, location = found.version, found.location
        notes = () if name.alias is None else (f"the alias {name.alias!r} is version {version}",)
        check_location(location, uri=self._uri)
        files = _read_listing(
            registry.ask("list", Listing, location=location, max_files=MAX_FILES, max_folders=MAX_FOLDERS)
        )
        check_listing(files)
        origin: dict[str, Any] = {
            "key": [self._uri, name.name, version],
            "location": location,
            "files": sorted([file.path, file.num_bytes] for file in files),
        }
        if (known := self._cache.find(origin)) is not None:
            return FetchedModel(known, notes)
        with self._cache.stage() as staging:
            download = _Download(registry, location, staging, on_progress, make_room=self._cache.make_room)
            folder = download.fetch_model(files)
            hashed = hash_files(list_folder(folder, folder)[0], on_progress=on_progress)
            stored = self._cache.store(folder, format_sums(hashed), origin=origin)
        digests = {file.identity: str(file.sha256) for file in hashed} if stored.is_new else {}
        return FetchedModel(stored, notes, digests)


class _Download:
    """One model on its way into a staging folder."""

    def __init__(
        self,
        registry: RegistryProcess,
        location: str,
        staging: Path,
        on_progress: LoadProgress,
        *,
        make_room: Callable[[int], None],
    ) -> None:
        self._registry = registry
        self._location = location
        self._staging = staging.resolve()
        self._on_progress = on_progress
        self._make_room = make_room
        self._num_done = 0
        self._num_expected = 0

    def fetch_model(self, files: Sequence[ArtifactFile]) -> Path:
        """Fetch what the ``MLmodel`` says is the model into one new folder; return that."""
        mlmodel = next(file for file in files if file.path == MLMODEL)
        self._num_expected = mlmodel.num_bytes
        chosen = choose_files(read_mlmodel(self._fetch(mlmodel).read_bytes()), files)
        self._num_expected += sum(file.num_bytes for file in chosen.values())
        self._make_room(self._num_expected)
        folder = self._staging / "model"
        folder.mkdir(mode=0o700)
        for name, file in chosen.items():
            self._fetch(file).rename(folder / name)
        return folder

    def _fetch(self, file: ArtifactFile) -> Path:
        """Fetch one file into a folder of its own, so that no name of the artifact meets another."""
        into = self._staging / "fetching"
        into.mkdir()

        def count_bytes() -> int:
            num_bytes = bytes_below(into)
            if num_bytes > file.num_bytes:
                raise ModelRefusedError(f"{file.path} is larger than the registry says")
            self._on_progress("fetching", self._num_done + num_bytes, self._num_expected)
            return num_bytes

        self._registry.ask(
            "fetch", Done, count_bytes=count_bytes, location=self._location, path=file.path, folder=str(into)
        )
        path = into / file.path
        if path.resolve() != path or not path.is_file() or path.stat().st_size != file.num_bytes:
            raise ModelRefusedError(f"{file.path} is not the file that the registry lists")
        count_bytes()
        self._num_done += file.num_bytes
        fetched = self._staging / "fetched"
        path.rename(fetched)
        shutil.rmtree(into)
        return fetched


def bytes_below(folder: Path) -> int:
    """Return what a download has written so far; files come and go meanwhile.

    They may be elsewhere in the folder first, under a name of the client's choice.
    """
    num_bytes = 0
    for path, _folders, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                num_bytes += Path(path, name).lstat().st_size
    return num_bytes


def _read_listing(listing: Listing) -> list[ArtifactFile]:
    files = []
    for path, num_bytes in listing.files:
        if num_bytes is None or num_bytes < 0:
            raise ModelRefusedError("the MLflow registry lists a file without its size")
        files.append(ArtifactFile(path, num_bytes))
    if len(files) > MAX_FILES or not listing.is_complete:
        raise ModelRefusedError(f"the MLflow model has more than {MAX_FILES} files or {MAX_FOLDERS} folders")
    return files
