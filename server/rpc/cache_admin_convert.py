"""Turn what an engine's cache answers and tells into the messages of ``cache_admin.proto``.

The way in is ``cache_admin_read``. Salts of namespaces end here: clients get tenants' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvserve.v1 import cache_admin_pb2 as pb
from server.engine import admin_messages as ops
from server.engine.admin_messages import AdminErrorKind, AdminRefusal, CacheEventKind, PinType
from server.rpc.errors import (
    CallError,
    InternalError,
    InvalidArgument,
    NotSupported,
    PinBudgetExceeded,
    PrefixInUse,
    PrefixNotFound,
    SnapshotExists,
    SnapshotNotFound,
)

__all__ = [
    "error_from_refusal",
    "event_of",
    "evicted_of",
    "found_of",
    "kind_of",
    "page_of",
    "pinned_of",
    "policy_of",
    "reset_of",
    "stats_of",
]

_PIN_KINDS = {PinType.SOFT: pb.PIN_KIND_SOFT, PinType.HARD: pb.PIN_KIND_HARD}
_EVENT_KINDS = {
    CacheEventKind.STORED: pb.CACHE_EVENT_KIND_STORED,
    CacheEventKind.EVICTED: pb.CACHE_EVENT_KIND_EVICTED,
    CacheEventKind.EXPIRED: pb.CACHE_EVENT_KIND_EXPIRED,
    CacheEventKind.PINNED: pb.CACHE_EVENT_KIND_PINNED,
    CacheEventKind.UNPINNED: pb.CACHE_EVENT_KIND_UNPINNED,
    CacheEventKind.RESTORED: pb.CACHE_EVENT_KIND_RESTORED,
    CacheEventKind.OFFLOADED: pb.CACHE_EVENT_KIND_OFFLOADED,
}


def error_from_refusal(refusal: AdminRefusal, *, path: str = "") -> CallError:
    """Return the error for an operation that was not carried out. ``path`` is the field of its selector."""
    field = refusal.field or path or "request"
    match refusal.kind:
        case AdminErrorKind.NOT_FOUND:
            is_snapshot = refusal.field == "name"
            return SnapshotNotFound(refusal.reason) if is_snapshot else PrefixNotFound(refusal.reason)
        case AdminErrorKind.AMBIGUOUS:
            return InvalidArgument.of(refusal.field or f"{path or 'prefix'}.prefix_id", refusal.reason)
        case AdminErrorKind.IN_USE:
            return PrefixInUse(refusal.reason)
        case AdminErrorKind.OVER_BUDGET:
            return PinBudgetExceeded(refusal.reason)
        case AdminErrorKind.EXISTS:
            return SnapshotExists(refusal.reason)
        case AdminErrorKind.UNSUPPORTED:
            return NotSupported(refusal.reason)
        case AdminErrorKind.INVALID:
            return InvalidArgument.of(field, refusal.reason)
        case AdminErrorKind.FAILED:
            return InternalError(refusal.reason, reason="CACHE_OPERATION_FAILED")


def stats_of(
    report: ops.CacheReport,
    *,
    model: str,
    fingerprint: str,
    block_size: int,
    bytes_per_block: int,
    tenant_of: Callable[[str], str],
) -> pb.GetStatsResponse:
    """Return what ``GetStats`` shows."""
    pins = report.pins
    return pb.GetStatsResponse(
        model=model,
        fingerprint=fingerprint,
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        num_blocks=report.num_blocks,
        num_blocks_in_use=report.num_blocks_in_use,
        num_blocks_cached=report.num_blocks_cached,
        num_blocks_free=report.num_blocks_free,
        total=_totals_of(report.totals, bytes_per_block),
        namespaces=[
            pb.NamespaceStats(
                namespace=one.namespace,
                tenant=tenant_of(one.salt),
                stats=_totals_of(one.totals, bytes_per_block),
                policy=one.policy,
                quota_blocks=one.quota_blocks,
            )
            for one in report.namespaces
        ],
        tiers=[_tier_of(tier) for tier in report.tiers],
        pins=pb.PinStats(
            soft_pins=pins.soft_pins,
            hard_pins=pins.hard_pins,
            soft_blocks=pins.soft_blocks,
            hard_blocks=pins.hard_blocks,
            soft_budget_blocks=pins.soft_budget_blocks,
            hard_budget_blocks=pins.hard_budget_blocks,
        ),
        prefetch=_prefetch_of(report.prefetch),
        uptime_s=report.uptime_s,
        policy=report.policy,
    )


def page_of(
    page: ops.PrefixPage,
    *,
    bytes_per_block: int,
    previews: Mapping[int, str],
    tenant_of: Callable[[str], str],
) -> pb.ListPrefixesResponse:
    """Return a page; ``previews`` has texts by place on the page."""
    response = pb.ListPrefixesResponse(next_page_token=page.next_page_token, total=page.total)
    for place, entry in enumerate(page.entries):
        response.prefixes.add(
            prefix_id=entry.prefix_id,
            namespace=entry.namespace,
            tenant=tenant_of(entry.salt),
            num_tokens=entry.num_tokens,
            own_tokens=entry.own_tokens,
            own_blocks=entry.own_blocks,
            own_bytes=entry.own_blocks * bytes_per_block,
            hits=entry.hits,
            age_s=entry.age_s,
            idle_s=entry.idle_s,
            expires_in_s=entry.expires_in_s,
            pin=pb.PIN_KIND_UNSPECIFIED if entry.pin is None else _PIN_KINDS[entry.pin],
            pin_expires_in_s=entry.pin_expires_in_s,
            in_use=entry.in_use,
            has_last_logits=entry.has_last_logits,
            num_children=entry.num_children,
            tiers=_tier_blocks(entry.tiers),
            value=entry.value,
            preview=previews.get(place),
            parent_id=entry.parent_id,
        )
    return response


def found_of(found: ops.PrefixFound) -> pb.LookupPrefixResponse:
    """Return how much of a prompt is cached."""
    return pb.LookupPrefixResponse(
        prompt_tokens=found.prompt_tokens,
        cached_block_tokens=found.cached_block_tokens,
        cached_partial_tokens=found.cached_partial_tokens,
        is_exact=found.is_exact,
        tiers=_tier_blocks(found.tiers),
        prefix_id=found.prefix_id,
    )


def pinned_of(pinned: ops.Pinned) -> pb.PinPrefixResponse:
    """Return what a pin holds."""
    return pb.PinPrefixResponse(
        prefix_id=pinned.prefix_id,
        num_blocks=pinned.num_blocks,
        newly_pinned_blocks=pinned.newly_pinned_blocks,
        num_tokens=pinned.num_tokens,
    )


def evicted_of(evicted: ops.Evicted) -> tuple[int, int, int]:
    """Return the blocks taken, those kept, and the objects taken: in the order of the fields."""
    return evicted.evicted_blocks, evicted.kept_blocks, evicted.evicted_objects


def policy_of(report: ops.PolicyReport) -> pb.GetPolicyResponse:
    """Return the policies: live, available, on trial, in the canary."""
    response = pb.GetPolicyResponse(policy=report.policy)
    for name, description in report.available.items():
        response.available.add(name=name, description=description)
    for trial in report.trial:
        response.trial.add(
            policy=trial.policy,
            token_hit_rate=trial.token_hit_rate,
            request_hit_rate=trial.request_hit_rate,
            requests=trial.requests,
            tokens=trial.tokens,
            sampled_share=trial.sampled_share,
            cost_share=trial.cost_share,
        )
    if (canary := report.canary) is not None:
        response.canary.CopyFrom(
            pb.CanaryInfo(
                policy=canary.policy,
                share=canary.share,
                namespaces=canary.namespaces,
                token_hit_rate=canary.token_hit_rate,
                live_token_hit_rate=canary.live_token_hit_rate,
            )
        )
    return response


def kind_of(note: ops.CacheEventNote) -> int:
    """Return what kind of event this is, as clients name it."""
    return _EVENT_KINDS[note.kind]


def event_of(note: ops.CacheEventNote, *, epoch: int, num_lost: int) -> pb.CacheEvent:
    """Return one event."""
    return pb.CacheEvent(
        sequence=note.sequence,
        epoch=epoch,
        kind=_EVENT_KINDS[note.kind],
        namespace=note.namespace,
        prefix_id=note.prefix_id,
        num_tokens=note.num_tokens,
        num_blocks=note.num_blocks,
        cause=note.cause,
        tier=note.tier,
        num_lost=num_lost,
        time_s=note.time_s,
    )


def reset_of(*, epoch: int, num_lost: int) -> pb.CacheEvent:
    """Return the event that says that the engine started again."""
    return pb.CacheEvent(epoch=epoch, kind=pb.CACHE_EVENT_KIND_RESET, num_lost=num_lost)


def _totals_of(totals: ops.CacheTotals, bytes_per_block: int) -> pb.CacheStats:
    cached = totals.prompt_tokens - totals.computed_tokens
    return pb.CacheStats(
        entries=totals.entries,
        blocks=totals.blocks,
        bytes=totals.blocks * bytes_per_block,
        requests=totals.requests,
        hits=totals.hits,
        misses=totals.requests - totals.hits,
        request_hit_rate=_share(totals.hits, totals.requests),
        token_hit_rate=_share(cached, totals.prompt_tokens),
        prompt_tokens=totals.prompt_tokens,
        cached_block_tokens=totals.cached_block_tokens,
        cached_partial_tokens=totals.cached_partial_tokens,
        cached_tail_tokens=totals.cached_tail_tokens,
        restored_tokens=totals.restored_tokens,
        computed_tokens=totals.computed_tokens,
        inserted_blocks=totals.inserted_blocks,
        evicted_blocks=totals.evicted_blocks,
        expired_blocks=totals.expired_blocks,
        pinned_blocks=totals.pinned_blocks,
        restored_blocks=totals.restored_blocks,
        time_saved_s=totals.time_saved_s,
    )


def _tier_of(tier: ops.TierReport) -> pb.TierStats:
    measured = tier.divergence
    return pb.TierStats(
        divergence=None
        if measured is None
        else pb.Divergence(
            measured_blocks=measured.measured_blocks,
            cosine_distance=measured.cosine_distance,
            cosine_distance_upper=measured.cosine_distance_upper,
            relative_l2=measured.relative_l2,
            relative_l2_upper=measured.relative_l2_upper,
            is_over_budget=measured.is_over_budget,
        ),
        tier=tier.tier,
        is_available=tier.is_available,
        objects=tier.num_objects,
        bytes=tier.num_bytes,
        max_bytes=tier.max_bytes or 0,
        hits=tier.hits,
        misses=tier.misses,
        stored=tier.stored,
        fetched=tier.fetched,
        stored_bytes=tier.stored_bytes,
        fetched_bytes=tier.fetched_bytes,
        evicted=tier.evicted,
        expired=tier.expired,
        quarantined=tier.quarantined,
        refused_stores=tier.refused_stores,
        store_failures=tier.store_failures,
        failures=tier.failures,
        latency_s=tier.latency_s,
        read_bytes_per_s=tier.read_bytes_per_s,
        write_bytes_per_s=tier.write_bytes_per_s,
        crossover_tokens=tier.crossover_tokens,
        last_fault=tier.last_fault or "",
        codec=tier.codec,
    )


def _prefetch_of(report: ops.PrefetchReport) -> pb.PrefetchStats:
    return pb.PrefetchStats(
        waiting=pb.PrefetchCounts(
            fetched_blocks=report.waiting_fetched,
            used_blocks=report.waiting_used,
            late_blocks=report.waiting_late,
            wasted_blocks=report.waiting_wasted,
        ),
        sessions=pb.PrefetchCounts(
            fetched_blocks=report.sessions_fetched,
            used_blocks=report.sessions_used,
            late_blocks=report.sessions_late,
            wasted_blocks=report.sessions_wasted,
        ),
        restore_s=report.restore_s,
        hidden_s=report.hidden_s,
    )


def _tier_blocks(tiers: Mapping[str, int]) -> Sequence[pb.TierBlocks]:
    return [pb.TierBlocks(tier=tier, blocks=blocks) for tier, blocks in tiers.items() if blocks]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
