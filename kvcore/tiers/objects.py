r"""A cache object as bytes: what lies in a file, in Redis and in a snapshot.

::

    ┌────────┬─────────┬─────────────┬──────────┐
    │ header │ tokens  │ payload     │ checksum │      header 224 bytes, tokens 4 bytes each, checksum 16
    └────────┴─────────┴─────────────┴──────────┘
     fixed:   magic, object version, layout version, kind, codec, dtype, flags, block shape, vocabulary,
              depth, tokens, expiry, lifetime, raw bytes, encoded bytes,
              fingerprint digest, namespace, parent, digest

Nothing in it is code, and no size in it is believed: an object of a known format has one size, known
before a byte is read, and everything that differs is refused before memory is asked for.

Two checks stand between a file and a wrong token. The checksum (SHA-256, cut to 128 bits, over all that
comes before it) catches what disks and networks do. The name catches what is sound but not what was asked
for: the object's digest is computed again from parent and tokens (one step of the chain of
``kvcore.keys``), and digest, namespace, fingerprint, dtype and shape must be the expected ones.

SHA-256 because it is what the standard library does fastest beyond 64 bits: 1.6 GB/s here (with the
processor's instructions for it), BLAKE2b 0.8, MD5 0.7; CRC-32 does 3.6 and is too short.

Lifetimes are written as wall-clock time, since nothing else outlives a process, together with their
length, so that a clock that was set back lengthens none. Within a process the wall clock is not asked.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.codec import Buffer, Codec, CodecError, CodecName, Divergence, codec_of, make_codec
from kvcore.errors import CacheError
from kvcore.keys import LAYOUT_VERSION, TOKEN_BYTES, PrefixDigest, chain_digests
from kvcore.tiers.interface import CacheObject, FetchFailure, ObjectFormat, ObjectKey, ObjectKind

__all__ = [
    "CHECKSUM_BYTES",
    "HEADER_BYTES",
    "OBJECT_VERSION",
    "Decoded",
    "EncodedObject",
    "ObjectError",
    "ObjectHeader",
    "check_chain",
    "decode",
    "encode",
    "fingerprint_digest",
    "max_object_bytes",
    "read_header",
]

OBJECT_VERSION = 1

_MAGIC = b"kvserve\x1a"
_HEADER = struct.Struct("<8s HH BBBB 5I I I I d d Q Q 32s 32s 32s 32s 16x")
HEADER_BYTES = _HEADER.size
CHECKSUM_BYTES = 16
_DIGEST_BYTES = 32

_KINDS = (ObjectKind.BLOCK, ObjectKind.PARTIAL, ObjectKind.LOGITS)
_CODECS = (CodecName.NONE, CodecName.ZSTD, CodecName.INT8)
_DTYPES = ("float32", "bfloat16", "float16")
_HAS_EXPIRY = 1
_BIG_ENDIAN = 2
_ORDER_FLAG = _BIG_ENDIAN if sys.byteorder == "big" else 0


class ObjectError(CacheError):
    """Bytes that are not the object that was asked for, and why."""

    def __init__(self, failure: FetchFailure, reason: str) -> None:
        super().__init__(f"{failure.value}: {reason}")
        self.failure = failure
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """What an object says of itself. True only if its checksum is."""

    kind: ObjectKind
    codec: CodecName
    dtype: str
    block_shape: tuple[int, ...]
    vocab_size: int
    depth: int
    num_tokens: int
    expires_at_unix: float | None
    lifetime_s: float
    """What was left of its lifetime when it was written; 0 without one."""
    raw_bytes: int
    encoded_bytes: int
    fingerprint: bytes
    """Digest of the format's fingerprint."""
    namespace: PrefixDigest
    parent: PrefixDigest
    digest: PrefixDigest

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.digest, self.kind)

    @property
    def object_bytes(self) -> int:
        """Return the size of the whole object, as its header has it."""
        return HEADER_BYTES + TOKEN_BYTES * self.num_tokens + self.encoded_bytes + CHECKSUM_BYTES

    def expires_in_s(self, now_unix: float) -> float | None:
        """Return what is left of its lifetime (0 or less: over); never more than there was when written."""
        if self.expires_at_unix is None:
            return None
        return min(self.expires_at_unix - now_unix, self.lifetime_s)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedObject:
    """An object ready to be written: one buffer after the other, none of them copied."""

    buffers: Sequence[Buffer]
    num_bytes: int
    divergence: Divergence | None

    def to_bytes(self) -> bytes:
        """Return all of it as one."""
        return b"".join(self.buffers)


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An object that has passed every check."""

    found: CacheObject
    header: ObjectHeader
    is_lossy: bool


def encode(
    stored: CacheObject, object_format: ObjectFormat, codec: Codec, *, now_unix: float
) -> EncodedObject:
    """Return an object's bytes.

    Raises ``ObjectError`` for an object that is none, ``CodecError`` for a payload that the codec refuses.
    """
    kind = stored.key.kind
    num_tokens, odd = divmod(len(stored.tokens), TOKEN_BYTES)
    if odd or not _is_token_count(kind, num_tokens, object_format):
        raise ObjectError(FetchFailure.CORRUPT, f"{len(stored.tokens)} bytes of tokens for a {kind.value}")
    used = codec_of(codec, kind)
    encoded = used.encode(
        stored.payload,
        object_format,
        kind=kind,
        num_slots=num_tokens if kind is ObjectKind.PARTIAL else None,
    )
    encoded_bytes = memoryview(encoded.data).nbytes
    left = stored.expires_in_s
    header = _HEADER.pack(
        _MAGIC,
        OBJECT_VERSION,
        LAYOUT_VERSION,
        _KINDS.index(kind),
        _CODECS.index(used.name),
        _DTYPES.index(object_format.dtype),
        _ORDER_FLAG | (0 if left is None else _HAS_EXPIRY),
        *object_format.block_shape,
        object_format.vocab_size,
        stored.depth,
        num_tokens,
        0.0 if left is None else now_unix + left,
        0.0 if left is None else left,
        object_format.payload_bytes(kind),
        encoded_bytes,
        fingerprint_digest(object_format),
        stored.namespace,
        stored.parent,
        stored.key.digest,
    )
    data = memoryview(encoded.data).cast("B")
    checksum = _checksum(header, stored.tokens, data)
    buffers = (header, stored.tokens, data, checksum)
    num_bytes = HEADER_BYTES + len(stored.tokens) + encoded_bytes + CHECKSUM_BYTES
    return EncodedObject(buffers, num_bytes, encoded.divergence)


def decode(
    data: Buffer,
    expected: ObjectFormat,
    key: ObjectKey,
    namespace: PrefixDigest,
    *,
    now_unix: float | None = None,
    accept_lossy: bool = False,
) -> Decoded:
    """Return the object in ``data``, which must be the one that was asked for; else raise ``ObjectError``.

    A payload that went through no codec is a view of ``data``, which must not change any more. Without
    ``now_unix`` the lifetime is not judged and the object carries none: the caller knows it. A lossy object
    is a MISMATCH unless it is accepted.
    """
    view = memoryview(data).cast("B")
    header = read_header(view)
    _check_format(header, expected)
    if header.key != key or header.namespace != namespace:
        raise ObjectError(FetchFailure.MISMATCH, "an object of another prefix or namespace")
    if len(view) != header.object_bytes:
        raise ObjectError(FetchFailure.CORRUPT, "not as long as its header says")
    codec = _codec_for(header.codec)
    if codec.is_lossy and not accept_lossy:
        raise ObjectError(FetchFailure.MISMATCH, "written with a lossy codec, which is off")
    if header.encoded_bytes > codec.max_encoded_bytes(expected, header.kind):
        raise ObjectError(FetchFailure.CORRUPT, "longer than its codec makes it")
    end_tokens = HEADER_BYTES + TOKEN_BYTES * header.num_tokens
    end_payload = end_tokens + header.encoded_bytes
    if _checksum(view[:end_payload]) != view[end_payload:]:
        raise ObjectError(FetchFailure.CORRUPT, "wrong checksum")
    tokens = bytes(view[HEADER_BYTES:end_tokens])
    check_chain(header, tokens)
    left = None if now_unix is None else header.expires_in_s(now_unix)
    if left is not None and left <= 0:
        raise ObjectError(FetchFailure.EXPIRED, "its lifetime is over")
    try:
        payload = codec.decode(view[end_tokens:end_payload], expected, kind=header.kind)
    except CodecError as error:
        raise ObjectError(FetchFailure.CORRUPT, str(error)) from error
    found = CacheObject(
        key=key,
        namespace=namespace,
        parent=header.parent,
        depth=header.depth,
        tokens=tokens,
        payload=payload,
        expires_in_s=left,
    )
    return Decoded(found, header, codec.is_lossy)


def read_header(data: Buffer) -> ObjectHeader:
    """Return what stands in the first ``HEADER_BYTES``; raise ``ObjectError`` if that is no header.

    Only form is checked: whether it is true, and of use, is for ``decode`` to say.
    """
    view = memoryview(data).cast("B")
    if len(view) < HEADER_BYTES:
        raise ObjectError(FetchFailure.CORRUPT, "shorter than a header")
    (magic, version, layout, kind, codec, dtype, flags, *rest) = _HEADER.unpack_from(view)
    shape, (vocab_size, depth, num_tokens, expires_at, lifetime_s, raw, encoded, *digests) = (
        rest[:5],
        rest[5:],
    )
    if magic != _MAGIC:
        raise ObjectError(FetchFailure.CORRUPT, "not an object")
    if (version, layout) != (OBJECT_VERSION, LAYOUT_VERSION):
        raise ObjectError(FetchFailure.MISMATCH, f"version {version}.{layout}")
    if kind >= len(_KINDS) or codec >= len(_CODECS) or dtype >= len(_DTYPES):
        raise ObjectError(FetchFailure.CORRUPT, "unknown kind, codec or dtype")
    if flags & ~_HAS_EXPIRY != _ORDER_FLAG:
        raise ObjectError(FetchFailure.MISMATCH, "another byte order, or unknown flags")
    if not (math.isfinite(expires_at) and math.isfinite(lifetime_s)):
        raise ObjectError(FetchFailure.CORRUPT, "a lifetime that is no number")
    fingerprint, namespace, parent, digest = digests
    return ObjectHeader(
        kind=_KINDS[kind],
        codec=_CODECS[codec],
        dtype=_DTYPES[dtype],
        block_shape=tuple(shape),
        vocab_size=vocab_size,
        depth=depth,
        num_tokens=num_tokens,
        expires_at_unix=expires_at if flags & _HAS_EXPIRY else None,
        lifetime_s=lifetime_s,
        raw_bytes=raw,
        encoded_bytes=encoded,
        fingerprint=fingerprint,
        namespace=PrefixDigest(namespace),
        parent=PrefixDigest(parent),
        digest=PrefixDigest(digest),
    )


def check_chain(header: ObjectHeader, tokens: bytes) -> None:
    """Raise ``ObjectError`` unless the digest is the one of ``tokens`` after the parent."""
    if tokens:
        (digest,) = chain_digests(header.parent, [array("i", tokens)])
    else:
        digest = header.parent
    if digest != header.digest:
        raise ObjectError(FetchFailure.MISMATCH, "its digest is not that of its tokens")


def max_object_bytes(object_format: ObjectFormat, kind: ObjectKind | None = None) -> int:
    """Return a size that no object of this format (and kind) exceeds, with any codec."""
    kinds = _KINDS if kind is None else (kind,)
    largest = max(object_format.payload_bytes(kind) for kind in kinds)
    # int8 of a block with many heads of few elements is the only one that might be larger than zstd's bound.
    layers, two, _, heads, _ = object_format.block_shape
    slack = largest // 128 + 512 + 4 * layers * two * heads
    return HEADER_BYTES + TOKEN_BYTES * object_format.block_size + largest + slack + CHECKSUM_BYTES


def fingerprint_digest(object_format: ObjectFormat) -> bytes:
    """Return the format's fingerprint as 32 bytes."""
    return hashlib.blake2b(object_format.fingerprint.encode(), digest_size=_DIGEST_BYTES).digest()


