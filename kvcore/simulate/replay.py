"""Replay a trace against ghosts under one policy and count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from kvcore.ghost import GhostCache
from kvcore.policies import EvictionPolicy, make_policy
from kvcore.simulate.optimal import OPTIMAL, OptimalPolicy
from kvcore.simulate.traces import Trace

__all__ = ["Half", "SimulationResult", "simulate"]


class Half(Enum):
    """Which requests are counted. All are replayed, so the second half begins with a warm cache."""

    BOTH = "both"
    FIRST = "first"
    SECOND = "second"


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What one policy did with one capacity. Rates are percent."""

    policy: str
    capacity_tokens: int
    block_tokens: int
    token_hit_rate: float
    request_hit_rate: float
    """Share of the requests that found at least one block."""
    num_requests: int
    num_tokens: int
    num_block_events: int
    """Blocks that requests used, found or inserted."""
    num_evicted: int
    num_expired: int
    events_per_s: float


def simulate(
    trace: Trace,
    policy: str,
    *,
    capacity_tokens: int,
    timer: Callable[[], float],
    half: Half = Half.BOTH,
    lifetime_s: float | None = None,
) -> SimulationResult:
    """Replay ``trace``. ``timer`` returns seconds; ``ValueError`` for an unknown policy or no capacity."""
    size = trace.block_tokens
    capacity = capacity_tokens // size
    if capacity < 1:
        raise ValueError(f"capacity_tokens must be at least one block of {size} tokens")
    judge: EvictionPolicy
    if policy == OPTIMAL:
        uses = [(request.session, request.blocks) for request in trace.requests]
        judge = OptimalPolicy(uses, capacity_blocks=capacity, block_tokens=size)
    else:
        judge = make_policy(policy, capacity_blocks=capacity, block_tokens=size)
    cache = GhostCache(judge, capacity_blocks=capacity, lifetime_s=lifetime_s)
    middle = len(trace.requests) // 2
    counted = {
        Half.BOTH: range(len(trace.requests)),
        Half.FIRST: range(middle),
        Half.SECOND: range(middle, len(trace.requests)),
    }[half]
    hit_tokens = num_tokens = num_hits = num_events = 0
    began = timer()
    for number, request in enumerate(trace.requests):
        num_matched = cache.request(
            request.session,
            request.blocks,
            request.time_s,
            num_tokens=request.num_tokens,
            num_output_tokens=request.num_output_tokens,
        )
        num_events += len(request.blocks)
        if number in counted:
            hit_tokens += min(num_matched * size, request.num_tokens)
            num_tokens += request.num_tokens
            num_hits += num_matched > 0
    elapsed_s = timer() - began
    return SimulationResult(
        policy=judge.name,
        capacity_tokens=capacity_tokens,
        block_tokens=size,
        token_hit_rate=100.0 * hit_tokens / max(1, num_tokens),
        request_hit_rate=100.0 * num_hits / max(1, len(counted)),
        num_requests=len(counted),
        num_tokens=num_tokens,
        num_block_events=num_events,
        num_evicted=cache.num_evicted,
        num_expired=cache.num_expired,
        events_per_s=num_events / max(elapsed_s, 1e-9),
    )
