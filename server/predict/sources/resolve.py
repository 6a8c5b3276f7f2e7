"""From a model's source to a folder that may be loaded."""

from __future__ import annotations

import logging
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from server.predict.errors import ModelRefusedError
from server.predict.model import LoadProgress
from server.predict.options import ModelSpec
from server.predict.sources.content_cache import DEFAULT_MAX_BYTES, ContentCache
from server.predict.sources.folder import Identity, SourceFolder, list_folder
from server.predict.sources.hub import fetch_from_hub
from server.predict.sources.manifest import NOTHING_KNOWN, verify_files
from server.predict.sources.names import FolderName, HubName, MlflowName, parse_source
from server.predict.sources.registry import FetchedModel, MlflowRegistry

__all__ = ["Sources"]

log = logging.getLogger(__name__)

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5"}


class Sources:
    """The places that models come from. Any thread."""

    def __init__(
        self,
        *,
        model_root: str | None,
        mlflow_uri: str | None,
        cache_folder: Path | None = None,
        cache_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        """``cache_folder``: for what is fetched from MLflow; None: below the user's ``~/.cache``."""
        self._model_root = model_root
        self._mlflow_uri = mlflow_uri
        self._cache_folder = cache_folder
        self._cache_bytes = cache_bytes

    def resolve(self, spec: ModelSpec, *, on_progress: LoadProgress) -> SourceFolder:
        """Find ``spec.source``, fetch it if need be, check it, and compare it with its manifests. Blocks.

        Absolute folders are followed: what came over RPC goes through ``check_remote_source`` first. After
        reading, call :meth:`SourceFolder.check_unchanged`; close it when the model is unloaded. Raises
        ``ModelRefusedError``, or ``ModelTooLargeError`` where there is no room to fetch it to.
        """
        if spec.source is None:
            raise ModelRefusedError("the model names no source")
        try:
            match parse_source(spec.source):
                case FolderName() as name:
                    folder, root = self._find_folder(name)
                    return _check(folder, root, "folder", on_progress, manifest=spec.sha256)
                case HubName() as name:
                    folder, root = fetch_from_hub(name, on_progress=on_progress)
                    return _check(folder, root, "hub", on_progress, manifest=spec.sha256)
                case MlflowName() as name:
                    return self._resolve_mlflow(name, spec, on_progress)
        except (OSError, RuntimeError) as error:
            # A full disk, a file that went away, links in a circle; the text holds paths.
            log.warning("the source of model %r can not be used", spec.name, exc_info=error)
            raise ModelRefusedError("the model's source can not be read, or not be stored here") from None

    def _find_folder(self, name: FolderName) -> tuple[Path, Path]:
        """Return a folder and the one that links in it must stay below: itself, or the model root."""
        if name.is_absolute:
            folder = root = Path(name.path).resolve()
        elif self._model_root is None:
            raise ModelRefusedError("there is no model root (--model-root) to find the source below")
        else:
            root = Path(self._model_root).expanduser().resolve()
            folder = (root / name.path).resolve()
            if not folder.is_relative_to(root):
                raise ModelRefusedError("the source is not below the model root")
        if not folder.is_dir():
            raise ModelRefusedError("the source is not a folder")
        return folder, root

    def _resolve_mlflow(self, name: MlflowName, spec: ModelSpec, on_progress: LoadProgress) -> SourceFolder:
        if self._mlflow_uri is None:
            raise ModelRefusedError("no MLflow registry is configured (--mlflow-uri)")
        folder = self._cache_folder or Path.home() / ".cache" / "kvserve" / "models"
        registry = MlflowRegistry(self._mlflow_uri, ContentCache(folder, max_bytes=self._cache_bytes))
        fetched = registry.fetch(name, on_progress=on_progress)
        try:
            return _check_fetched(fetched, spec, on_progress)
        except _DamagedError as error:
            log.warning("the cached files of model %r are fetched again: %s", spec.name, error.reason)
        registry.discard(fetched)
        return _check_fetched(registry.fetch(name, on_progress=on_progress), spec, on_progress)


class _DamagedError(ModelRefusedError):
    """Files that were fetched before are not what they were."""


def _check_fetched(fetched: FetchedModel, spec: ModelSpec, on_progress: LoadProgress) -> SourceFolder:
    """Return what was fetched, checked; it is held by that alone. Raises ``ModelRefusedError``."""
    path = fetched.folder.path
    try:
        try:
            found = _check(path, path, "mlflow", on_progress, known=fetched.digests)
        except ModelRefusedError as error:
            if fetched.digests:
                raise
            raise _DamagedError(error.reason) from error
        # Only now the catalogue's digests: if those are wrong, fetching again changes nothing.
        known = {file.identity: file.sha256 for file in found.files if file.sha256 is not None}
        verified = verify_files(found.files, spec.sha256, on_progress=on_progress, known=known)
    except BaseException:
        fetched.folder.close()
        raise
    notes = (*fetched.notes, *found.notes)
    return replace(found, files=verified, notes=notes, hold=fetched.folder)


def _check(
    folder: Path,
    root: Path,
    kind: str,
    on_progress: LoadProgress,
    *,
    manifest: Mapping[str, str] | None = None,
    known: Mapping[Identity, str] = NOTHING_KNOWN,
) -> SourceFolder:
    folder, root = folder.resolve(), root.resolve()
    files, folders = list_folder(folder, root)
    names = {file.name for file in files}
    if "config.json" not in names:
        raise ModelRefusedError("the source has no config.json")
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        pickled = sorted(name for name in names if Path(name).suffix in _PICKLE_SUFFIXES)
        raise ModelRefusedError(
            f"the weights are pickled ({pickled[0]}), which can run code; convert them to safetensors"
            if pickled
            else "the source has no safetensors weights"
        )
    notes: tuple[str, ...] = ()
    if folder.stat().st_mode & stat.S_IWOTH:
        notes = ("anybody on this machine can write to the model's folder",)
    verified = verify_files(files, manifest, on_progress=on_progress, known=known)
    return SourceFolder(folder, root, kind, verified, tuple(folders), notes)
