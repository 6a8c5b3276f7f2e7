"""Snapshots: objects in a folder of their own, in the bytes of the disk tier, to be moved and kept.

::

    <root>/<name>/
      manifest.json                                 what it is; written last
      00000000.<digest>.<kind>, 00000001. ...       objects in the order in which they were given

A snapshot is written into another folder and renamed when it is whole: under its name lies all of it or
nothing. Given parents first, it reads back parents first. The manifest is a claim, as everything is that
comes from a folder: each object is checked by itself, and one that is damaged is reported in its place.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kvcore.codec import Codec, CodecError, NoCodec
from kvcore.keys import LAYOUT_VERSION
from kvcore.tiers.disk_files import FileRefused, Files, fault_in_words
from kvcore.tiers.disk_folder import key_of_name, make_private_folder, name_of_key
from kvcore.tiers.errors import SnapshotError, TierStartError
from kvcore.tiers.interface import CacheObject, FetchFailure, ObjectFormat
from kvcore.tiers.objects import OBJECT_VERSION, ObjectError, decode, encode, max_object_bytes, read_header

__all__ = ["SnapshotInfo", "check_snapshot", "read_snapshot", "snapshot_path", "write_snapshot"]

SNAPSHOT_VERSION = 1

_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 1 << 16
_MAX_NAME_CHARS = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OBJECT_NAME = re.compile(r"(\d{8,12})\.(.+)")
_numbers = itertools.count()

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What a snapshot's manifest says."""

    version: int
    object_version: int
    layout_version: int
    fingerprint: str
    dtype: str
    block_shape: tuple[int, ...]
    vocab_size: int
    codec: str
    num_objects: int
    num_bytes: int
    created_at_unix: float


def snapshot_path(root: Path, name: str) -> Path:
    """Return where the snapshot of a name lies, or would: directly under ``root``, nowhere else.

    Raises ``SnapshotError`` for anything but a plain name of at most 128 letters, digits, dots, dashes and
    underscores that starts with a letter or a digit, and for a link.
    """
    if len(name) > _MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise SnapshotError(
            f"a snapshot's name has 1 to {_MAX_NAME_CHARS} letters, digits, '.', '-' or '_', "
            "and starts with a letter or a digit"
        )
    path = root / name
    if path.is_symlink():
        raise SnapshotError(f"snapshot {name!r} is a symbolic link")
    return path


