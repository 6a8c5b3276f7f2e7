"""How a payload is written down: as it is, smaller, or smaller and not quite the same.

==========  =============================================================  ======
codec       bytes of an encoded block                                      lossy
==========  =============================================================  ======
``none``    the payload                                                    no
``zstd``    one zstd frame over the payload's byte planes                  no
``int8``    float32 scales [layer, K/V, head], then int8 as the payload    yes
==========  =============================================================  ======

Byte planes: all highest bytes of the elements, then all second highest, and so on. Sign and exponent of
neighbours resemble each other, mantissas are noise; side by side, the former compress and the latter do
not spoil it. Measured on the built-in model's KV at level 1: float32 1.23 to 1.33 times smaller (1.14
without planes), bfloat16 1.55 to 1.72 (1.37); higher levels cost two to ten times the time for one percent.

Scales are symmetric, the largest magnitude over 127, one per layer, K or V, and head of a block. Logits
are never lossy: whoever gets ``int8`` for them gets ``none``.

Thread-safe: what a codec keeps, it keeps per thread. Encoding and decoding release the interpreter lock
for most of their time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import CacheError
from kvcore.tiers.interface import ObjectFormat, ObjectKind

try:
    import zstandard
except ImportError:  # pragma: no cover - the extra `zstd` is not installed
    zstandard = None  # type: ignore[assignment]

__all__ = [
    "Buffer",
    "Codec",
    "CodecError",
    "CodecName",
    "Divergence",
    "Encoded",
    "Int8Codec",
    "NoCodec",
    "ZstdCodec",
    "codec_of",
    "divergence_of",
    "make_codec",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

ZSTD_LEVEL = 1
_INT8_MAX = 127.0
_SCALE_BYTES = 4


class CodecName(StrEnum):
    """What an operator writes into the configuration, and a file carries as a number."""

    NONE = "none"
    ZSTD = "zstd"
    INT8 = "int8"


class CodecError(CacheError):
    """A payload cannot be encoded, encoded bytes cannot be decoded, or a codec is not installed."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a decoded payload is from the original. Zero is the same."""

    cosine_distance: float
    """1 - cosine of the angle between the two, taken as vectors: 0 to 2."""
    relative_l2: float
    """Length of the difference over the length of the original."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A payload as a tier keeps it."""

    data: Buffer
    divergence: Divergence | None = None
    """None for a lossless codec."""


class Codec(Protocol):
    """A way to write payloads down. Calls may come from several threads at once."""

    @property
    def name(self) -> CodecName:
        """Return the codec's name."""
        ...

    @property
    def is_lossy(self) -> bool:
        """Say whether decoding may give back other bits."""
        ...

    def encode(
        self,
        payload: Buffer,
        object_format: ObjectFormat,
        *,
        kind: ObjectKind = ObjectKind.BLOCK,
        num_slots: int | None = None,
    ) -> Encoded:
        """Encode a payload. Of a partial block only the first ``num_slots`` slots mean anything.

        Raises ``CodecError`` for content that the codec cannot carry.
        """
        ...

    def decode(
        self, data: Buffer, object_format: ObjectFormat, *, kind: ObjectKind = ObjectKind.BLOCK
    ) -> Buffer:
        """Return the payload, of exactly the format's size; raise ``CodecError`` for anything else.

        No more memory is asked for than the format's payload takes, whatever the bytes claim.
        """
        ...

    def max_encoded_bytes(self, object_format: ObjectFormat, kind: ObjectKind) -> int:
        """Return a size that no encoded payload of this kind exceeds."""
        ...


class NoCodec:
    """The payload as it is, without a copy."""

    name = CodecName.NONE
    is_lossy = False

    def encode(
        self,
        payload: Buffer,
        object_format: ObjectFormat,
        *,
        kind: ObjectKind = ObjectKind.BLOCK,
        num_slots: int | None = None,
    ) -> Encoded:
        _check_size(payload, object_format.payload_bytes(kind))
        return Encoded(payload)

    def decode(
        self, data: Buffer, object_format: ObjectFormat, *, kind: ObjectKind = ObjectKind.BLOCK
    ) -> Buffer:
        _check_size(data, object_format.payload_bytes(kind))
        return data

    def max_encoded_bytes(self, object_format: ObjectFormat, kind: ObjectKind) -> int:
        return object_format.payload_bytes(kind)


