"""Tensors of the Open Inference Protocol: from a request's bytes to texts and rows, and back.

Nothing is trusted: shapes are multiplied out and compared with what was sent before anything is made of them.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.predict.messages import Inputs, TextItem
from server.rpc.errors import InvalidArgument
from server.rpc.oip import open_inference_pb2 as pb

__all__ = ["OutputTensor", "bytes_tensor", "float_tensor", "read_inputs"]

MAX_INPUTS = 8
MAX_RANK = 4
MAX_ELEMENTS = 1 << 28
_LENGTH_BYTES = 4
_FLOATS = {"FP32": "f", "FP64": "d"}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of an answer; ``data`` as ``raw_output_contents`` has it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


def float_tensor(name: str, shape: tuple[int, ...], data: bytes) -> OutputTensor:
    """Return a float32 tensor of little-endian bytes."""
    return OutputTensor(name, "FP32", shape, data)


def bytes_tensor(name: str, shape: tuple[int, ...], texts: Iterable[str]) -> OutputTensor:
    """Return a tensor of texts, each behind its length."""
    encoded = (text.encode() for text in texts)
    data = b"".join(len(text).to_bytes(_LENGTH_BYTES, "little") + text for text in encoded)
    return OutputTensor(name, "BYTES", shape, data)


def read_inputs(request: pb.ModelInferRequest, *, max_inputs: int) -> Inputs:
    """Return the texts or the rows of a request. Raises :class:`InvalidArgument`, naming the field.

    Texts: ``text`` and perhaps ``pair``, BYTES of [N] or [N, 1]. Rows: ``features``, FP32 or FP64 of [N, F].
    """
    raw = request.raw_input_contents
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise InvalidArgument.of("inputs", f"must have 1 to {MAX_INPUTS} tensors")
    if raw and len(raw) != len(request.inputs):
        raise InvalidArgument.of("raw_input_contents", "must have as many items as inputs")
    tensors: dict[str, tuple[str, pb.ModelInferRequest.InferInputTensor, bytes | None]] = {}
    for index, tensor in enumerate(request.inputs):
        where = f"inputs[{index}]"
        if tensor.name not in ("text", "pair", "features"):
            raise InvalidArgument.of(f"{where}.name", "must be text, pair or features")
        if tensor.name in tensors:
            raise InvalidArgument.of(f"{where}.name", "must not be given twice")
        if any(name.startswith("shared_memory") for name in tensor.parameters):
            raise InvalidArgument.of(f"{where}.parameters", "shared memory is not served")
        num_kinds = len(tensor.contents.ListFields()) if tensor.HasField("contents") else 0
        if num_kinds > (0 if raw else 1):
            reason = "must be empty beside raw_input_contents" if raw else "must have values of one type"
            raise InvalidArgument.of(f"{where}.contents", reason)
        tensors[tensor.name] = (where, tensor, raw[index] if raw else None)
    if "features" in tensors:
        if len(tensors) > 1:
            raise InvalidArgument.of("inputs", "features stand alone")
        return _rows(*tensors["features"], max_inputs=max_inputs)
    if "text" not in tensors:
        raise InvalidArgument.of("inputs", "must have text or features")
    texts = _texts(*tensors["text"], max_inputs=max_inputs)
    if "pair" not in tensors:
        return Inputs(texts=tuple(TextItem(text) for text in texts))
    pairs = _texts(*tensors["pair"], max_inputs=max_inputs)
    if len(pairs) != len(texts):
        raise InvalidArgument.of(f"{tensors['pair'][0]}.shape", "must be that of text")
    return Inputs(texts=tuple(map(TextItem, texts, pairs)))


def _count(where: str, shape: Sequence[int], *, max_inputs: int) -> int:
    """Return how many elements a tensor has."""
    if not 1 <= len(shape) <= MAX_RANK:
        raise InvalidArgument.of(f"{where}.shape", f"must have 1 to {MAX_RANK} dimensions")
    if min(shape) < 1:
        raise InvalidArgument.of(f"{where}.shape", "every dimension must be at least 1")
    if shape[0] > max_inputs:
        raise InvalidArgument.of(f"{where}.shape", f"must have at most {max_inputs} inputs")
    count = 1
    for size in shape:
        count *= size  # no overflow: Python's integers
        if count > MAX_ELEMENTS:
            raise InvalidArgument.of(f"{where}.shape", "has too many elements")
    return count


def _texts(
    where: str, tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, *, max_inputs: int
) -> list[str]:
    if tensor.datatype != "BYTES":
        raise InvalidArgument.of(f"{where}.datatype", "must be BYTES")
    count = _count(where, tensor.shape, max_inputs=max_inputs)
    if len(tensor.shape) > 2 or (len(tensor.shape) == 2 and tensor.shape[1] != 1):
        raise InvalidArgument.of(f"{where}.shape", "must be [N] or [N, 1]")
    found = list(tensor.contents.bytes_contents) if raw is None else _split(where, raw, count)
    if len(found) != count:
        raise InvalidArgument.of(f"{where}.contents", f"must have {count} texts, as its shape says")
    texts = []
    for index, text in enumerate(found):
        try:
            texts.append(text.decode())
        except UnicodeDecodeError:
            raise InvalidArgument.of(f"{where}.contents[{index}]", "must be UTF-8") from None
    return texts


def _split(where: str, raw: bytes, count: int) -> list[bytes]:
    texts: list[bytes] = []
    start = 0
    while start < len(raw) and len(texts) <= count:
        stop = start + _LENGTH_BYTES
        stop += int.from_bytes(raw[start:stop], "little")
        if stop > len(raw) or start + _LENGTH_BYTES > len(raw):
            raise InvalidArgument.of(f"{where}.contents", "a text is shorter than its length says")
        texts.append(raw[start + _LENGTH_BYTES : stop])
        start = stop
    return texts


def _rows(
    where: str, tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, *, max_inputs: int
) -> Inputs:
    if tensor.datatype not in _FLOATS:
        raise InvalidArgument.of(f"{where}.datatype", "must be FP32 or FP64")
    count = _count(where, tensor.shape, max_inputs=max_inputs)
    if len(tensor.shape) != 2:
        raise InvalidArgument.of(f"{where}.shape", "must be [N, features]")
    code = _FLOATS[tensor.datatype]
    if raw is None:
        contents = tensor.contents
        given = contents.fp32_contents if code == "f" else contents.fp64_contents
        if len(given) != count:
            raise InvalidArgument.of(f"{where}.contents", f"must have {count} numbers, as its shape says")
        values = array(code, given)
    else:
        values = array(code)
        if len(raw) != count * values.itemsize:
            raise InvalidArgument.of("raw_input_contents", f"must have {count} numbers, as the shape says")
        values.frombytes(raw)
        if sys.byteorder == "big":
            values.byteswap()
    # What float32 cannot hold becomes infinite, and is refused as such later.
    floats = values if code == "f" else array("f", values)
    return Inputs(rows=_little_endian(floats), num_rows=tensor.shape[0])


def _little_endian(values: array[float]) -> bytes:
    if sys.byteorder == "big":
        return struct.pack(f"<{len(values)}f", *values)
    return values.tobytes()
