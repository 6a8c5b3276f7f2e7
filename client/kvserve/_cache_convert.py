"""From messages about the cache to the client's own values. Fields of the same name mean the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

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
    LoadProgress,
    ModelState,
    ModelStatus,
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
from kvserve.v1 import cache_admin_pb2 as pb

__all__ = [
    "event_from_pb",
    "event_kind_to_pb",
    "evict_result_from_pb",
    "lifetime_result_from_pb",
    "load_progress_from_pb",
    "lookup_from_pb",
    "model_status_from_pb",
    "pin_result_from_pb",
    "policy_report_from_pb",
    "prefix_info_from_pb",
    "report_from_pb",
    "snapshot_progress_from_pb",
    "warm_progress_from_pb",
]

Value = TypeVar("Value")


def _copy(value_type: Callable[..., Value], message: Message, **converted: object) -> Value:
    """Make a value from the message's fields of the same names, with ``converted`` in place of some.

    A field that was not sent and knows it (``optional``, or a message) is None.
    """
    values = dict(converted)
    for field in fields(value_type):  # type: ignore[arg-type]
        if field.name not in values:
            value: Any = getattr(message, field.name)
            if message.DESCRIPTOR.fields_by_name[field.name].has_presence:
                value = value if message.HasField(field.name) else None
            values[field.name] = dict(value) if isinstance(value, Mapping) else value
    return value_type(**values)


_PIN_KINDS: dict[int, PinKind] = {pb.PIN_KIND_SOFT: PinKind.SOFT, pb.PIN_KIND_HARD: PinKind.HARD}
_PREFIX_OF_EVENT_KINDS = "CACHE_EVENT_KIND_"
_EVENT_KINDS = {
    number: CacheEventKind(name.removeprefix(_PREFIX_OF_EVENT_KINDS).lower())
    for name, number in pb.CacheEventKind.items()
    if number
}
_MODEL_STATES = {
    number: ModelState(name.removeprefix("MODEL_STATE_").lower())
    for name, number in pb.ModelState.items()
    if number
}


def _id_from_pb(value: str) -> PrefixId | None:
    return PrefixId(value) if value else None


def _tiers_from_pb(messages: Any) -> tuple[TierBlocks, ...]:
    return tuple(TierBlocks(message.tier, message.blocks) for message in messages)


def _tier_stats_from_pb(message: pb.TierStats) -> TierStats:
    has_divergence = message.HasField("divergence")
    return _copy(
        TierStats, message, divergence=_copy(Divergence, message.divergence) if has_divergence else None
    )


def report_from_pb(message: pb.GetStatsResponse) -> CacheReport:
    """Convert the answer of GetStats."""
    prefetch = message.prefetch
    return _copy(
        CacheReport,
        message,
        total=_copy(CacheStats, message.total),
        namespaces=tuple(
            _copy(NamespaceStats, namespace, stats=_copy(CacheStats, namespace.stats))
            for namespace in message.namespaces
        ),
        tiers=tuple(map(_tier_stats_from_pb, message.tiers)),
        pins=_copy(PinStats, message.pins),
        prefetch=_copy(
            PrefetchStats,
            prefetch,
            waiting=_copy(PrefetchCounts, prefetch.waiting),
            sessions=_copy(PrefetchCounts, prefetch.sessions),
        ),
    )


def prefix_info_from_pb(message: pb.PrefixInfo) -> PrefixInfo:
    """Convert an entry of ListPrefixes."""
    return _copy(
        PrefixInfo,
        message,
        prefix_id=PrefixId(message.prefix_id),
        parent_id=_id_from_pb(message.parent_id),
        pin=_PIN_KINDS.get(message.pin),
        tiers=_tiers_from_pb(message.tiers),
    )


def lookup_from_pb(message: pb.LookupPrefixResponse) -> PrefixLookup:
    """Convert the answer of LookupPrefix."""
    return _copy(
        PrefixLookup,
        message,
        tiers=_tiers_from_pb(message.tiers),
        prefix_id=_id_from_pb(message.prefix_id),
    )


def warm_progress_from_pb(message: pb.WarmPrefixProgress) -> WarmProgress:
    """Convert a message of WarmPrefix."""
    return _copy(WarmProgress, message, prefix_id=_id_from_pb(message.prefix_id))


def pin_result_from_pb(message: pb.PinPrefixResponse) -> PinResult:
    """Convert the answer of PinPrefix."""
    return _copy(PinResult, message, prefix_id=PrefixId(message.prefix_id))


def lifetime_result_from_pb(message: pb.SetLifetimeResponse) -> LifetimeResult:
    """Convert the answer of SetLifetime."""
    return _copy(LifetimeResult, message, prefix_id=PrefixId(message.prefix_id))


def evict_result_from_pb(message: pb.EvictPrefixesResponse | pb.ClearCacheResponse) -> EvictResult:
    """Convert the answer of EvictPrefixes or ClearCache."""
    return _copy(EvictResult, message)


def policy_report_from_pb(message: pb.GetPolicyResponse) -> PolicyReport:
    """Convert the answer of GetPolicy or SetPolicy."""
    return _copy(
        PolicyReport,
        message,
        available=tuple(_copy(PolicyInfo, policy) for policy in message.available),
        trial=tuple(_copy(TrialResult, result) for result in message.trial),
        canary=_copy(CanaryInfo, message.canary) if message.HasField("canary") else None,
    )


def event_from_pb(message: pb.CacheEvent) -> CacheEvent:
    """Convert a message of WatchCache."""
    return _copy(
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
    return _copy(SnapshotProgress, message)


def model_status_from_pb(message: pb.ModelStatus) -> ModelStatus:
    """Convert the status of a model."""
    return _copy(ModelStatus, message, state=_MODEL_STATES.get(message.state, ModelState.OTHER))


def load_progress_from_pb(message: pb.LoadModelProgress) -> LoadProgress:
    """Convert a message of LoadModel."""
    return _copy(LoadProgress, message, status=model_status_from_pb(message.status))
