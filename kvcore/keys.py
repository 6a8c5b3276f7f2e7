"""Who may share with whom, and names for prefixes that outlive a process.

Within a process a prefix is known by its exact tokens (``kvcore.tree``). Digests name it elsewhere: in
tiers, snapshots and lists. A digest chains over the blocks, so it names the whole prefix up to and
including its block, and it starts from everything that must be equal for KV to be interchangeable.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NewType

__all__ = ["NamespaceKey", "PrefixDigest", "chain_digests", "pack_tokens"]

PrefixDigest = NewType("PrefixDigest", bytes)
"""32 bytes naming a prefix: stable across processes, restarts and machines."""

TOKEN_BYTES = array("i").itemsize

LAYOUT_VERSION = 1
"""Raised whenever the bytes of a block mean something else than before."""


@dataclass(frozen=True, slots=True)
class NamespaceKey:
    """What two requests must have in common to share KV. Different keys never see each other's entries."""

    fingerprint: str
    """Of the model: weights, configuration, dtype."""
    adapter: str = ""
    salt: str = ""
    """Of the tenant, derived from the authenticated key; never taken from a request."""

    def seed(self) -> PrefixDigest:
        """Return the digest that a chain of this namespace starts from."""
        state = hashlib.blake2b(digest_size=32, person=b"kvserve-prefix")
        for part in (str(LAYOUT_VERSION), self.fingerprint, self.adapter, self.salt):
            encoded = part.encode()
            state.update(len(encoded).to_bytes(8, "little"))
            state.update(encoded)
        return PrefixDigest(state.digest())


def pack_tokens(tokens: Sequence[int]) -> array[int]:
    """Return token ids as the array that the cache works on: slices of its bytes are the tree's keys."""
    packed = array("i")
    packed.frombytes(struct.pack(f"{len(tokens)}i", *tokens))  # twice as fast as array("i", tokens)
    return packed


def chain_digests(seed: PrefixDigest, blocks: Iterable[Sequence[int]]) -> Iterator[PrefixDigest]:
    """Yield the digest of each prefix that ends with one of ``blocks``, in order, lazily.

    A digest is BLAKE2b-256 over the previous digest and the block's token ids as little-endian int64.
    """
    previous = bytes(seed)
    for tokens in blocks:
        packed = array("q", tokens)
        if packed.itemsize != 8:  # pragma: no cover - no such platform is supported
            raise RuntimeError("array('q') is not 64 bits wide")
        previous = hashlib.blake2b(previous + packed.tobytes(), digest_size=32).digest()
        yield PrefixDigest(previous)
