"""Operations that change what is cached, or for how long."""

from __future__ import annotations

from collections.abc import Generator

from kvcore.control import with_what_leads_only_there
from kvcore.errors import OverBudget
from kvcore.index import digest_of
from kvcore.keys import PrefixDigest, chain_digests
from kvcore.node import Node
from kvcore.pins import PinKind
from kvcore.selection import Selection
from server.engine.admin_messages import (
    AdminErrorKind,
    CacheEventKind,
    ClearCache,
    Evicted,
    EvictPrefixes,
    Pinned,
    PinPrefix,
    PrefixRef,
    ReleasePrefix,
    SetLifetime,
    Touched,
    UnpinPrefix,
)
from server.engine.cache_ops.interface import (
    MAX_NODES_PER_PIECE,
    Operation,
    OperationContext,
    OperationRefused,
)
from server.engine.cache_ops.naming import NamedPrefix, resolve
from server.engine.cache_ops.watch import CacheWatch

__all__ = ["clear_cache", "evict_prefixes", "pin_prefix", "release_prefix", "set_lifetime", "unpin_prefix"]


def pin_prefix(context: OperationContext, watch: CacheWatch, op: PinPrefix) -> Operation:
    """Pin what is cached of a prefix."""
    named = yield from resolve(context, op.prefix)
    cache, kind = context.cache, PinKind(op.pin.value)
    budget = cache.pool.num_blocks - context.largest_need() if kind is PinKind.HARD else None
    try:
        done = cache.control.pin(named.node, kind, lifetime_s=op.lifetime_s, budget=budget)
    except OverBudget as error:
        reason = (
            f"{error.needed} more blocks to pin, {error.pinned} of at most {error.budget} have {kind} pins"
        )
        raise OperationRefused(AdminErrorKind.OVER_BUDGET, reason) from error
    watch.note(CacheEventKind.PINNED, named.node, done.num_blocks, cause=kind.value)
    return Pinned(
        prefix_id=digest_of(named.node).hex(),
        num_tokens=named.num_tokens,
        num_blocks=done.num_blocks,
        newly_pinned_blocks=done.newly_pinned_blocks,
    )


def unpin_prefix(context: OperationContext, op: UnpinPrefix) -> Operation:
    """Take the pin away that ends where a prefix does."""
    named = yield from resolve(context, op.prefix)
    return Touched(digest_of(named.node).hex(), context.cache.control.unpin(named.node))


def set_lifetime(context: OperationContext, op: SetLifetime) -> Operation:
    """Change how long a prefix lives, on the device and in tiers."""
    named = yield from resolve(context, op.prefix)
    _refuse_beginning(named)
    if op.lifetime_s is not None and not op.lifetime_s >= 0:
        raise OperationRefused(AdminErrorKind.INVALID, "a lifetime is not negative", "lifetime")
    prefix_id = digest_of(named.node)
    changed = context.cache.control.set_lifetime(named.node, op.lifetime_s)
    context.tiers.renew(changed)
    return Touched(prefix_id.hex(), len(changed))


def release_prefix(context: OperationContext, op: ReleasePrefix) -> Operation:
    """Note that a prefix is not needed any more."""
    named = yield from resolve(context, op.prefix)
    _refuse_beginning(named)
    return Touched(digest_of(named.node).hex(), len(context.cache.control.release(named.node)))


