"""Time the pure core: matching a long prompt in the tree, and planning with a long queue.

    python -m server.engine.bench_core

Prints one JSON object; times in seconds. No model and no worker: steps are applied with made-up tokens.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time

import msgspec

from kvcore.clock import ManualClock
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.manager import CacheManager
from server.engine.messages import GenerateSpec, Submit
from server.engine.options import EngineOptions
from server.engine.plan import SampledToken, StepPlan, StepResult
from server.engine.scheduler import Scheduler

__all__ = ["CoreTimings", "main", "time_match", "time_plans"]

BLOCK_SIZE = 16


class CoreTimings(msgspec.Struct, frozen=True, kw_only=True):
    """What the core takes, in seconds."""

    match_tokens: int
    match_p50_s: float
    match_max_s: float
    num_waiting: int
    num_running: int
    plan_p50_s: float
    plan_p99_s: float
    plan_max_s: float
    apply_p50_s: float


def time_match(num_tokens: int, repeats: int) -> list[float]:
    """Return how long it takes to match a prompt of ``num_tokens`` of which all blocks are cached."""
    cache = CacheManager(
        num_blocks=num_tokens // BLOCK_SIZE + 8,
        block_size=BLOCK_SIZE,
        clock=ManualClock(),
        num_logits_slots=8,
    )
    namespace = NamespaceKey("bench")
    rng = random.Random(0)
    tokens = pack_tokens([rng.randrange(50_000) for _ in range(num_tokens)])
    lease = cache.open(cache.find(namespace, tokens), tokens)
    cache.extend(lease, num_tokens)
    cache.commit([lease])
    cache.release(lease)
    times = []
    for _ in range(repeats):
        prompt = pack_tokens(tokens)
        started = time.perf_counter()
        match = cache.lookup(namespace, prompt)
        times.append(time.perf_counter() - started)
        if match.num_tokens < num_tokens - BLOCK_SIZE:
            raise RuntimeError(f"only {match.num_tokens} of {num_tokens} tokens matched")
    return times


def _result(plan: StepPlan) -> StepResult:
    sampled = [None if part.sampling is None else SampledToken(7) for part in plan.sequences]
    return StepResult(plan.step_id, sampled, forward_s=0.02)


def time_plans(num_waiting: int, num_running: int, steps: int) -> tuple[list[float], list[float]]:
    """Return how long ``plan()`` and ``apply()`` took in each step while ``num_waiting`` requests wait."""
    clock = ManualClock()
    options = EngineOptions(model="bench", max_running=num_running, max_waiting=2 * num_waiting)
    scheduler = Scheduler(
        options, num_blocks=65_536, block_size=BLOCK_SIZE, num_logits_slots=1024, clock=clock
    )
    rng = random.Random(0)
    prefixes = [[rng.randrange(50_000) for _ in range(512)] for _ in range(200)]
    key = 0

    def top_up() -> None:
        nonlocal key
        while scheduler.stats().num_waiting < num_waiting:
            for _ in range(max(1, num_waiting - scheduler.stats().num_waiting)):
                key += 1
                own = [rng.randrange(50_000) for _ in range(32)]
                spec = GenerateSpec(token_ids=rng.choice(prefixes) + own, max_new_tokens=64)
                scheduler.submit(Submit(key, spec))

    top_up()
    plans, applies = [], []
    gc.collect()
    gc.freeze()
    warm_up = 2 * steps
    for step in range(warm_up + steps):
        clock.advance(0.02)
        started = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        if plan is None:
            raise RuntimeError("nothing to plan with requests waiting")
        result = _result(plan)
        applying = time.perf_counter()
        scheduler.apply(plan, result)
        applied = time.perf_counter()
        scheduler.drain_events()
        if step >= warm_up:
            plans.append(planned - started)
            applies.append(applied - applying)
        top_up()
    scheduler.check_integrity()
    return plans, applies


def main(arguments: list[str] | None = None) -> int:
    """Print the timings."""
    parser = argparse.ArgumentParser(description="Time the tree and the scheduler.")
    parser.add_argument("--tokens", type=int, default=32_768, help="length of the matched prompt")
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    matches = time_match(options.tokens, repeats=51)
    plans, applies = time_plans(options.waiting, options.running, options.steps)
    timings = CoreTimings(
        match_tokens=options.tokens,
        match_p50_s=statistics.median(matches),
        match_max_s=max(matches),
        num_waiting=options.waiting,
        num_running=options.running,
        plan_p50_s=statistics.median(plans),
        plan_p99_s=sorted(plans)[int(0.99 * (len(plans) - 1))],
        plan_max_s=max(plans),
        apply_p50_s=statistics.median(applies),
    )
    print(msgspec.json.encode(timings).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
