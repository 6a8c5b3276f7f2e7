"""The pure core, in a process of its own: a match in the tree, a plan with a long queue."""

from __future__ import annotations

from typing import Any

from loadgen.experiments.figures import Figure
from loadgen.experiments.processes import run_json

__all__ = ["measure_core"]


def measure_core(timeout_s: float) -> tuple[list[Figure], dict[str, object]]:
    """Return the core's times, from ``server.engine.bench_core``."""
    timings: dict[str, Any] = run_json(["server.engine.bench_core"], timeout_s=timeout_s)

    def figure(name: str, key: str, target: float) -> Figure:
        return Figure(
            experiment="core",
            shape="",
            name=name,
            value=1000 * timings[key],
            unit="ms",
            target=target,
            lower_is_better=True,
        )

    figures = [
        figure(f"match of {timings['match_tokens']} tokens, median", "match_p50_s", 1.0),
        figure(f"plan() with {timings['num_waiting']} waiting, median", "plan_p50_s", 5.0),
        figure(f"plan() with {timings['num_waiting']} waiting, 99th percentile", "plan_p99_s", 5.0),
    ]
    return figures, dict(timings)
