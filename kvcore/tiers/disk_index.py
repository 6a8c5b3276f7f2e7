"""How a disk tier knows at its start what it has: from the index of a clean end, else from every header.

The index file is an optimisation, never the truth. It is removed as soon as it has been read, so that after
a crash the headers are read; a row without a file is dropped; a file without a row is looked at; and what a
row says wrongly is found when the object is fetched. Headers are checked for form and for the chain step
from parent and tokens to the digest in the file's name; payloads when they are fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvcore.keys import TOKEN_BYTES, PrefixDigest
from kvcore.tiers.disk_files import FileRefused, Files
from kvcore.tiers.disk_folder import DiskFolder
from kvcore.tiers.index import IndexEntry
from kvcore.tiers.interface import FetchFailure, ObjectFormat, ObjectKey, ObjectKind
from kvcore.tiers.objects import HEADER_BYTES, ObjectError, check_chain, max_object_bytes, read_header

__all__ = [
    "IndexRow",
    "SkippedFile",
    "entry_of_row",
    "load_rows",
    "page_bytes",
    "row_of_entry",
    "save_rows",
]

_MAGIC = b"kvindex\x01"
_ROW = struct.Struct("<32s B 32s 32s I Q d d d")
_KINDS = tuple(ObjectKind)
_CHECKSUM_BYTES = 16
_MAX_INDEX_BYTES = 1 << 30
_NEVER = float("inf")
_SCAN_THREADS = 4
_PROGRESS_EVERY = 256
_PAGE_BYTES = 4096

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class IndexRow:
    """What the index knows of one file. Times are of the wall clock."""

    key: ObjectKey
    namespace: PrefixDigest
    parent: PrefixDigest
    depth: int
    file_bytes: int
    used_at_unix: float
    expires_at_unix: float | None
    lifetime_s: float = _NEVER
    """What was left of its lifetime when this was written: a clock that was set back adds nothing."""


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file under an object's name that is not that object."""

    path: Path
    failure: FetchFailure


def save_rows(path: Path, temporary: Path, rows: Iterable[IndexRow], files: Files) -> None:
    """Write the index file. Raises ``OSError``."""
    body = b"".join(
        _ROW.pack(
            row.key.digest,
            _KINDS.index(row.key.kind),
            row.namespace,
            row.parent,
            row.depth,
            row.file_bytes,
            row.used_at_unix,
            _NEVER if row.expires_at_unix is None else row.expires_at_unix,
            row.lifetime_s,
        )
        for row in rows
    )
    files.write(temporary, path, [_MAGIC, _checksum(body), body])


def load_rows(
    folder: DiskFolder,
    object_format: ObjectFormat,
    files: Files,
    *,
    on_progress: OnProgress | None = None,
) -> Iterator[IndexRow | SkippedFile]:
    """Yield what is there, in no order. Files that cannot be read just now are left out.

    ``on_progress(done, total)`` is called now and then, and at the end.
    """
    known = _read_index(folder.index_path, files)
    with contextlib.suppress(OSError):
        files.unlink(folder.index_path)
    found = list(folder.objects())
    unknown = [(key, path) for key, path in found if key not in known]
    done = len(found) - len(unknown)
    for key, _ in found:
        if key in known:
            yield known[key]
    with ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="kv-disk-scan") as pool:
        for row in pool.map(lambda item: _look_at(item[0], item[1], object_format, files), unknown):
            done += 1
            if on_progress is not None and done % _PROGRESS_EVERY == 0:
                on_progress(done, len(found))
            if row is not None:
                yield row
    if on_progress is not None:
        on_progress(len(found), len(found))


def page_bytes(num_bytes: int) -> int:
    """Return the room that a file takes: whole pages."""
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES


def entry_of_row(row: IndexRow, now: float, now_unix: float) -> IndexEntry:
    """Return what a tier whose clock says ``now`` keeps of a row."""
    left = None if row.expires_at_unix is None else min(row.expires_at_unix - now_unix, row.lifetime_s)
    return IndexEntry(
        row.key,
        page_bytes(row.file_bytes),
        used_at=now - max(0.0, now_unix - row.used_at_unix),
        namespace=row.namespace,
        parent=row.parent,
        depth=row.depth,
        expires_at=None if left is None else now + left,
    )


def row_of_entry(entry: IndexEntry, key: ObjectKey, now: float, now_unix: float) -> IndexRow:
    """Return the row that brings an entry back in another process."""
    left = None if entry.expires_at is None else entry.expires_at - now
    return IndexRow(
        key=key,
        namespace=entry.namespace,
        parent=entry.parent,
        depth=entry.depth,
        file_bytes=entry.num_bytes,
        used_at_unix=now_unix - (now - entry.used_at),
        expires_at_unix=None if left is None else now_unix + left,
        lifetime_s=_NEVER if left is None else left,
    )


def _look_at(
    key: ObjectKey, path: Path, object_format: ObjectFormat, files: Files
) -> IndexRow | SkippedFile | None:
    max_head = HEADER_BYTES + TOKEN_BYTES * object_format.block_size
    try:
        head, status = files.read_head(path, max_head, max_bytes=max_object_bytes(object_format, key.kind))
        header = read_header(head)
        if header.key != key or header.object_bytes != status.st_size:
            raise ObjectError(FetchFailure.MISMATCH, "not the object that its name says, or cut short")
        check_chain(header, head[HEADER_BYTES : HEADER_BYTES + TOKEN_BYTES * header.num_tokens])
    except FileRefused:
        return SkippedFile(path, FetchFailure.CORRUPT)
    except ObjectError as error:
        return SkippedFile(path, error.failure)
    except OSError:
        return None
    return IndexRow(
        key=key,
        namespace=header.namespace,
        parent=header.parent,
        depth=header.depth,
        file_bytes=status.st_size,
        used_at_unix=status.st_mtime,
        expires_at_unix=header.expires_at_unix,
        lifetime_s=header.lifetime_s if header.expires_at_unix is not None else _NEVER,
    )


def _read_index(path: Path, files: Files) -> dict[ObjectKey, IndexRow]:
    """Return the rows of the index file; none if it is missing or not sound."""
    try:
        data = memoryview(files.read(path, max_bytes=_MAX_INDEX_BYTES))
    except (OSError, FileRefused):
        return {}
    start = len(_MAGIC) + _CHECKSUM_BYTES
    body = data[start:]
    is_sound = data[: len(_MAGIC)] == _MAGIC and data[len(_MAGIC) : start] == _checksum(body)
    if not is_sound or len(body) % _ROW.size:
        return {}
    rows = {}
    for digest, kind, namespace, parent, depth, file_bytes, used_at, expires_at, left in _ROW.iter_unpack(
        body
    ):
        key = ObjectKey(PrefixDigest(digest), _KINDS[kind])
        rows[key] = IndexRow(
            key=key,
            namespace=PrefixDigest(namespace),
            parent=PrefixDigest(parent),
            depth=depth,
            file_bytes=file_bytes,
            used_at_unix=used_at,
            expires_at_unix=None if expires_at == _NEVER else expires_at,
            lifetime_s=left,
        )
    return rows


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]
