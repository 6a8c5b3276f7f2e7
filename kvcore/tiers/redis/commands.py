"""What a tier says to Redis about objects, and how far it believes the answers.

Keys are ``kvserve:<object version>.<layout version>:<digest of the format>:<kind>:<digest>``: objects of two
models, dtypes or versions never meet. Values are objects as ``kvcore.tiers.objects`` writes them. No value is
read without a bound, whatever anybody has put there: GETRANGE asks for one byte more than an object may have,
which is enough to see that it is too long.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcore.codec import Codec
from kvcore.keys import LAYOUT_VERSION, PrefixDigest
from kvcore.tiers.interface import CacheObject, FetchFailure, ObjectFormat, ObjectKey
from kvcore.tiers.objects import (
    OBJECT_VERSION,
    Decoded,
    EncodedObject,
    ObjectError,
    decode,
    encode,
    max_object_bytes,
)
from kvcore.tiers.redis.link import Command, Refusal

__all__ = ["Outgoing", "RedisCommands", "Speed"]

Call = Callable[[Sequence[Command]], Sequence[object]]

_PROBE_BYTES = 1 << 18
_PROBE_TTL_MS = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """One object ready to be sent."""

    key: ObjectKey
    encoded: EncodedObject
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes a second of one large value; ``Refusal`` instead if Redis takes none."""

    write_bytes_per_s: float
    read_bytes_per_s: float


class RedisCommands:
    """Builds batches and judges replies. Keeps no state; ``call`` runs a batch on the caller's connection."""

    def __init__(self, object_format: ObjectFormat, codec: Codec) -> None:
        self._format = object_format
        self._codec = codec
        self._prefix = _key_prefix(object_format)

    def ping(self, call: Call) -> float:
        """Return the time of the fastest of three round trips."""
        return min(self._time(call, (b"PING",)) for _ in range(3))

    def lengths(self, call: Call, keys: Sequence[ObjectKey]) -> list[bool | None]:
        """Tell of each key whether an object may lie there; None: something that cannot be one."""
        replies = call([(b"STRLEN", self._name(key)) for key in keys])
        fits: list[bool | None] = []
        for key, reply in zip(keys, replies, strict=True):
            if isinstance(reply, int):
                fits.append(reply > 0 if reply <= max_object_bytes(self._format, key.kind) else None)
            else:
                fits.append(None if isinstance(reply, Refusal) and reply.is_about_the_value else False)
        return fits

    def read(self, call: Call, keys: Sequence[ObjectKey]) -> Sequence[object]:
        """Return the values' beginnings, for ``judge``."""
        return call(
            [(b"GETRANGE", self._name(key), 0, max_object_bytes(self._format, key.kind)) for key in keys]
        )

    def judge(self, value: object, key: ObjectKey, namespace: PrefixDigest) -> Decoded | FetchFailure:
        """Return the object in a value, or what is wrong with it."""
        if isinstance(value, Refusal):
            return FetchFailure.CORRUPT if value.is_about_the_value else FetchFailure.UNREACHABLE
        if not isinstance(value, bytes) or len(value) > max_object_bytes(self._format, key.kind):
            return FetchFailure.CORRUPT
        if not value:
            return FetchFailure.MISSING
        try:
            return decode(
                value,
                self._format,
                key,
                namespace,
                now_unix=time.time(),
                accept_lossy=self._codec.is_lossy,
            )
        except ObjectError as error:
            return error.failure

    def encode(self, stored: CacheObject, ttl_s: float) -> Outgoing:
        """Raise ``ObjectError`` or ``CodecError`` for what cannot be written."""
        encoded = encode(stored, self._format, self._codec, now_unix=time.time())
        return Outgoing(stored.key, encoded, ttl_s)

    def write(self, call: Call, objects: Sequence[Outgoing]) -> list[Refusal | None]:
        """Write objects; return of each why Redis refused it."""
        replies = call(
            [
                (b"SET", self._name(item.key), item.encoded.buffers, b"PX", max(1, int(1000 * item.ttl_s)))
                for item in objects
            ]
        )
        return [reply if isinstance(reply, Refusal) else None for reply in replies]

    def unlink(self, call: Call, keys: Sequence[ObjectKey]) -> Refusal | None:
        """Remove keys, whatever lies there."""
        (reply,) = call([(b"UNLINK", *[self._name(key) for key in keys])])
        return reply if isinstance(reply, Refusal) else None

    def try_writing(self, call: Call) -> Refusal | None:
        """Write a byte that vanishes by itself; return why Redis refused it."""
        (reply,) = call([(b"SET", self._probe_name(), b"1", b"PX", _PROBE_TTL_MS)])
        return reply if isinstance(reply, Refusal) else None

    def measure(self, call: Call, latency_s: float) -> Speed | Refusal:
        """Write and read back a large value, which vanishes by itself should this be interrupted."""
        name = self._probe_name()
        started = time.perf_counter()
        (reply,) = call([(b"SET", name, os.urandom(_PROBE_BYTES), b"PX", _PROBE_TTL_MS)])
        write_s = time.perf_counter() - started
        if isinstance(reply, Refusal):
            return reply
        read_s = min(self._time(call, (b"GETRANGE", name, 0, _PROBE_BYTES)) for _ in range(2))
        call([(b"UNLINK", name)])
        return Speed(
            write_bytes_per_s=_PROBE_BYTES / max(write_s - latency_s, 1e-6),
            read_bytes_per_s=_PROBE_BYTES / max(read_s - latency_s, 1e-6),
        )

    @staticmethod
    def _time(call: Call, command: Command) -> float:
        started = time.perf_counter()
        call([command])
        return time.perf_counter() - started

    def _name(self, key: ObjectKey) -> str:
        return f"{self._prefix}:{key.kind.value}:{key.digest.hex()}"

    def _probe_name(self) -> str:
        return f"{self._prefix}:probe:{os.urandom(8).hex()}"


def _key_prefix(object_format: ObjectFormat) -> str:
    state = hashlib.blake2b(digest_size=8)
    shape = "x".join(str(size) for size in object_format.block_shape)
    for part in (object_format.fingerprint, object_format.dtype, shape, str(object_format.vocab_size)):
        state.update(f"{len(part)}:{part}".encode())
    return f"kvserve:{OBJECT_VERSION}.{LAYOUT_VERSION}:{state.hexdigest()}"
