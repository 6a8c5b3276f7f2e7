"""From messages about models and their reuse to the client's own values."""

from __future__ import annotations

from kvserve._copying import copy_fields
from kvserve._models_results import (
    LoadProgress,
    ModelList,
    ModelState,
    ModelStatus,
    ReuseEvent,
    ReuseEventKind,
    ReuseKey,
    ReusePolicy,
    ReuseReport,
    ReuseRisk,
    RiskInterval,
)
from kvserve._predict_results import PredictTask
from kvserve.v1 import cache_admin_pb2 as pb

__all__ = [
    "load_progress_from_pb",
    "model_list_from_pb",
    "model_status_from_pb",
    "reuse_event_from_pb",
    "reuse_report_from_pb",
]

_MODEL_STATES = {
    number: ModelState(name.removeprefix("MODEL_STATE_").lower())
    for name, number in pb.ModelState.items()
    if number
}
_REUSE_EVENT_KINDS = {
    number: ReuseEventKind(name.lower()) for name, number in pb.ReuseEvent.Kind.items() if number
}
_NO_LIMIT_IS_ZERO = (
    "lifetime_s",
    "min_lifetime_s",
    "max_lifetime_s",
    "max_changed",
    "max_cosine_distance",
    "max_l2",
    "max_error",
)


def model_status_from_pb(message: pb.ModelStatus) -> ModelStatus:
    """Convert the status of a model."""
    return copy_fields(
        ModelStatus,
        message,
        state=_MODEL_STATES.get(message.state, ModelState.OTHER),
        task=_task(message.task),
        aliases=tuple(message.aliases),
    )


def _task(name: str) -> PredictTask | None:
    if not name:
        return None
    return PredictTask(name) if name in tuple(PredictTask) else PredictTask.OTHER


def model_list_from_pb(message: pb.ListModelsResponse) -> ModelList:
    """Convert the answer of ListModels."""
    return ModelList(
        map(model_status_from_pb, message.models),
        predict_bytes=message.predict_bytes,
        predict_memory=message.predict_memory or None,
    )


def load_progress_from_pb(message: pb.LoadModelProgress) -> LoadProgress:
    """Convert a message of LoadModel."""
    return copy_fields(LoadProgress, message, status=model_status_from_pb(message.status))


def _risk_from_pb(message: pb.ReuseRisk) -> ReuseRisk:
    return copy_fields(
        ReuseRisk,
        message,
        changed=copy_fields(RiskInterval, message.changed),
        cosine_distance=copy_fields(RiskInterval, message.cosine_distance),
        l2=copy_fields(RiskInterval, message.l2),
    )


def _policy_from_pb(message: pb.ReusePolicy) -> ReusePolicy:
    return copy_fields(
        ReusePolicy,
        message,
        risk=_risk_from_pb(message.risk),
        keys=tuple(copy_fields(ReuseKey, key, risk=_risk_from_pb(key.risk)) for key in message.keys),
        **{name: getattr(message, name) or None for name in _NO_LIMIT_IS_ZERO},
    )


def reuse_report_from_pb(message: pb.GetReuseResponse) -> ReuseReport:
    """Convert the answer of GetReuse."""
    return copy_fields(ReuseReport, message, policies=tuple(map(_policy_from_pb, message.policies)))


def reuse_event_from_pb(message: pb.ReuseEvent) -> ReuseEvent:
    """Convert a message of WatchReuse."""
    has_interval = message.HasField("interval")
    return copy_fields(
        ReuseEvent,
        message,
        kind=_REUSE_EVENT_KINDS.get(message.kind, ReuseEventKind.OTHER),
        interval=copy_fields(RiskInterval, message.interval) if has_interval else None,
    )