def write_snapshot(
    path: Path,
    objects: Iterable[CacheObject],
    object_format: ObjectFormat,
    *,
    now_unix: float,
    codec: Codec | None = None,
    num_expected: int = 0,
    on_progress: OnProgress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    files: Files | None = None,
) -> SnapshotInfo:
    """Write a snapshot under a path of ``snapshot_path``, which must be free. Blocks.

    ``on_progress(done, num_expected)`` after each object. Raises ``SnapshotError``, and leaves nothing, if
    the disk refuses, an object cannot be encoded, or ``is_cancelled`` says so before the last step.
    """
    codec, files = codec or NoCodec(), files or Files()
    building = path.parent / f".{path.name}.{os.getpid()}-{next(_numbers)}"
    _refuse_taken(path)
    try:
        make_private_folder(path.parent)
        building.mkdir(0o700)
        num_objects = num_bytes = 0
        for stored in objects:
            if is_cancelled is not None and is_cancelled():
                raise SnapshotError("cancelled")
            encoded = encode(stored, object_format, codec, now_unix=now_unix)
            target = building / f"{num_objects:08d}.{name_of_key(stored.key)}"
            files.write(building / "writing", target, encoded.buffers)
            num_objects += 1
            num_bytes += encoded.num_bytes
            if on_progress is not None:
                on_progress(num_objects, max(num_expected, num_objects))
        if is_cancelled is not None and is_cancelled():
            raise SnapshotError("cancelled")  # the source may have ended because of it
        info = SnapshotInfo(
            version=SNAPSHOT_VERSION,
            object_version=OBJECT_VERSION,
            layout_version=LAYOUT_VERSION,
            fingerprint=object_format.fingerprint,
            dtype=object_format.dtype,
            block_shape=object_format.block_shape,
            vocab_size=object_format.vocab_size,
            codec=codec.name.value,
            num_objects=num_objects,
            num_bytes=num_bytes,
            created_at_unix=now_unix,
        )
        manifest = json.dumps(asdict(info), indent=2).encode()
        files.write(building / "writing", building / _MANIFEST, [manifest])
        _sync(building)
        _refuse_taken(path)
        building.rename(path)
    except OSError as error:
        raise SnapshotError(f"the snapshot was not written: {fault_in_words(error)}") from error
    except (ObjectError, CodecError) as error:
        raise SnapshotError(f"the snapshot was not written: {error}") from error
    except TierStartError as error:
        raise SnapshotError(f"the snapshot was not written: {error.reason}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(building)
    return info


def check_snapshot(path: Path, *, files: Files | None = None) -> SnapshotInfo:
    """Return what a snapshot says it is. Raises ``SnapshotError`` if it is none, or not of this version."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise SnapshotError(f"snapshot {path.name!r} is not a folder")
        data = (files or Files()).read(path / _MANIFEST, max_bytes=_MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise SnapshotError(f"there is no snapshot {path.name!r}") from error
    except (OSError, FileRefused) as error:
        raise SnapshotError(f"snapshot {path.name!r} has no readable manifest") from error
    try:
        read = json.loads(data)
        info = SnapshotInfo(**{**read, "block_shape": tuple(read["block_shape"])})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SnapshotError(f"snapshot {path.name!r} has a manifest that makes no sense") from error
    if not _is_plausible(info):
        raise SnapshotError(f"snapshot {path.name!r} has a manifest that makes no sense")
    versions = (info.version, info.object_version, info.layout_version)
    if versions != (SNAPSHOT_VERSION, OBJECT_VERSION, LAYOUT_VERSION):
        raise SnapshotError(f"snapshot {path.name!r} is of another version: {'.'.join(map(str, versions))}")
    return info


def read_snapshot(
    path: Path,
    object_format: ObjectFormat,
    *,
    now_unix: float,
    accept_lossy: bool = False,
    on_progress: OnProgress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    files: Files | None = None,
) -> Iterator[CacheObject | ObjectError]:
    """Yield a snapshot's objects in the order of their writing; instead of one that is unfit, why. Blocks.

    An object is what its own name, tokens and checksum say; that its namespace is one of this server's and
    that its parents are there is for the caller to see. Raises ``SnapshotError`` before the first object if
    the snapshot is none, is another model's, or has fewer objects than its manifest says.
    """
    files = files or Files()
    info = check_snapshot(path, files=files)
    wanted = (
        object_format.fingerprint,
        object_format.dtype,
        object_format.block_shape,
        object_format.vocab_size,
    )
    if (info.fingerprint, info.dtype, info.block_shape, info.vocab_size) != wanted:
        raise SnapshotError(f"snapshot {path.name!r} is of another model, dtype or block shape")
    names = _object_names(path)
    if len(names) != info.num_objects:
        raise SnapshotError(f"snapshot {path.name!r} has {len(names)} of {info.num_objects} objects")

    def read_all() -> Iterator[CacheObject | ObjectError]:
        for done, name in enumerate(names, start=1):
            if is_cancelled is not None and is_cancelled():
                raise SnapshotError("cancelled")
            yield _read_object(path, name, object_format, now_unix, accept_lossy, files)
            if on_progress is not None:
                on_progress(done, len(names))

    return read_all()


def _read_object(
    path: Path, name: str, object_format: ObjectFormat, now_unix: float, accept_lossy: bool, files: Files
) -> CacheObject | ObjectError:
    matched = _OBJECT_NAME.fullmatch(name)
    key = key_of_name(matched[2]) if matched else None
    if key is None:
        return ObjectError(FetchFailure.MISMATCH, "a file that is no object of a snapshot")
    try:
        data = files.read(path / name, max_bytes=max_object_bytes(object_format, key.kind))
        namespace = read_header(data).namespace
        decoded = decode(data, object_format, key, namespace, now_unix=now_unix, accept_lossy=accept_lossy)
    except ObjectError as error:
        return error
    except FileRefused as error:
        return ObjectError(FetchFailure.CORRUPT, str(error))
    except OSError as error:
        return ObjectError(FetchFailure.UNREACHABLE, fault_in_words(error))
    return decoded.found


def _object_names(path: Path) -> list[str]:
    try:
        names = [item.name for item in path.iterdir() if _OBJECT_NAME.fullmatch(item.name)]
    except OSError as error:
        raise SnapshotError(f"snapshot {path.name!r}: {fault_in_words(error)}") from error
    return sorted(names, key=lambda name: (int(name.split(".", 1)[0]), name))


def _is_plausible(info: SnapshotInfo) -> bool:
    numbers = (
        info.version,
        info.object_version,
        info.layout_version,
        info.vocab_size,
        info.num_objects,
        info.num_bytes,
        *info.block_shape,
    )
    texts = (info.fingerprint, info.dtype, info.codec)
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and len(info.block_shape) == 5
        and isinstance(info.created_at_unix, int | float)
    )


def _refuse_taken(path: Path) -> None:
    if os.path.lexists(path):
        raise SnapshotError(f"there is a snapshot {path.name!r} already")


def _sync(folder: Path) -> None:
    """Force a finished snapshot to the medium: it is made to be kept, once, by somebody who waits for it."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