def evict_prefixes(context: OperationContext, op: EvictPrefixes) -> Operation:
    """Evict what meets all conditions: found first, then taken, children before parents."""
    if op.subtree is None and not op.namespace and op.min_idle_s is None:
        raise OperationRefused(AdminErrorKind.INVALID, "at least one condition is needed", "subtree")
    control = context.cache.control
    space = context.space_of(op.namespace) if op.namespace else None
    below: list[Node] | None = None
    if op.subtree is not None:
        try:
            below = (yield from resolve(context, op.subtree, "subtree")).ends
            if not below:
                raise OperationRefused(AdminErrorKind.NOT_FOUND, "this prefix is not cached", "subtree")
            below = with_what_leads_only_there(below)
        except OperationRefused as refused:
            if refused.refusal.kind is not AdminErrorKind.NOT_FOUND or not op.tiers:
                raise
            removed = _evict_from_tiers_alone(context, op)
            if not removed:
                raise
            return Evicted(0, 0, removed)
    chosen = control.selection(below=below, space=space, min_idle_s=op.min_idle_s)
    yield from _complete(chosen, skip_in_use=op.skip_in_use)
    num_objects = 0
    if op.tiers and op.min_idle_s is None and below is None and space is not None:
        num_objects = context.tiers.remove(namespace=space.seed)
    elif op.tiers:
        is_whole = below is not None and op.min_idle_s is None and not chosen.num_kept
        doomed = [*(below or ()), *chosen.nodes] if is_whole else chosen.nodes
        num_objects = context.tiers.remove(digests=(yield from _digests(doomed)))
    num_taken = yield from _take(context, chosen.nodes)
    if space is not None and below is None and op.min_idle_s is None:
        control.forget_tails(space)
    return Evicted(num_taken, chosen.num_kept + len(chosen.nodes) - num_taken, num_objects)


def clear_cache(context: OperationContext, op: ClearCache) -> Operation:
    """Evict everything."""
    control = context.cache.control
    chosen = control.selection()
    yield from _complete(chosen, skip_in_use=op.skip_in_use)
    num_objects = context.tiers.remove() if op.tiers else 0
    num_taken = yield from _take(context, chosen.nodes)
    if op.tiers:  # what is held or pinned stays, on the device and below
        context.tiers.renew([node for node in context.cache.tree.iterate() if node.owner is None])
    control.forget_tails()
    return Evicted(num_taken, chosen.num_kept + len(chosen.nodes) - num_taken, num_objects)


def _refuse_beginning(named: NamedPrefix) -> None:
    """What only begins like a prefix may be everybody's."""
    if not named.is_whole:
        reason = "only the beginning of this prefix is cached"
        raise OperationRefused(AdminErrorKind.NOT_FOUND, reason, "prefix")


def _complete(chosen: Selection, *, skip_in_use: bool) -> Generator[None, None, None]:
    """Find what is to go. Raises ``OperationRefused`` if some of it is in use and is not to be skipped."""
    while not chosen.advance(MAX_NODES_PER_PIECE):
        yield None
    if skip_in_use:
        return
    num_in_use = chosen.num_in_use + sum(node.is_busy for node in chosen.nodes)  # taken up meanwhile
    if num_in_use:
        reason = f"{num_in_use} blocks are held by running requests or hard pins"
        raise OperationRefused(AdminErrorKind.IN_USE, reason)


def _digests(nodes: list[Node]) -> Generator[None, None, list[PrefixDigest]]:
    """Compute digests piece by piece; of what has gone meanwhile, none."""
    digests = []
    for number, node in enumerate(nodes, 1):
        if node.parent is not None:
            digests.append(digest_of(node))
        if not number % MAX_NODES_PER_PIECE:
            yield None
    return digests


def _take(context: OperationContext, nodes: list[Node]) -> Generator[None, None, int]:
    """Take nodes out piece by piece; what a request has taken up meanwhile stays."""
    num_taken = 0
    for start in range(0, len(nodes), MAX_NODES_PER_PIECE):
        if start:
            yield None
        num_taken += context.cache.control.take_out(nodes[start : start + MAX_NODES_PER_PIECE])
    return num_taken


def _evict_from_tiers_alone(context: OperationContext, op: EvictPrefixes) -> int:
    """Remove a prefix that is not on the device, and all that continues it, from tiers."""
    ref = op.subtree
    if ref is None or op.min_idle_s is not None:
        return 0
    digest = _digest_named(context, ref)
    return context.tiers.remove(digests=[digest]) if digest is not None else 0


def _digest_named(context: OperationContext, ref: PrefixRef) -> PrefixDigest | None:
    """Return the digest of a whole id, or of the whole blocks of tokens; None for less."""
    if ref.prefix_id:
        return PrefixDigest(bytes.fromhex(ref.prefix_id)) if len(ref.prefix_id) == 64 else None
    size, tokens = context.cache.block_size, ref.token_ids
    if not tokens or len(tokens) % size:
        return None
    blocks = (tokens[start : start + size] for start in range(0, len(tokens), size))
    return list(chain_digests(context.namespace(ref.salt).seed(), blocks))[-1]
