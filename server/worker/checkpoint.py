"""What a model folder may contain: safetensors weights that are what they say, and no code.

Nothing of the folder is executed, and no weight is read before these checks have passed.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.worker.errors import ModelLoadError

__all__ = ["TensorEntry", "WeightFile", "check_config_files", "hash_weights", "read_weight_files"]

_MAX_HEADER_BYTES = 32 << 20
_MAX_JSON_BYTES = 64 << 20
_MAX_TENSORS = 200_000
_COMPLETE_HASH_BYTES = 4 << 30
_SAMPLE_BYTES = 64 << 10
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5"}
_CODE_KEYS = {"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"}
_PLAIN_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; the byte range is half-open and counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A checked safetensors file."""

    path: Path
    num_bytes: int
    tensors: tuple[TensorEntry, ...]
    identity: tuple[int, int, int]
    """Inode, size and modification time when it was checked; :meth:`check_unchanged` compares."""

    def check_unchanged(self) -> None:
        """Raise ``ModelLoadError`` if the file is no longer the one that was checked."""
        if _identity(self.path) != self.identity:
            raise ModelLoadError(f"{self.path.name} changed while it was being loaded")


def check_config_files(folder: Path) -> None:
    """Refuse configuration that would run code or fetch a kernel, at any depth of any JSON file.

    Raises ``ModelLoadError``.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelLoadError("the folder holds an adapter, not a model; adapters are not served")
    for path in sorted(folder.glob("*.json")):
        # Vocabularies and indices hold user-like strings as keys, no settings.
        if path.name in ("tokenizer.json", "vocab.json") or path.name.endswith(".index.json"):
            continue
        for key, value in _walk(_read_json(path)):
            if key in _CODE_KEYS and value:
                raise ModelLoadError(f"{path.name} asks for code of its own ({key}); that is not served")
            if key.endswith(("attn_implementation", "attn_implementation_internal")):
                names = value.values() if isinstance(value, dict) else [value]
                if any(name is not None and name not in _PLAIN_ATTENTION for name in names):
                    raise ModelLoadError(f"{path.name} asks for an attention kernel of its own ({key})")


def read_weight_files(folder: Path, *, root: Path) -> list[WeightFile]:
    """Return the folder's weight files, checked. Links must stay below ``root``.

    Raises ``ModelLoadError``: only pickled weights, no weights, a file that is not safetensors, a part
    that the index names and that is missing.
    """
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelLoadError(f"{index_path.name} has no weight map")
        indexed = set(weight_map.values())
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in indexed):
            raise ModelLoadError(f"{index_path.name} names files that are not safetensors of this folder")
        missing = sorted(indexed - set(names))
        if missing:
            raise ModelLoadError(f"{missing[0]} is missing (named by {index_path.name})")
        names = sorted(indexed)
    elif "model.safetensors" in names:
        names = ["model.safetensors"]
    if not names:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if pickled:
            raise ModelLoadError(
                f"the weights are pickled ({pickled[0]}), which can run code; convert them to safetensors"
            )
        raise ModelLoadError("the folder has no safetensors weights")
    return [_read_weight_file(folder / name, root) for name in names]


def hash_weights(files: list[WeightFile]) -> tuple[str, bool]:
    """Return a SHA-256 over names, types, shapes and contents, and whether it covers every byte.

    Up to 4 GiB in all are hashed completely; beyond that the first and last 64 KiB of every tensor are.
    """
    is_complete = sum(f.num_bytes for f in files) <= _COMPLETE_HASH_BYTES
    digest = hashlib.sha256()
    for file in files:
        with file.path.open("rb") as stream:
            for entry in sorted(file.tensors, key=lambda t: t.name):
                digest.update(json.dumps([entry.name, entry.dtype, entry.shape]).encode())
                for start, stop in _ranges(entry, is_complete):
                    _update(digest, stream, start, stop)
    return digest.hexdigest(), is_complete


def _ranges(entry: TensorEntry, is_complete: bool) -> list[tuple[int, int]]:
    if is_complete or entry.stop - entry.start <= 2 * _SAMPLE_BYTES:
        return [(entry.start, entry.stop)]
    return [(entry.start, entry.start + _SAMPLE_BYTES), (entry.stop - _SAMPLE_BYTES, entry.stop)]


def _update(digest: Any, stream: Any, start: int, stop: int) -> None:
    stream.seek(start)
    while start < stop:
        piece = stream.read(min(stop - start, 8 << 20))
        if not piece:
            raise ModelLoadError("a weight file became shorter while it was being read")
        digest.update(piece)
        start += len(piece)


def _read_weight_file(path: Path, root: Path) -> WeightFile:
    if not path.resolve().is_relative_to(root.resolve()):
        raise ModelLoadError(f"{path.name} links to a file outside the model's folder")
    identity = _identity(path)
    size = identity[1]
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > size - 8 or header_bytes > _MAX_HEADER_BYTES:
            raise ModelLoadError(f"{path.name} is not a safetensors file (no plausible header)")
        raw = stream.read(header_bytes)
    if not raw.startswith(b"{"):
        raise ModelLoadError(f"{path.name} is not a safetensors file (its header is not JSON)")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelLoadError(f"{path.name} is not a safetensors file (its header is not JSON)") from None
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise ModelLoadError(f"{path.name} names more than {_MAX_TENSORS} tensors")
    tensors = [_tensor_entry(path, name, entry, 8 + header_bytes) for name, entry in header.items()]
    end = 8 + header_bytes
    for tensor in sorted(tensors, key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            raise ModelLoadError(f"{path.name}: tensors overlap or leave a gap at {tensor.name!r}")
        end = tensor.stop
    if end != size:
        raise ModelLoadError(f"{path.name} is truncated or has bytes after its last tensor")
    return WeightFile(path, size, tuple(tensors), identity)


def _tensor_entry(path: Path, name: str, entry: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, start, stop]
        well_formed = all(type(n) is int and 0 <= n < 1 << 62 for n in sizes) and start <= stop
        num_bytes = _DTYPE_BYTES[dtype]
        for n in shape:
            num_bytes *= n
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed or num_bytes != stop - start:
        raise ModelLoadError(f"{path.name}: the entry of tensor {name[:80]!r} is not well formed")
    return TensorEntry(name, dtype, tuple(shape), base + start, base + stop)


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        raise ModelLoadError(f"{path.name} can not be read") from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelLoadError(f"{path.name} is not a plain file")
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_json(path: Path) -> Any:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelLoadError(f"{path.name} is too large, or not a plain file")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise ModelLoadError(f"{path.name} can not be read as JSON") from None


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of nested JSON."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
