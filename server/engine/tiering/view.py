"""What an operator sees of the tiers, and does to them: the ``TierView`` of the cache's operations."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from kvcore.index import digest_of
from kvcore.keys import NamespaceKey, PrefixDigest
from kvcore.node import Node, NodeState
from kvcore.tiers.interface import ObjectFormat, ObjectKey, ObjectKind, Presence, Tier, TierStats
from server.engine.admin_messages import PrefetchReport, TierReport
from server.engine.cache_ops.interface import SnapshotWork
from server.engine.options import TierOptions
from server.engine.tiering.restoration import LookupBudget, Restoration
from server.engine.tiering.snapshots import Snapshots
from server.engine.tiering.tiering import Tiering

__all__ = ["EngineTierView"]

UNKNOWN_CROSSOVER = -2


class EngineTierView:
    """Implements ``TierView`` over an engine's tiers."""

    def __init__(
        self, tiering: Tiering, snapshots: Snapshots, *, options: TierOptions, object_format: ObjectFormat
    ) -> None:
        self._tiering = tiering
        self._snapshots = snapshots
        self._format = object_format
        self._codecs = {"host": options.host_codec, "disk": options.disk_codec, "redis": options.redis_codec}

    def blocks_of(self, digests: Sequence[PrefixDigest]) -> dict[str, int]:
        found: dict[str, int] = {}
        for tier in self._tiering.blocks.tiers:
            count = sum(
                tier.lookup(ObjectKey(digest, ObjectKind.BLOCK)) is Presence.YES for digest in digests
            )
            if count:
                found[tier.name] = count
        return found

    def lookup_beyond(self, namespace: NamespaceKey, tokens: array[int], from_block: int) -> dict[str, int]:
        size = self._format.block_size
        restoration = Restoration(namespace, tokens, size)
        restoration.look_from(self._tiering.cache.tree, from_block)
        restoration.ask(self._tiering.blocks, self._tiering.tails, LookupBudget(len(tokens)))
        return {name: restoration.tiers.count(name) for name in dict.fromkeys(restoration.tiers)}

    def remove(
        self, *, digests: Sequence[PrefixDigest] | None = None, namespace: PrefixDigest | None = None
    ) -> int:
        stacks = (self._tiering.blocks, self._tiering.tails)
        self._tiering.removed(namespace=namespace, digests=digests)
        if digests is None:
            return sum(sum(stack.clear(namespace).values()) for stack in stacks)
        return sum(stack.remove_prefixes(digests) for stack in stacks)

    def renew(self, nodes: Sequence[Node]) -> None:
        """A copy is written once, with its lifetime: the old ones go, and new ones are written behind."""
        digests = [digest_of(node) for node in nodes]
        self._tiering.removed(digests=digests)
        for stack in (self._tiering.blocks, self._tiering.tails):
            stack.remove([ObjectKey(digest, kind) for digest in digests for kind in ObjectKind])
        self._tiering.offloader.stored([node for node in nodes if node.state is NodeState.READY])
        for node in nodes:
            for tail in (node.tails or {}).values():
                self._tiering.offloader.tail_stored(tail)

    def reports(self) -> list[TierReport]:
        tails = {tier.name: tier for tier in self._tiering.tails.tiers}
        return [self._report(tier, tails[tier.name]) for tier in self._tiering.blocks.tiers]

    def prefetch(self) -> PrefetchReport:
        waiting = self._tiering.restorations.counters
        sessions = self._tiering.for_sessions.counters
        return PrefetchReport(
            waiting_fetched=waiting.fetched_blocks,
            waiting_used=waiting.used_blocks,
            waiting_late=waiting.late_blocks,
            waiting_wasted=waiting.wasted_blocks,
            sessions_fetched=sessions.fetched_blocks,
            sessions_used=sessions.used_blocks,
            sessions_late=sessions.late_blocks,
            sessions_wasted=sessions.wasted_blocks,
            restore_s=waiting.restore_s,
            hidden_s=waiting.hidden_s,
        )

    def save(self, name: str, *, namespace: PrefixDigest | None, replace: bool) -> SnapshotWork:
        return self._snapshots.save(name, namespace=namespace, replace=replace)

    def restore(self, name: str) -> SnapshotWork:
        return self._snapshots.restore(name)

    def _report(self, blocks: Tier, tails: Tier) -> TierReport:
        """Add up the two halves of a tier; speeds are those of blocks."""
        stats, rest = blocks.stats(), tails.stats()
        failures = dict(stats.failures)
        for kind, count in rest.failures.items():
            failures[kind] = failures.get(kind, 0) + count
        limits = (stats.max_bytes, rest.max_bytes)
        return TierReport(
            tier=blocks.name,
            codec=self._codecs[blocks.name],
            is_available=stats.is_available,
            num_objects=stats.num_objects + rest.num_objects,
            num_bytes=stats.num_bytes + rest.num_bytes,
            max_bytes=None if None in limits else sum(limit or 0 for limit in limits),
            stored=stats.stored + rest.stored,
            store_failures=stats.store_failures + rest.store_failures,
            refused_stores=stats.refused_stores + rest.refused_stores,
            hits=self._tiering.restorations.found_blocks[blocks.name],
            misses=self._tiering.restorations.missed_requests[blocks.name],
            fetched=stats.fetched + rest.fetched,
            fetched_bytes=stats.fetched_bytes + rest.fetched_bytes,
            stored_bytes=stats.stored_bytes + rest.stored_bytes,
            evicted=stats.evicted + rest.evicted,
            expired=stats.expired + rest.expired,
            quarantined=stats.quarantined + rest.quarantined,
            failures={kind.value: count for kind, count in failures.items()},
            latency_s=stats.latency_s,
            read_bytes_per_s=stats.read_bytes_per_s,
            write_bytes_per_s=stats.write_bytes_per_s,
            crossover_tokens=self._crossover(blocks.name),
            last_fault=_latest(stats, rest),
            divergence=self._tiering.divergence.report(blocks.name),
        )

    def _crossover(self, tier: str) -> int:
        bytes_per_token = self._format.bytes_per_block / self._format.block_size
        tokens = self._tiering.worth.crossover_tokens(tier, bytes_per_token=bytes_per_token)
        if tokens is None:
            return UNKNOWN_CROSSOVER
        return -1 if math.isinf(tokens) else math.ceil(tokens)


def _latest(stats: TierStats, rest: TierStats) -> str | None:
    return stats.last_fault or rest.last_fault
