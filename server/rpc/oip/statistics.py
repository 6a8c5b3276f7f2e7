"""A model's counters in the terms of Triton's statistics extension."""

from __future__ import annotations

import time

from server.predict.messages import ModelPhase, ModelStats, ModelStatus
from server.rpc.oip import open_inference_pb2 as pb

__all__ = ["statistics_of"]


def statistics_of(model: ModelStatus, stats: ModelStats | None) -> pb.ModelStatistics:
    """Return what a version did. ``stats``: its counters of about a second ago; None: it did nothing yet."""
    found = pb.ModelStatistics(name=model.name, version=model.version)
    if model.idle_s is not None:
        found.last_inference = int((time.time() - model.idle_s) * 1000)
    if stats is None:
        return found
    found.inference_count = stats.num_inputs
    found.execution_count = stats.num_batches
    num_good = stats.num_calls - stats.num_failed - stats.num_cancelled
    for name, count, seconds in (
        ("success", num_good, stats.queue_s + stats.compute_s),
        ("fail", stats.num_failed, 0.0),
        ("queue", num_good, stats.queue_s),
        ("compute_infer", num_good, stats.compute_s),
        ("cache_hit", sum(policy.num_hits for policy in stats.policies), 0.0),
        ("cache_miss", sum(policy.num_lookups - policy.num_hits for policy in stats.policies), 0.0),
    ):
        duration = getattr(found.inference_stats, name)
        duration.count, duration.ns = count, int(seconds * 1e9)
    if model.phase is ModelPhase.READY:
        found.memory_usage.add(type="CPU", byte_size=stats.num_bytes)
    return found
