"""Compare a folder's files with the digests that somebody vouched for.

Two manifests: the mapping in the model's catalogue entry, and a file ``SHA256SUMS`` in the folder, as
``sha256sum`` writes it::

    find . -type f ! -name SHA256SUMS -exec sha256sum {} + > SHA256SUMS

The first protects against whoever can write to the folder, the second against damage alone. Either is
complete: a file that it does not name is refused, for a loader might read it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from types import MappingProxyType

from server.predict.errors import ModelRefusedError
from server.predict.model import LoadProgress
from server.predict.sources.folder import CheckedFile, Identity, identity_of
from server.predict.sources.names import check_relative_path

__all__ = ["SUMS_NAME", "format_sums", "hash_files", "parse_sums", "verify_files"]

SUMS_NAME = "SHA256SUMS"
MAX_SUMS_BYTES = 4 << 20
PIECE_BYTES = 8 << 20
NUM_THREADS = 4
TICK_NS = 20_000_000
NOTHING_KNOWN: Mapping[Identity, str] = MappingProxyType({})

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")

log = logging.getLogger(__name__)


def verify_files(
    files: Sequence[CheckedFile],
    manifest: Mapping[str, str] | None,
    *,
    on_progress: LoadProgress,
    known: Mapping[Identity, str] = NOTHING_KNOWN,
) -> tuple[CheckedFile, ...]:
    """Return the files with their digests, compared with ``manifest`` and the folder's own ``SHA256SUMS``.

    Each file is read once, in a few threads; ``on_progress`` is called in the caller's. Without a manifest of
    either kind nothing is read. ``known``: digests of files that were hashed a moment ago.
    Raises ``ModelRefusedError``: an altered, missing or extra file.
    """
    manifests = [] if manifest is None else [("the manifest", _checked(manifest, "the manifest"))]
    sums = next((file for file in files if file.name == SUMS_NAME), None)
    if sums is not None:
        manifests.append((SUMS_NAME, parse_sums(_read_small(sums))))
    if not manifests:
        return tuple(files)
    for title, digests in manifests:
        _compare_names(files, digests, title)
    files = [replace(file, sha256=known.get(file.identity)) for file in files]
    hashed = hash_files([file for file in files if file.sha256 is None], on_progress=on_progress)
    by_name = {file.name: file for file in hashed}
    verified = tuple(by_name.get(file.name, file) for file in files)
    for title, digests in manifests:
        for file in verified:
            # A list of files can not hold its own digest; whoever signs for it does so in the catalogue.
            if file.name in digests and digests[file.name] != file.sha256:
                raise ModelRefusedError(f"{file.name} is not the file that {title} names (SHA-256 differs)")
    return verified


def parse_sums(text: bytes) -> dict[str, str]:
    """Read what ``sha256sum`` writes: file name to digest in lower case. Raises ``ModelRefusedError``."""
    digests: dict[str, str] = {}
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError:
        raise ModelRefusedError(f"{SUMS_NAME} is not text") from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise ModelRefusedError(f"{SUMS_NAME}: line {number} is not what sha256sum writes")
        name = found[2].removeprefix("./")
        if digests.setdefault(name, found[1].lower()) != found[1].lower():
            raise ModelRefusedError(f"{SUMS_NAME}: line {number} contradicts an earlier one")
    return _checked(digests, SUMS_NAME)


def format_sums(files: Sequence[CheckedFile]) -> bytes:
    """Write the digests of verified files as ``sha256sum`` does, in the order of their names."""
    return "".join(f"{file.sha256}  {file.name}\n" for file in sorted(files, key=lambda f: f.name)).encode()


def _checked(digests: Mapping[str, str], title: str) -> dict[str, str]:
    for name, digest in digests.items():
        check_relative_path(name, what=f"a file name in {title}")
        if not _DIGEST.fullmatch(digest):
            raise ModelRefusedError(f"{title} has a digest that is not 64 hexadecimal digits")
    if not digests:
        raise ModelRefusedError(f"{title} names no file")
    return {name: digest.lower() for name, digest in digests.items()}


def _compare_names(files: Sequence[CheckedFile], digests: Mapping[str, str], title: str) -> None:
    present = {file.name for file in files}
    missing = sorted(set(digests) - present)
    if missing:
        raise ModelRefusedError(f"{missing[0]} is missing ({title} names it)")
    extra = sorted(present - set(digests) - {SUMS_NAME})
    if extra:
        raise ModelRefusedError(f"{extra[0]!r} is in the folder and not in {title}")


def _read_small(file: CheckedFile) -> bytes:
    if file.identity.num_bytes > MAX_SUMS_BYTES:
        raise ModelRefusedError(f"{file.name} is too large")
    return b"".join(bytes(piece) for piece in _pieces(file))


def hash_files(files: Sequence[CheckedFile], *, on_progress: LoadProgress) -> tuple[CheckedFile, ...]:
    """Return the files with their digests. Raises ``ModelRefusedError`` for one that changes meanwhile."""
    num_bytes = sum(file.identity.num_bytes for file in files)
    hashed: SimpleQueue[int | None] = SimpleQueue()

    def hash_one(file: CheckedFile) -> CheckedFile:
        try:
            digest = hashlib.sha256()
            for piece in _pieces(file):
                digest.update(piece)
                hashed.put(len(piece))
            return replace(file, sha256=digest.hexdigest())
        finally:
            hashed.put(None)

    if not files:
        return ()
    _let_ticks_pass(files)
    num_done = num_finished = 0
    with ThreadPoolExecutor(min(NUM_THREADS, len(files)), thread_name_prefix="checking") as pool:
        # The largest first, so that no thread is left alone with it at the end.
        largest_first = sorted(files, key=lambda file: -file.identity.num_bytes)
        futures: dict[str, Future[CheckedFile]] = {f.name: pool.submit(hash_one, f) for f in largest_first}
        on_progress("checking", 0, num_bytes)
        while num_finished < len(files):
            if (num_piece := hashed.get()) is None:
                num_finished += 1
            else:
                num_done += num_piece
                on_progress("checking", num_done, num_bytes)
        return tuple(futures[file.name].result() for file in files)


def _let_ticks_pass(files: Sequence[CheckedFile]) -> None:
    """Wait a moment if a file was changed just now.

    The kernel's file times advance in ticks: another write in the same tick would leave no trace. After this
    no write that follows can bear the time that is remembered.
    """
    age_ns = time.time_ns() - max(file.identity.changed_ns for file in files)
    if 0 <= age_ns < TICK_NS:
        time.sleep(TICK_NS / 1e9)


def _pieces(file: CheckedFile) -> Iterator[memoryview]:
    """Yield the file's bytes; each piece is overwritten by the next. Raises ``ModelRefusedError``."""
    buffer = bytearray(min(PIECE_BYTES, file.identity.num_bytes + 1))
    num_read = 0
    try:
        # Without blocking: what was a file when the folder was listed may be a pipe by now.
        handle = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb", buffering=0) as stream:
            if identity_of(os.fstat(handle)) == file.identity:
                while num_piece := stream.readinto(buffer):
                    num_read += num_piece
                    yield memoryview(buffer)[:num_piece]
            is_same = identity_of(os.fstat(handle)) == file.identity
    except OSError as error:
        log.info("a model's file can not be read", exc_info=error)
        raise ModelRefusedError(f"{file.name} can not be read") from None
    if not is_same or num_read != file.identity.num_bytes:
        raise ModelRefusedError(f"{file.name} changed while it was being checked")
