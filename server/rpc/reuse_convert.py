"""What is known of reuse under drift, as messages of ``cache_admin.proto``."""

from __future__ import annotations

from kvserve.v1 import cache_admin_pb2 as pb
from server.predict.messages import (
    EventKind,
    IntervalReport,
    KeyReport,
    PolicyReport,
    ReuseEvent,
    ReuseReport,
    RiskReport,
)

__all__ = ["event_of", "report_of"]

_KINDS = {
    EventKind.ALARM: pb.ReuseEvent.ALARM,
    EventKind.RECOVERED: pb.ReuseEvent.RECOVERED,
    EventKind.LIFETIME: pb.ReuseEvent.LIFETIME,
    EventKind.STOPPED: pb.ReuseEvent.STOPPED,
    EventKind.RESUMED: pb.ReuseEvent.RESUMED,
    EventKind.LOST: pb.ReuseEvent.LOST,
}


def report_of(report: ReuseReport) -> pb.GetReuseResponse:
    """Convert a model's report."""
    return pb.GetReuseResponse(
        model=report.model,
        version=report.version,
        kind=report.kind,
        policies=[_policy_of(policy) for policy in report.policies],
    )


def event_of(event: ReuseEvent) -> pb.ReuseEvent:
    """Convert an event."""
    return pb.ReuseEvent(
        kind=_KINDS[event.kind],
        model=event.model,
        version=event.version,
        policy=event.policy,
        key=event.key,
        measure=event.measure,
        interval=None if event.interval is None else _interval_of(event.interval),
        limit=event.limit,
        lifetime_s=event.lifetime_s,
        num_lost=event.num_lost,
    )


def _policy_of(policy: PolicyReport) -> pb.ReusePolicy:
    message = pb.ReusePolicy(
        risk=_risk_of(policy.risk),
        keys=[_key_of(key) for key in policy.keys],
    )
    for name in policy.__struct_fields__:
        if name not in ("risk", "keys"):
            setattr(message, name, getattr(policy, name))
    return message


def _key_of(key: KeyReport) -> pb.ReuseKey:
    return pb.ReuseKey(
        key=key.key,
        risk=_risk_of(key.risk),
        lifetime_s=key.lifetime_s,
        stopped=key.stopped,
        num_hits=key.num_hits,
    )


def _risk_of(risk: RiskReport) -> pb.ReuseRisk:
    return pb.ReuseRisk(
        changed=_interval_of(risk.changed),
        cosine_distance=_interval_of(risk.cosine_distance),
        l2=_interval_of(risk.l2),
        num_compared=risk.num_compared,
        over_budget=risk.over_budget,
        proven_safe=risk.proven_safe,
    )


def _interval_of(interval: IntervalReport) -> pb.RiskInterval:
    return pb.RiskInterval(
        lower=interval.lower, estimate=interval.estimate, upper=interval.upper, weight=interval.weight
    )
