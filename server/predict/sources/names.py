"""What a source may be called: three forms, read strictly, before anything is looked up.

::

    minilm/2                         a folder below the model root
    /srv/models/minilm               a folder of the operator's own choice; never over RPC
    hf:owner/name@<40 hex digits>    the Hugging Face hub, at one commit
    models:/name/3, models:/name@champion    an MLflow registry

Nothing is decoded or normalised, so nothing means another thing later than it does here: what would need
it (percent signs, backslashes, ``..``, control and direction marks) is refused.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from server.predict.errors import ModelRefusedError

__all__ = [
    "FolderName",
    "HubName",
    "MlflowName",
    "check_relative_path",
    "check_remote_source",
    "parse_source",
    "source_kind",
]

MAX_PATH_CHARS = 1024
MAX_PART_BYTES = 255
MAX_PARTS = 16

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REGISTERED_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_. -]{0,198}[A-Za-z0-9_])?")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
_ALIAS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class FolderName:
    """A local folder, below the model root or absolute."""

    path: str
    is_absolute: bool


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of the hub at one commit."""

    repository: str
    commit: str


@dataclass(frozen=True, slots=True)
class MlflowName:
    """A registered model: of a version and an alias exactly one is given."""

    name: str
    version: str | None
    alias: str | None


def source_kind(source: str) -> str:
    """Return "folder", "hub" or "mlflow". Raises ``ModelRefusedError`` for what is none of them."""
    match parse_source(source):
        case FolderName():
            return "folder"
        case HubName():
            return "hub"
        case MlflowName():
            return "mlflow"


def check_remote_source(source: str) -> None:
    """Refuse what only the operator may name: call it first with every source that came over RPC.

    Raises ``ModelRefusedError``, for an absolute path as for anything that is not well formed (``..``, a hub
    name without its commit).
    """
    parsed = parse_source(source)
    if isinstance(parsed, FolderName) and parsed.is_absolute:
        raise ModelRefusedError("the source is not below the model root")


def parse_source(source: str) -> FolderName | HubName | MlflowName:
    """Read a source's name. Raises ``ModelRefusedError``."""
    if not source or len(source) > MAX_PATH_CHARS:
        raise ModelRefusedError(f"a source has 1 to {MAX_PATH_CHARS} characters")
    if source.startswith("hf:"):
        return _parse_hub(source.removeprefix("hf:"))
    if source.startswith("models:"):
        return _parse_mlflow(source.removeprefix("models:"))
    if _SCHEME.match(source):
        raise ModelRefusedError(
            'the source is none of: a folder, "hf:owner/name@commit", "models:/name/version"'
        )
    is_absolute = source.startswith("/")
    check_relative_path(source.rstrip("/")[1:] if is_absolute else source, what="the source")
    return FolderName(source, is_absolute)


def check_relative_path(path: str, *, what: str, max_parts: int = MAX_PARTS) -> None:
    """Refuse a relative path that could mean something else to somebody. Raises ``ModelRefusedError``.

    ``what``: how the error calls it; the path itself is not repeated.
    """
    parts = path.split("/")
    if len(path) > MAX_PATH_CHARS or len(parts) > max_parts:
        raise ModelRefusedError(f"{what} is too long")
    if any(unicodedata.category(c).startswith("C") or c in "\\%:" for c in path) or path.startswith("~"):
        raise ModelRefusedError(f"{what} has a character that is not allowed there")
    if any(part in ("", ".", "..") for part in parts):
        raise ModelRefusedError(f'{what} has an empty part, "." or ".."')
    if any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        raise ModelRefusedError(f"{what} is too long")


def _parse_hub(text: str) -> HubName:
    repository, at, revision = text.partition("@")
    if (
        not _REPOSITORY.fullmatch(repository)
        or any(bad in repository for bad in ("..", "--"))
        or any(part.endswith((".", "-", ".git")) for part in repository.split("/"))
    ):
        raise ModelRefusedError('a source on the hub is written "hf:owner/name@commit"')
    if not at:
        raise ModelRefusedError('a source on the hub needs its commit: "hf:owner/name@commit"')
    if not _COMMIT.fullmatch(revision):
        raise ModelRefusedError(
            "the revision is not a full commit (40 hexadecimal digits); branches and tags can move"
        )
    return HubName(repository, revision)


def _parse_mlflow(text: str) -> MlflowName:
    form = 'a source in MLflow is written "models:/name/version" or "models:/name@alias"'
    if not text.startswith("/"):
        raise ModelRefusedError(form)
    name, slash, version = text[1:].partition("/")
    if slash:
        if not _REGISTERED_NAME.fullmatch(name):
            raise ModelRefusedError(form)
        if not _VERSION.fullmatch(version):
            raise ModelRefusedError(
                'the version is not a number; stages and "latest" can move, use a number or an alias'
            )
        return MlflowName(name, version, None)
    name, at, alias = name.partition("@")
    if not at or not _REGISTERED_NAME.fullmatch(name) or not _ALIAS.fullmatch(alias):
        raise ModelRefusedError(form)
    return MlflowName(name, None, alias)
