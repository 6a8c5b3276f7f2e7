"""What every tier is: a place for cache objects that may be slow, full or gone, and never says so by raising.

One object in a tier, from eviction to return::

    engine's thread                                   the tier's own threads
      prepare(key, bytes) -> ticket or None             (budget reserved; not visible)
      complete(ticket, object) ----------------------->  encode, write, make visible
      lookup(key) -> YES / NO / COMING                  (from memory; never waits)
      fetch(key, deadline) --------------------------->  read, check, decode
      poll() -> [Fetched(key, object or failure)] <----

The engine's thread calls every method, none of them blocks, and none raises for anything that a disk or a
network may do: a fault is a ``Fetched`` without an object, or a store that never becomes visible, with a
counter beside it. ``on_ready`` (given at construction) is called from a tier's thread when ``poll`` has news.

An object is named by a digest over everything that must be equal for its content to be interchangeable
(``kvcore.keys``), and carries enough to be checked against that on the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NewType, Protocol

from kvcore.keys import PrefixDigest

__all__ = [
    "CacheObject",
    "FetchFailure",
    "Fetched",
    "MeasuredDivergence",
    "ObjectFormat",
    "ObjectKey",
    "ObjectKind",
    "Presence",
    "StoreTicket",
    "Tier",
    "TierStats",
]

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ObjectKind(StrEnum):
    """What an object holds."""

    BLOCK = "block"
    """KV of one full block."""
    PARTIAL = "partial"
    """KV of the leading slots of a block: the end of an exact prompt. The payload is a whole block."""
    LOGITS = "logits"
    """The float32 last logits of an exact prompt."""


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """Name of an object: the digest of the whole prefix up to and including it, and what of it this is."""

    digest: PrefixDigest
    kind: ObjectKind

    def __repr__(self) -> str:
        return f"{self.kind.value}:{self.digest.hex()[:12]}"


@dataclass(frozen=True, slots=True)
class ObjectFormat:
    """What all objects of one model have in common. An object of another format is of no use."""

    fingerprint: str
    dtype: str
    """Of KV elements: float32, bfloat16 or float16."""
    block_shape: tuple[int, int, int, int, int]
    """(layers, 2, slots, KV heads, head dimension); row-major and contiguous."""
    vocab_size: int

    @property
    def block_size(self) -> int:
        return self.block_shape[2]

    @property
    def bytes_per_block(self) -> int:
        layers, two, slots, heads, dim = self.block_shape
        return layers * two * slots * heads * dim * _ELEMENT_BYTES[self.dtype]

    @property
    def bytes_per_logits(self) -> int:
        return 4 * self.vocab_size

    def payload_bytes(self, kind: ObjectKind) -> int:
        """Return the size of an object's payload before any codec."""
        return self.bytes_per_logits if kind is ObjectKind.LOGITS else self.bytes_per_block


@dataclass(frozen=True, slots=True, eq=False)
class CacheObject:
    """One object, as the engine gives it to a tier and gets it back."""

    key: ObjectKey
    namespace: PrefixDigest
    """The namespace's seed."""
    parent: PrefixDigest
    """Digest of the prefix before this object's tokens; the namespace's seed for the first block."""
    depth: int
    """Number of the block in its prefix, from 1. A tier that makes room drops deeper ones first."""
    tokens: bytes
    """Packed ids (``kvcore.keys.pack_tokens``) of the positions that a block holds; for logits, those of the
    prompt after its last full block (may be empty: then ``key.digest == parent``)."""
    payload: bytes | bytearray | memoryview
    """Exactly ``ObjectFormat.payload_bytes(key.kind)``, contiguous."""
    expires_in_s: float | None = None
    """What is left of its lifetime when the object is handed over."""

    def __repr__(self) -> str:
        return f"CacheObject({self.key!r} depth={self.depth} {len(self.tokens) // 4} tokens)"


class Presence(Enum):
    """Answer to "is it there?", given at once."""

    NO = "no"
    COMING = "coming"
    """Being stored, or a remote tier has been asked and has not answered: ask again."""
    YES = "yes"


