"""Weights in memory: each file is read once, into memory of our own, and hashed while that goes on.

Contents are named by a digest over the digests of pieces, which several threads make at once: SHA-256 over
the whole would take longer than all the rest of a load. That is made only where a manifest asks for it.

Every tensor has memory to itself: what the model does not use goes when nobody holds it any more, and where
the model computes in the stored precision nothing is copied. It is no mapping of the file either: whoever
changes or cuts that later changes nothing here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from server.worker.checkpoint import WeightFile
from server.worker.errors import ModelLoadError

__all__ = ["WeightReader", "Weights"]

_PIECE_BYTES = 8 << 20
NUM_HASHERS = 3
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of all files, and each file's SHA-256 once it is known."""

    tensors: dict[str, torch.Tensor]
    contents: Callable[[], dict[str, str]]
    """Digests of contents, by file name; waits for the hashing to end."""
    digests: Callable[[], dict[str, str]]
    """SHA-256 of whole files, where it was asked for; waits as well."""


class WeightReader:
    """Reads weight files; threads of its own hash what was read."""

    def __init__(self, *, needs_digests: bool) -> None:
        """``needs_digests``: also of whole files."""
        self._needs_digests = needs_digests
        self._pool = ThreadPoolExecutor(NUM_HASHERS, thread_name_prefix="kvserve-hash")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="kvserve-hash-whole")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)

    def read(self, files: Iterable[WeightFile], *, on_bytes: Callable[[int], None]) -> Weights:
        """Return the files' tensors. ``on_bytes``: how many were read so far. Raises ``ModelLoadError``."""
        tensors: dict[str, torch.Tensor] = {}
        digests: dict[str, Future[str]] = {}
        contents: dict[str, list[Future[bytes]]] = {}
        num_before = 0
        for file in files:
            _check_dtypes(file)
            digest = hashlib.sha256()
            parts = contents[file.path.name] = []
            done = 0
            told = 0
            with _open(file.path) as stream:
                for piece, tensor in _pieces(file):
                    _fill(stream, piece, file)
                    parts.append(self._pool.submit(_sha256, piece))
                    if self._needs_digests:
                        self._hasher.submit(digest.update, piece)
                    done += len(piece)
                    if tensor is not None:
                        tensors |= tensor
                    if done - told >= _PIECE_BYTES or done == file.num_bytes:
                        on_bytes(num_before + done)
                        told = done
            file.check_unchanged()
            if self._needs_digests:
                digests[file.path.name] = self._hasher.submit(digest.hexdigest)
            num_before += file.num_bytes
        return Weights(
            tensors,
            lambda: {
                name: _sha256(b"".join(part.result() for part in parts)).hex()
                for name, parts in contents.items()
            },
            lambda: {name: future.result() for name, future in digests.items()},
        )


def _sha256(piece: memoryview | bytes) -> bytes:
    return hashlib.sha256(piece).digest()


def _pieces(file: WeightFile) -> Any:
    """Yield places to read the file's bytes into, in their order, and the tensors that they are part of."""
    ordered = sorted(file.tensors, key=lambda tensor: (tensor.start, tensor.stop))
    header_bytes = ordered[0].start if ordered else file.num_bytes
    yield memoryview(bytearray(header_bytes)), None
    for entry in ordered:
        try:
            tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        except RuntimeError:
            raise ModelLoadError("there is no memory for the weights") from None
        if not tensor.numel():
            yield memoryview(b""), {entry.name: tensor}
            continue
        memory = tensor.view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(memory), _PIECE_BYTES):
            yield memory[start : start + _PIECE_BYTES], {entry.name: tensor}


def _fill(stream: Any, piece: memoryview, file: WeightFile) -> None:
    while len(piece):
        count = stream.readinto(piece)
        if not count:
            raise ModelLoadError(f"{file.path.name} became shorter while it was being read")
        piece = piece[count:]


def _check_dtypes(file: WeightFile) -> None:
    unknown = sorted({entry.dtype for entry in file.tensors} - set(_DTYPES))
    if unknown:
        raise ModelLoadError(f"{file.path.name} holds numbers of a type that is not served ({unknown[0]})")


def _open(path: Path) -> Any:
    try:
        return path.open("rb", buffering=0)
    except OSError:
        raise ModelLoadError(f"{path.name} can not be read") from None
