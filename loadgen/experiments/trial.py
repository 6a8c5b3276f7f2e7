"""What running eviction policies in the shadow of the live one costs, as a share of the engine's time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loadgen.experiments.asking import Asker
from loadgen.experiments.figures import Figure
from loadgen.experiments.processes import ProcessFailed, run_loadgen, serve
from loadgen.experiments.shapes import ModelShape
from loadgen.experiments.throughput import WORKLOADS, Workload

__all__ = ["measure_trial"]

POLICIES = ("lru", "arc", "s3fifo")
TARGET_SHARE = 0.02
SEED = 11


def measure_trial(
    shape: ModelShape,
    model: Path,
    arguments: Sequence[str],
    *,
    workload: str,
    folder: Path,
    timeout_s: float,
) -> tuple[list[Figure], dict[str, object]]:
    """Return the share of the engine's time that the trial of three policies takes under load."""
    chosen: Workload = WORKLOADS[workload]
    settings = ["--trial", ",".join(POLICIES)]
    with (
        serve(str(model), [*arguments, *settings], log=folder / f"server-{shape.name}.log") as server,
        Asker(server.target, timeout_s=timeout_s) as asker,
    ):
        summary = run_loadgen(server.target, chosen.arguments(SEED), timeout_s=timeout_s).summary
        report = asker.cache.policy()
    trials = {trial.policy: trial for trial in report.trial}
    if missing := set(POLICIES) - set(trials):
        raise ProcessFailed(f"no trial of {', '.join(sorted(missing))}: the server tells of {sorted(trials)}")
    figure = Figure(
        experiment="policies on trial",
        shape=shape.name,
        name=f"share of the engine's time, {len(trials)} policies",
        # Each result tells of all policies together: what they share, such as sampling, is done once.
        value=max(trial.cost_share for trial in trials.values()),
        unit="",
        target=TARGET_SHARE,
        lower_is_better=True,
        ours=float(max(trial.requests for trial in trials.values())),
        other=float(summary.requests),
        other_name="requests sent",
        note=f"'ours': requests seen; {chosen.name}; live policy {report.policy}",
    )
    return [figure], {"policy": report.policy, "trial": report.trial, "summary": summary}