class FetchFailure(StrEnum):
    """Why a fetch gave nothing: each is a recompute and a counter."""

    MISSING = "missing"
    TIMEOUT = "timeout"
    CORRUPT = "corrupt"
    """Wrong checksum, truncated, not an object at all."""
    MISMATCH = "mismatch"
    """A sound object of another model, namespace, layout version or prefix."""
    UNREACHABLE = "unreachable"
    """The tier failed: input/output error, connection refused, no descriptor left."""
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """Outcome of one fetch; each ``fetch`` that returned True yields exactly one."""

    key: ObjectKey
    tier: str
    found: CacheObject | None
    failure: FetchFailure | None
    seconds: float
    """From ``fetch`` to here."""
    num_bytes: int = 0
    """Moved from the tier, encoded."""
    is_lossy: bool = False
    """Went through a codec that does not give back the same bits."""


StoreTicket = NewType("StoreTicket", int)


@dataclass(slots=True)
class TierStats:
    """What a tier counts and holds. Counters run from its start."""

    num_objects: int = 0
    num_bytes: int = 0
    max_bytes: int | None = None
    is_available: bool = True
    """False while it backs off after faults."""
    stored: int = 0
    store_failures: int = 0
    refused_stores: int = 0
    """No room, or backing off."""
    hits: int = 0
    misses: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    stored_bytes: int = 0
    evicted: int = 0
    expired: int = 0
    quarantined: int = 0
    failures: dict[FetchFailure, int] = field(default_factory=dict)
    latency_s: float = 0.0
    """Measured time of a fetch that does not depend on its size, kept current."""
    read_bytes_per_s: float = 0.0
    """Measured, of encoded bytes, decoding included; 0 until known."""
    write_bytes_per_s: float = 0.0
    last_fault: str | None = None
    """Latest fault in an operator's words: no path, no address, no credentials."""


class MeasuredDivergence(Protocol):
    """How far what a lossy codec gives back is from what it was given; see ``kvcore.codec.Divergence``."""

    @property
    def cosine_distance(self) -> float: ...

    @property
    def relative_l2(self) -> float: ...


class Tier(Protocol):
    """See the module's text. Constructors open what they need; a tier that cannot open starts unavailable."""

    @property
    def name(self) -> str:
        """Return ``host``, ``disk`` or ``redis``: a word for metrics and timings."""
        ...

    @property
    def is_persistent(self) -> bool:
        """Say whether objects survive this process."""
        ...

    @property
    def is_lossy(self) -> bool:
        """Say whether blocks may come back with other bits than they went down with, and count as such."""
        ...

    def lookup(self, key: ObjectKey) -> Presence:
        """Say whether an object is there, from memory."""
        ...

    def prepare(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        """Reserve room for an object. None: it is there or on its way already, or cannot be taken now."""
        ...

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        """Hand over the content of a reserved object. ``stored.payload`` must not change any more."""
        ...

    def abandon(self, ticket: StoreTicket) -> None:
        """Give a reservation back."""
        ...

    def fetch(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        """Start to bring an object. False: not to be had (gone, backing off); nothing will be polled."""
        ...

    def cancel(self, keys: Iterable[ObjectKey]) -> None:
        """Nobody waits for these fetches any more. They still end in a ``Fetched``, maybe CANCELLED."""
        ...

    def poll(self) -> list[Fetched]:
        """Return what has arrived or failed since the last call. A fetch past its timeout has failed."""
        ...

    def remove(self, keys: Iterable[ObjectKey]) -> None:
        """Forget objects; best effort where the tier is shared."""
        ...

    def remove_prefixes(self, digests: Iterable[PrefixDigest]) -> int:
        """Forget these prefixes and, as far as it is known, what continues them; return how many objects."""
        ...

    def take_divergences(self) -> Sequence[tuple[ObjectKey, MeasuredDivergence]]:
        """Return what a lossy codec did to the objects stored since the last call; bounded."""
        ...

    def clear(self, namespace: PrefixDigest | None = None) -> int:
        """Forget the objects of one namespace, or all that this server may remove; return how many."""
        ...

    def keys(self) -> Iterable[ObjectKey]:
        """Iterate over what is known to be there (not what other servers put into a shared tier)."""
        ...

    def stats(self) -> TierStats:
        """Return a snapshot."""
        ...

    def close(self) -> None:
        """Finish stores that were handed over, within a second or two, and end the threads."""
        ...
