"""Operations that only look: statistics, one prefix, the policies. They touch no recency."""

from __future__ import annotations

from collections import Counter

from kvcore.index import digest_of
from kvcore.keys import pack_tokens
from kvcore.node import Node
from kvcore.pins import PinBook, PinKind
from kvcore.policies import POLICIES
from kvcore.spaces import Space, Totals
from server.engine.admin_messages import (
    AdminErrorKind,
    CacheReport,
    CacheTotals,
    CanaryReport,
    LookUpPrefix,
    NamespaceReport,
    PinReport,
    PolicyReport,
    PrefixFound,
    ReadStats,
)
from server.engine.cache_ops.catalogues import FRESH_S, Catalogues
from server.engine.cache_ops.interface import Operation, OperationContext, OperationRefused
from server.engine.cache_ops.naming import resolve

__all__ = ["look_up_prefix", "read_stats", "report_policies"]


def read_stats(
    context: OperationContext, catalogues: Catalogues, op: ReadStats, uptime_s: float
) -> Operation:
    """Report everything, of one namespace or of all."""
    only = context.space_of(op.namespace) if op.namespace else None
    catalogue = yield from catalogues.complete(max_age_s=FRESH_S)
    entries = Counter(run.end.space for run in catalogue.accepted)
    cache = context.cache
    spaces = (
        [only]
        if only is not None
        else sorted(cache.tree.spaces.all, key=lambda s: (-s.num_blocks, -s.totals.requests))
    )
    if only is not None:
        totals = _totals(only.totals, entries[only], only.num_blocks, only.num_pinned_blocks)
    else:
        num_pinned = sum(s.num_pinned_blocks for s in cache.tree.spaces.all)
        totals = _totals(cache.tree.spaces.totals(), entries.total(), cache.tree.num_nodes, num_pinned)
    num_cached = cache.tree.num_evictable
    return CacheReport(
        totals=totals,
        namespaces=[_namespace(context, s, entries[s]) for s in spaces[: op.max_namespaces]],
        tiers=context.tiers.reports(),
        pins=_pins(cache.pins),
        prefetch=context.tiers.prefetch(),
        num_blocks=cache.pool.num_blocks,
        num_blocks_in_use=cache.pool.num_blocks - cache.pool.num_free - num_cached,
        num_blocks_cached=num_cached,
        num_blocks_free=cache.pool.num_free,
        uptime_s=uptime_s,
        policy=cache.control.policy.name,
    )


def look_up_prefix(context: OperationContext, op: LookUpPrefix) -> Operation:
    """Say how much of a prefix is cached, and where."""
    ref, cache = op.prefix, context.cache
    if ref.prefix_id:
        named = yield from resolve(context, ref)
        space, tokens = named.node.space.key, pack_tokens(_tokens_to(named.node))
    elif not ref.token_ids:
        raise OperationRefused(AdminErrorKind.INVALID, "a prefix needs an id, or tokens", "prefix")
    else:
        space, tokens = context.namespace(ref.salt), pack_tokens(ref.token_ids)
    match = cache.lookup(space, tokens)
    num_blocks = match.block_tokens // cache.block_size
    # The name that a pin would give it.
    end = cache.control.locate(space, tokens).node
    return PrefixFound(
        prompt_tokens=len(tokens),
        cached_block_tokens=match.block_tokens,
        cached_partial_tokens=match.partial_tokens,
        is_exact=match.is_exact,
        tiers=context.tiers.lookup_beyond(space, tokens, num_blocks),
        prefix_id="" if end is None else digest_of(end).hex(),
    )


def report_policies(context: OperationContext) -> PolicyReport:
    """Report the live policy, those there are, those on trial, and the canary."""
    control = context.cache.control
    canary = control.canary
    report = None
    if canary is not None:
        report = CanaryReport(
            policy=canary.queue.policy.name,
            share=canary.share,
            namespaces=sum(canary.has(s) for s in context.cache.tree.spaces.all),
            token_hit_rate=canary.counts.token_hit_rate,
            live_token_hit_rate=canary.live_counts.token_hit_rate,
        )
    return PolicyReport(
        policy=control.policy.name,
        available=dict(POLICIES),
        trial=[] if context.trial is None else context.trial.reports(),
        canary=report,
    )


def _namespace(context: OperationContext, space: Space, num_entries: int) -> NamespaceReport:
    return NamespaceReport(
        namespace=space.id,
        salt=space.key.salt,
        totals=_totals(space.totals, num_entries, space.num_blocks, space.num_pinned_blocks),
        policy=context.cache.control.policy_of(space).name,
        quota_blocks=context.cache.quotas.limit_of(space.key) or 0,
    )


def _totals(counted: Totals, num_entries: int, num_blocks: int, num_pinned: int) -> CacheTotals:
    return CacheTotals(
        entries=num_entries,
        blocks=num_blocks,
        requests=counted.requests,
        hits=counted.hits,
        prompt_tokens=counted.prompt_tokens,
        cached_block_tokens=counted.cached_block_tokens,
        cached_partial_tokens=counted.cached_partial_tokens,
        cached_tail_tokens=counted.cached_tail_tokens,
        restored_tokens=counted.restored_tokens,
        inserted_blocks=counted.inserted_blocks,
        evicted_blocks=dict(counted.evicted_blocks),
        expired_blocks=counted.expired_blocks,
        pinned_blocks=num_pinned,
        restored_blocks=counted.restored_blocks,
        time_saved_s=counted.time_saved_s,
    )


def _pins(pins: PinBook) -> PinReport:
    return PinReport(
        soft_pins=pins.num_pins(PinKind.SOFT),
        hard_pins=pins.num_pins(PinKind.HARD),
        soft_blocks=pins.num_blocks(PinKind.SOFT),
        hard_blocks=pins.num_blocks(PinKind.HARD),
        soft_budget_blocks=pins.budgets[PinKind.SOFT],
        hard_budget_blocks=pins.budgets[PinKind.HARD],
    )


def _tokens_to(node: Node) -> list[int]:
    """Return the tokens of the whole prefix that ends with a node."""
    blocks = []
    while not node.is_root:
        blocks.append(node.tokens)
        node = node.real_parent()
    return [token for block in reversed(blocks) for token in block]
