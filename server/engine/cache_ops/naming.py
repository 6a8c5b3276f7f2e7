"""From what people call a prefix to its place in the tree."""

from __future__ import annotations

import string
from collections.abc import Generator
from dataclasses import dataclass

from kvcore.index import MIN_DIGITS, PrefixSearch, digest_of
from kvcore.keys import TOKEN_BYTES, pack_tokens
from kvcore.node import Node, NodeState
from server.engine.admin_messages import AdminErrorKind, PrefixRef
from server.engine.cache_ops.interface import MAX_NODES_PER_PIECE, OperationContext, OperationRefused

__all__ = ["NamedPrefix", "resolve"]

MAX_DIGITS = 64
_HEXADECIMAL = frozenset(string.hexdigits)


@dataclass(frozen=True, slots=True)
class NamedPrefix:
    """A prefix that is on the device, at least its beginning."""

    node: Node
    num_tokens: int
    """How many of its tokens are cached."""
    ends: list[Node]
    """Blocks with its last token; empty if only its beginning is cached."""
    is_whole: bool
    """All of its whole blocks are there."""


def resolve(
    context: OperationContext, ref: PrefixRef, field: str = "prefix"
) -> Generator[None, None, NamedPrefix]:
    """Find a prefix on the device. Raises ``OperationRefused``: NOT_FOUND, AMBIGUOUS or INVALID."""
    if ref.prefix_id:
        return (yield from _by_id(context, ref.prefix_id, f"{field}.prefix_id"))
    if not ref.token_ids:
        raise OperationRefused(AdminErrorKind.INVALID, "a prefix needs an id, or tokens", field)
    cache = context.cache
    found = cache.control.locate(context.namespace(ref.salt), pack_tokens(ref.token_ids))
    if found.node is None:
        raise OperationRefused(AdminErrorKind.NOT_FOUND, "nothing of this prefix is cached", field)
    num_whole = len(ref.token_ids) // cache.block_size
    return NamedPrefix(found.node, found.num_tokens, found.ends, found.node.depth >= num_whole)


def _by_id(context: OperationContext, prefix_id: str, field: str) -> Generator[None, None, NamedPrefix]:
    if not MIN_DIGITS <= len(prefix_id) <= MAX_DIGITS or not _HEXADECIMAL.issuperset(prefix_id):
        reason = f"a prefix id has {MIN_DIGITS} to {MAX_DIGITS} hexadecimal digits"
        raise OperationRefused(AdminErrorKind.INVALID, reason, field)
    cache = context.cache
    search = PrefixSearch(cache.tree, prefix_id)
    while not search.advance(MAX_NODES_PER_PIECE, context.clock.now()):
        yield None
    found = {digest_of(n): n for n in search.found if cache.control.is_findable(n)}
    if not found:
        raise OperationRefused(AdminErrorKind.NOT_FOUND, "no cached prefix has this id", field)
    if len(found) > 1:
        reason = f"{len(found)} cached prefixes have an id that begins so"
        raise OperationRefused(AdminErrorKind.AMBIGUOUS, reason, field)
    (node,) = found.values()
    return NamedPrefix(node, num_tokens_of(node, cache.block_size), [node], is_whole=True)


def num_tokens_of(node: Node, block_size: int) -> int:
    """Return the length of the prefix that ends with a node."""
    if node.state is not NodeState.OPEN:
        return node.depth * block_size
    return (node.depth - 1) * block_size + len(node.packed) // TOKEN_BYTES
