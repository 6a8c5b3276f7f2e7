"""What an object of the tree is called in a tier, and where its bytes lie in the worker."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.index import digest_of
from kvcore.keys import PrefixDigest, chain_digests
from kvcore.node import Node
from kvcore.tails import Tail
from kvcore.tiers.interface import CacheObject, ObjectKey, ObjectKind
from server.engine.plan import KvSave, KvTarget

__all__ = ["Wanted", "block_object", "logits_object", "partial_object", "tail_digest"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A cache object without its bytes yet."""

    save: KvSave
    key: ObjectKey
    namespace: PrefixDigest
    parent: PrefixDigest
    depth: int
    tokens: bytes
    expires_at: float | None
    is_exact: bool
    """No lossy codec had a hand in it."""

    def with_payload(self, payload: bytes, now: float) -> CacheObject:
        """Return the object."""
        return CacheObject(
            key=self.key,
            namespace=self.namespace,
            parent=self.parent,
            depth=self.depth,
            tokens=self.tokens,
            payload=payload,
            expires_in_s=None if self.expires_at is None else max(0.0, self.expires_at - now),
        )


def block_object(node: Node) -> Wanted:
    """Name the full block of a node."""
    return Wanted(
        save=KvSave(KvTarget.BLOCK, node.real_block()),
        key=ObjectKey(digest_of(node), ObjectKind.BLOCK),
        namespace=node.space.seed,
        parent=digest_of(node.real_parent()),
        depth=node.depth,
        tokens=node.packed,
        expires_at=node.expires_at,
        is_exact=not node.is_lossy,
    )


def partial_object(tail: Tail, node: Node) -> Wanted | None:
    """Name the end of a prompt in a block whose leading slots hold it. None: ``node`` does not hold it."""
    rest = tail.key
    if not isinstance(rest, bytes) or not rest or not node.packed.startswith(rest):
        return None
    expires_at = _earlier(tail.expires_at, node.expires_at)
    save = KvSave(KvTarget.BLOCK, node.real_block())
    return _of_tail(tail, rest, ObjectKind.PARTIAL, save, expires_at, is_exact=not node.is_lossy)


def logits_object(tail: Tail) -> Wanted | None:
    """Name the last logits of a prompt. None: they are private, or not there yet."""
    rest = tail.key
    if not isinstance(rest, bytes) or not tail.is_ready:
        return None
    save = KvSave(KvTarget.LOGITS, tail.slot)
    return _of_tail(tail, rest, ObjectKind.LOGITS, save, tail.expires_at, is_exact=not tail.is_lossy)


def tail_digest(parent: PrefixDigest, rest: bytes) -> PrefixDigest:
    """Return the digest of a prompt that ends with ``rest`` (packed, maybe empty) after full blocks."""
    return next(chain_digests(parent, [memoryview(rest).cast("i")])) if rest else parent


def _earlier(one: float | None, other: float | None) -> float | None:
    """Return the earlier of two ends of a life; None is no end."""
    return min((end for end in (one, other) if end is not None), default=None)


def _of_tail(
    tail: Tail, rest: bytes, kind: ObjectKind, save: KvSave, expires_at: float | None, *, is_exact: bool
) -> Wanted:
    parent = digest_of(tail.node)
    return Wanted(
        save=save,
        key=ObjectKey(tail_digest(parent, rest), kind),
        namespace=tail.node.space.seed,
        parent=parent,
        depth=tail.node.depth + 1,
        tokens=rest,
        expires_at=expires_at,
        is_exact=is_exact,
    )
