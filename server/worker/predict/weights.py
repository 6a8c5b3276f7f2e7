"""Weights in memory: each file is read once, into memory of our own, and hashed while that goes on.

Tensors are views of what was read, so that nothing is copied where the model computes in the stored
precision; they are no mapping of the file: whoever changes or cuts it later changes nothing here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from server.worker.checkpoint import TensorEntry, WeightFile
from server.worker.errors import ModelLoadError

__all__ = ["WeightReader", "Weights", "drop_unused"]

_PIECE_BYTES = 8 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of all files, and each file's SHA-256 once it is known."""

    tensors: dict[str, torch.Tensor]
    digests: Callable[[], dict[str, str]]
    """By file name; waits for the hashing to end."""


class WeightReader:
    """Reads weight files; a thread of its own hashes what was read."""

    def __init__(self) -> None:
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="kvserve-hash")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown(cancel_futures=True)

    def read(self, files: Iterable[WeightFile], *, on_bytes: Callable[[int], None]) -> Weights:
        """Return the files' tensors. ``on_bytes``: how many were read so far. Raises ``ModelLoadError``."""
        tensors: dict[str, torch.Tensor] = {}
        digests = {}
        num_before = 0
        for file in files:
            self._check_dtypes(file)
            buffer, digest = self._read_file(file, lambda n, base=num_before: on_bytes(base + n))  # type: ignore[misc]
            digests[file.path.name] = digest
            tensors |= {entry.name: _view(buffer, entry) for entry in file.tensors}
            num_before += file.num_bytes
        return Weights(tensors, lambda: {name: future.result() for name, future in digests.items()})

    def _check_dtypes(self, file: WeightFile) -> None:
        unknown = sorted({entry.dtype for entry in file.tensors} - set(_DTYPES))
        if unknown:
            raise ModelLoadError(
                f"{file.path.name} holds numbers of a type that is not served ({unknown[0]})"
            )

    def _read_file(self, file: WeightFile, on_bytes: Callable[[int], None]) -> tuple[torch.Tensor, Any]:
        size = file.num_bytes
        first = min((entry.start for entry in file.tensors), default=size)
        # The first tensor begins at a multiple of 64, wherever the header ended: vector loads like that.
        gap = -first % 64
        try:
            buffer = torch.empty(gap + size, dtype=torch.uint8)
        except RuntimeError:
            raise ModelLoadError("there is no memory for the weights") from None
        memory = memoryview(buffer.numpy().data)[gap:]
        digest = hashlib.sha256()
        done = 0
        with _open(file.path) as stream:
            while done < size:
                count = stream.readinto(memory[done : done + _PIECE_BYTES])
                if not count:
                    raise ModelLoadError(f"{file.path.name} became shorter while it was being read")
                self._hasher.submit(digest.update, memory[done : done + count])
                done += count
                on_bytes(done)
        file.check_unchanged()
        return buffer[gap:], self._hasher.submit(digest.hexdigest)


def _open(path: Path) -> Any:
    try:
        return path.open("rb", buffering=0)
    except OSError:
        raise ModelLoadError(f"{path.name} can not be read") from None


def _view(buffer: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    raw = buffer[entry.start : entry.stop]
    dtype = _DTYPES[entry.dtype]
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)


def drop_unused(model: torch.nn.Module) -> None:
    """Copy tensors out of buffers of which the model uses little, so that those are freed.

    All tensors of a file share one buffer: a decoder that nobody asks for would stay with its encoder.
    """
    held = [*model.parameters(), *model.buffers()]
    used: dict[int, int] = {}
    for tensor in held:
        place = tensor.untyped_storage().data_ptr()
        used[place] = used.get(place, 0) + tensor.nbytes
    for tensor in held:
        storage = tensor.untyped_storage()
        if used[storage.data_ptr()] < 0.9 * storage.nbytes():
            tensor.data = tensor.data.clone()
