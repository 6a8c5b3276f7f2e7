"""From messages about the cache to the client's own values. Fields of the same name mean the same."""

from __future__ import annotations

from typing import Any

from kvserve._cache_reports import (
    CacheReport,
    CacheStats,
    Divergence,
    NamespaceStats,
    PinStats,
    PrefetchCounts,
    PrefetchStats,
    TierStats,
)
from kvserve._cache_results import (
    CacheEvent,
    CacheEventKind,
    CanaryInfo,
    EvictResult,
    LifetimeResult,
    PinKind,
    PinResult,
    PolicyInfo,
    PolicyReport,
    PrefixId,
    PrefixInfo,
    PrefixLookup,
    SnapshotProgress,
    TierBlocks,
    TrialResult,
    WarmProgress,
)
from kvserve._copying import copy_fields
from kvserve.v1 import cache_admin_pb2 as pb

__all__ = [
    "event_from_pb",
    "event_kind_to_pb",
    "evict_result_from_pb",
    "lifetime_result_from_pb",
    "lookup_from_pb",
    "pin_result_from_pb",
    "policy_report_from_pb",
    "prefix_info_from_pb",
    "report_from_pb",
    "snapshot_progress_from_pb",
    "warm_progress_from_pb",
]

_PIN_KINDS: dict[int, PinKind] = {pb.PIN_KIND_SOFT: PinKind.SOFT, pb.PIN_KIND_HARD: PinKind.HARD}
_PREFIX_OF_EVENT_KINDS = "CACHE_EVENT_KIND_"
_EVENT_KINDS = {
    number: CacheEventKind(name.removeprefix(_PREFIX_OF_EVENT_KINDS).lower())
    for name, number in pb.CacheEventKind.items()
    if number
}


def _id_from_pb(value: str) -> PrefixId | None:
    return PrefixId(value) if value else None


def _tiers_from_pb(messages: Any) -> tuple[TierBlocks, ...]:
    return tuple(TierBlocks(message.tier, message.blocks) for message in messages)


def _tier_stats_from_pb(message: pb.TierStats) -> TierStats:
    has_divergence = message.HasField("divergence")
    return copy_fields(
        TierStats, message, divergence=copy_fields(Divergence, message.divergence) if has_divergence else None
    )


def report_from_pb(message: pb.GetStatsResponse) -> CacheReport:
    """Convert the answer of GetStats."""
    prefetch = message.prefetch
    return copy_fields(
        CacheReport,
        message,
        total=copy_fields(CacheStats, message.total),
        namespaces=tuple(
            copy_fields(NamespaceStats, namespace, stats=copy_fields(CacheStats, namespace.stats))
            for namespace in message.namespaces
        ),
        tiers=tuple(map(_tier_stats_from_pb, message.tiers)),
        pins=copy_fields(PinStats, message.pins),
        prefetch=copy_fields(
            PrefetchStats,
            prefetch,
            waiting=copy_fields(PrefetchCounts, prefetch.waiting),
            sessions=copy_fields(PrefetchCounts, prefetch.sessions),
        ),
    )


def prefix_info_from_pb(message: pb.PrefixInfo) -> PrefixInfo:
    """Convert an entry of ListPrefixes."""
    return copy_fields(
        PrefixInfo,
        message,
        prefix_id=PrefixId(message.prefix_id),
        parent_id=_id_from_pb(message.parent_id),
        pin=_PIN_KINDS.get(message.pin),
        tiers=_tiers_from_pb(message.tiers),
    )


def lookup_from_pb(message: pb.LookupPrefixResponse) -> PrefixLookup:
    """Convert the answer of LookupPrefix."""
    return copy_fields(
        PrefixLookup,
        message,
        tiers=_tiers_from_pb(message.tiers),
        prefix_id=_id_from_pb(message.prefix_id),
    )


def warm_progress_from_pb(message: pb.WarmPrefixProgress) -> WarmProgress:
    """Convert a message of WarmPrefix."""
    return copy_fields(WarmProgress, message, prefix_id=_id_from_pb(message.prefix_id))


def pin_result_from_pb(message: pb.PinPrefixResponse) -> PinResult:
    """Convert the answer of PinPrefix."""
    return copy_fields(PinResult, message, prefix_id=PrefixId(message.prefix_id))


def lifetime_result_from_pb(message: pb.SetLifetimeResponse) -> LifetimeResult:
    """Convert the answer of SetLifetime."""
    return copy_fields(LifetimeResult, message, prefix_id=PrefixId(message.prefix_id))


def evict_result_from_pb(message: pb.EvictPrefixesResponse | pb.ClearCacheResponse) -> EvictResult:
    """Convert the answer of EvictPrefixes or ClearCache."""
    return copy_fields(EvictResult, message)


def policy_report_from_pb(message: pb.GetPolicyResponse) -> PolicyReport:
    """Convert the answer of GetPolicy or SetPolicy."""
    return copy_fields(
        PolicyReport,
        message,
        available=tuple(copy_fields(PolicyInfo, policy) for policy in message.available),
        trial=tuple(copy_fields(TrialResult, result) for result in message.trial),
        canary=copy_fields(CanaryInfo, message.canary) if message.HasField("canary") else None,
    )


def event_from_pb(message: pb.CacheEvent) -> CacheEvent:
    """Convert a message of WatchCache."""
    return copy_fields(
        CacheEvent,
        message,
        kind=_EVENT_KINDS.get(message.kind, CacheEventKind.OTHER),
        prefix_id=_id_from_pb(message.prefix_id),
    )


def event_kind_to_pb(kind: CacheEventKind) -> str:
    """Return the name, in the contract, of this kind of event."""
    return _PREFIX_OF_EVENT_KINDS + kind.name


def snapshot_progress_from_pb(message: pb.SnapshotProgress) -> SnapshotProgress:
    """Convert a message of SaveSnapshot or RestoreSnapshot."""
    return copy_fields(SnapshotProgress, message)