class ZstdCodec:
    """Byte planes under zstd: the same bits back."""

    name = CodecName.ZSTD
    is_lossy = False

    def __init__(self, level: int = ZSTD_LEVEL) -> None:
        if zstandard is None:
            raise CodecError("codec zstd needs the package zstandard: install the extra `zstd`")
        self._level = level
        self._local = threading.local()

    def encode(
        self,
        payload: Buffer,
        object_format: ObjectFormat,
        *,
        kind: ObjectKind = ObjectKind.BLOCK,
        num_slots: int | None = None,
    ) -> Encoded:
        _check_size(payload, object_format.payload_bytes(kind))
        planes = _split_planes(payload, _element_bytes(object_format, kind))
        compressor = self._mine("compressor", lambda: zstandard.ZstdCompressor(level=self._level))
        return Encoded(compressor.compress(planes.data))

    def decode(
        self, data: Buffer, object_format: ObjectFormat, *, kind: ObjectKind = ObjectKind.BLOCK
    ) -> Buffer:
        num_bytes = object_format.payload_bytes(kind)
        try:
            # The size that a frame claims is what the library would allocate.
            if zstandard.frame_content_size(data) != num_bytes:
                raise CodecError("a zstd frame of another size than the payload's")
            decompressor = self._mine("decompressor", zstandard.ZstdDecompressor)
            planes = decompressor.decompress(data, max_output_size=num_bytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError("not a sound zstd frame") from error
        _check_size(planes, num_bytes)
        return _join_planes(planes, _element_bytes(object_format, kind))

    def max_encoded_bytes(self, object_format: ObjectFormat, kind: ObjectKind) -> int:
        num_bytes = object_format.payload_bytes(kind)
        return num_bytes + num_bytes // 128 + 512  # above ZSTD_compressBound

    def _mine(self, what: str, make: Callable[[], Any]) -> Any:
        """Return this thread's own: the library's contexts must not be shared."""
        made = getattr(self._local, what, None)
        if made is None:
            made = make()
            setattr(self._local, what, made)
        return made


class Int8Codec:
    """A quarter (float32) or half of the bytes, with an error that is measured for each block."""

    name = CodecName.INT8
    is_lossy = True

    def encode(
        self,
        payload: Buffer,
        object_format: ObjectFormat,
        *,
        kind: ObjectKind = ObjectKind.BLOCK,
        num_slots: int | None = None,
    ) -> Encoded:
        if kind is ObjectKind.LOGITS:
            raise CodecError("logits are kept without loss")
        _check_size(payload, object_format.bytes_per_block)
        values = _to_float32(payload, object_format.dtype).reshape(object_format.block_shape)
        if num_slots is not None and num_slots < object_format.block_size:
            values = values.copy()
            values[:, :, num_slots:] = 0  # whatever lies there must not stretch the scale
        largest = np.abs(values).max(axis=(2, 4), keepdims=True)
        if not np.isfinite(largest).all():  # the maximum of anything with a NaN is NaN
            raise CodecError("NaN or infinity in a payload: it has no scale")
        scales = (largest / np.float32(_INT8_MAX)).astype(np.float32)
        divisors = np.where(scales > 0, scales, np.float32(1))
        codes = np.clip(np.rint(values / divisors), -_INT8_MAX, _INT8_MAX).astype(np.int8)
        decoded = _to_float32(_from_float32(codes * scales, object_format.dtype), object_format.dtype)
        data = scales.astype("<f4").tobytes() + codes.tobytes()
        return Encoded(data, _divergence(values.reshape(-1), decoded))

    def decode(
        self, data: Buffer, object_format: ObjectFormat, *, kind: ObjectKind = ObjectKind.BLOCK
    ) -> Buffer:
        if kind is ObjectKind.LOGITS:
            raise CodecError("logits are kept without loss")
        _check_size(data, self.max_encoded_bytes(object_format, kind))
        layers, two, _, heads, _ = object_format.block_shape
        num_scales = layers * two * heads
        scales = np.frombuffer(data, "<f4", num_scales).reshape(layers, two, 1, heads, 1)
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise CodecError("a scale that no block has")
        codes = np.frombuffer(data, np.int8, offset=_SCALE_BYTES * num_scales)
        return _from_float32(codes.reshape(object_format.block_shape) * scales, object_format.dtype)

    def max_encoded_bytes(self, object_format: ObjectFormat, kind: ObjectKind) -> int:
        layers, two, slots, heads, dim = object_format.block_shape
        return layers * two * heads * (_SCALE_BYTES + slots * dim)


def make_codec(name: CodecName | str) -> Codec:
    """Return a codec by name; raise ``CodecError`` for one that is unknown or not installed."""
    if name not in tuple(CodecName):
        raise CodecError(f"unknown codec {name!r}: one of {', '.join(CodecName)}")
    wanted = CodecName(name)
    if wanted is CodecName.ZSTD:
        return ZstdCodec()
    return Int8Codec() if wanted is CodecName.INT8 else NoCodec()


def codec_of(codec: Codec, kind: ObjectKind) -> Codec:
    """Return the codec that objects of ``kind`` go through where ``codec`` is configured."""
    return NoCodec() if kind is ObjectKind.LOGITS and codec.is_lossy else codec


def divergence_of(original: Buffer, decoded: Buffer, dtype: str) -> Divergence:
    """Compare two payloads of one dtype (float32, bfloat16 or float16)."""
    return _divergence(_to_float32(original, dtype), _to_float32(decoded, dtype))


def _divergence(original: NDArray[np.float32], decoded: NDArray[np.float32]) -> Divergence:
    """Compare in float64: the sums of a large block lose digits otherwise."""
    a, b = original.astype(np.float64), decoded.astype(np.float64)
    length_a, length_b = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
    if length_a == 0 or length_b == 0:
        apart = 0.0 if length_a == length_b else 1.0
        return Divergence(apart, apart)
    difference = a - b
    cosine = float(a @ b) / (length_a * length_b)
    return Divergence(max(0.0, 1.0 - cosine), math.sqrt(float(difference @ difference)) / length_a)


def _check_size(data: Buffer, expected: int) -> None:
    num_bytes = memoryview(data).nbytes
    if num_bytes != expected:
        raise CodecError(f"{num_bytes} bytes where {expected} belong")


def _element_bytes(object_format: ObjectFormat, kind: ObjectKind) -> int:
    return 4 if kind is ObjectKind.LOGITS or object_format.dtype == "float32" else 2


def _split_planes(payload: Buffer, element_bytes: int) -> NDArray[np.uint8]:
    """Return the bytes of the elements, highest first, in one row each."""
    # With shifts, which numpy does in vector registers; transposing single bytes takes three times as long.
    elements = np.frombuffer(payload, f"<u{element_bytes}")
    planes = np.empty((element_bytes, elements.size), np.uint8)
    for plane in range(element_bytes):
        planes[element_bytes - 1 - plane] = elements >> elements.dtype.type(8 * plane)
    return planes


def _join_planes(data: Buffer, element_bytes: int) -> memoryview:
    planes = np.frombuffer(data, np.uint8).reshape(element_bytes, -1)
    elements = planes[0].astype(f"<u{element_bytes}")
    for plane in planes[1:]:
        elements <<= elements.dtype.type(8)
        elements |= plane
    return _bytes_of(elements)


def _to_float32(payload: Buffer, dtype: str) -> NDArray[np.float32]:
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(payload, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(payload, "<f4" if dtype == "float32" else "<f2").astype(np.float32, copy=False)


def _from_float32(values: NDArray[np.float32], dtype: str) -> memoryview:
    """Return finite values as bytes, rounded to nearest, halves to even; too large ones to the largest."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return _bytes_of(rounded.astype("<u2"))
    if dtype == "float16":
        largest = np.float32(np.finfo(np.float16).max)
        return _bytes_of(np.clip(values, -largest, largest).astype("<f2"))
    return _bytes_of(values.astype("<f4", copy=False))


def _bytes_of(values: NDArray[Any]) -> memoryview:
    """Return an array's memory, not copied, to be written to by whoever gets it."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
