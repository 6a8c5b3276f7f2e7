"""A model's folder as Predict reads it: each file once, so that what was checked is what is used.

Whether a manifest (file name to SHA-256) and the folder have the same files is the source's business; here
every byte that is used is one that the manifest describes. Weights are hashed while they are read
(:mod:`server.worker.predict.weights`), settings here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.worker.checkpoint import check_config_files
from server.worker.errors import ModelLoadError

__all__ = ["ModelFolder"]

_MAX_FILE_BYTES = 256 << 20


class ModelFolder:
    """A folder whose files are read through checks: plain, of a bearable size, no link out of ``root``."""

    def __init__(self, folder: Path, *, root: Path, manifest: Mapping[str, str] | None = None) -> None:
        """Check the settings. Raises ``ModelLoadError``."""
        self.path = folder
        self.root = root
        self._manifest = None if manifest is None else {k: v.lower() for k, v in manifest.items()}
        self._contents: dict[str, bytes | None] = {}
        if not (folder / "config.json").is_file():
            raise ModelLoadError("the folder has no config.json")
        # Folders of sentence-transformers keep settings one level down.
        for place in [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink())]:
            check_config_files(place)

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; None if there is no such file. Raises ``ModelLoadError``."""
        if name not in self._contents:
            self._contents[name] = self._read(name)
        return self._contents[name]

    def read_json(self, name: str) -> Any:
        """Return what a JSON file says; None if there is no such file. Raises ``ModelLoadError``."""
        raw = self.read(name)
        if raw is None:
            return None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise ModelLoadError(f"{name} can not be read as JSON") from None

    def read_settings(self, name: str) -> dict[str, Any]:
        """Return a JSON file that must be a mapping; empty if there is no such file."""
        settings = self.read_json(name)
        if settings is None:
            return {}
        if not isinstance(settings, dict):
            raise ModelLoadError(f"{name} is not a mapping")
        return settings

    def check_links(self) -> None:
        """Raise ``ModelLoadError`` if a file of the folder lies elsewhere; for readers that ask nobody."""
        for path in sorted(p for p in self.path.iterdir() if not p.is_dir()):
            self._open(path.name).close()

    @property
    def has_manifest(self) -> bool:
        """Say whether there is something to hold whole files against."""
        return self._manifest is not None

    def check_digest(self, name: str, digest: str) -> None:
        """Raise ``ModelLoadError`` if the manifest says otherwise."""
        if self._manifest is not None and not hmac.compare_digest(self._manifest.get(name, ""), digest):
            raise ModelLoadError(f"{name} is not the file that the manifest describes")

    def _read(self, name: str) -> bytes | None:
        if not (self.path / name).exists():
            return None
        with self._open(name) as stream:
            raw: bytes = stream.read(_MAX_FILE_BYTES + 1)
        if len(raw) > _MAX_FILE_BYTES:
            raise ModelLoadError(f"{name} is too large")
        if self._manifest is not None:
            self.check_digest(name, hashlib.sha256(raw).hexdigest())
        return raw

    def _open(self, name: str) -> Any:
        path = self.path / name
        try:
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise ModelLoadError(f"{name} links to a file outside the model's folder")
            # Opening a pipe would wait for ever.
            if not path.is_file():
                raise ModelLoadError(f"{name} is not a plain file")
            return path.open("rb")
        except OSError:
            raise ModelLoadError(f"{name} can not be read") from None