def _check_format(header: ObjectHeader, expected: ObjectFormat) -> None:
    if header.fingerprint != fingerprint_digest(expected):
        raise ObjectError(FetchFailure.MISMATCH, "an object of another model")
    if (header.dtype, header.block_shape, header.vocab_size) != (
        expected.dtype,
        expected.block_shape,
        expected.vocab_size,
    ):
        raise ObjectError(FetchFailure.MISMATCH, "another dtype, block shape or vocabulary")
    if header.raw_bytes != expected.payload_bytes(header.kind):
        raise ObjectError(FetchFailure.CORRUPT, "a payload of another size than its format's")
    if not _is_token_count(header.kind, header.num_tokens, expected):
        raise ObjectError(FetchFailure.CORRUPT, f"{header.num_tokens} tokens in a {header.kind.value}")


def _is_token_count(kind: ObjectKind, num_tokens: int, object_format: ObjectFormat) -> bool:
    block_size = object_format.block_size
    if kind is ObjectKind.BLOCK:
        return num_tokens == block_size
    return (0 if kind is ObjectKind.LOGITS else 1) <= num_tokens <= block_size


def _codec_for(name: CodecName) -> Codec:
    """Return the codec that an object was written with, which need not be the one configured now."""
    try:
        if name not in _decoders:
            _decoders[name] = make_codec(name)
        return _decoders[name]
    except CodecError as error:
        raise ObjectError(FetchFailure.MISMATCH, str(error)) from error


_decoders: dict[CodecName, Codec] = {}
"""Codecs keep no state but per thread."""


def _checksum(*parts: Buffer) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.digest()[:CHECKSUM_BYTES]
