"""The experiments about tiers run against real servers. The tiny shape: its figures mean nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec

from loadgen.bench import Bench
from loadgen.experiments.machine import Limits
from loadgen.experiments.plan import PLANS
from loadgen.experiments.shapes import SHAPES

LIMITS = Limits(
    cores=1,
    torch_version="",
    torch_capability="",
    read_bytes_per_s=1.0,
    read_kernel="",
    float32_flops=1.0,
    bfloat16_flops=1.0,
)


def bench_of(folder: Path) -> Bench:
    """Return the smoke run, with one tier and one size of device."""
    plan = PLANS["smoke"]
    plan = msgspec.structs.replace(
        plan,
        tiers=msgspec.structs.replace(plan.tiers, lengths=(16, 128), repeats=2, places=("host",)),
        prefetch=msgspec.structs.replace(plan.prefetch, rounds=1, device_shares=(1.25,)),
    )
    return Bench(plan, mode="smoke", folder=folder, limits=LIMITS, server_arguments=["--threads", "1"])


def test_restore_stands_beside_recompute_for_every_length(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    bench.run_shape_alone(SHAPES["tiny"], only={"tiers"})
    assert bench.report.problems == []
    names = [figure.name for figure in bench.report.figures]
    assert names[:2] == ["time to first token, prefix of 16", "time to first token, prefix of 128"]
    assert names[2:] == ["crossover, measured", "share of decisions for the faster way"]
    assert all(figure.value > 0 for figure in bench.report.figures[:2])


def test_sessions_that_come_back_at_once_are_counted_block_by_block(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    bench.run_shape_alone(SHAPES["tiny"], only={"prefetch"})
    assert bench.report.problems == []
    hidden, in_time = bench.report.figures
    assert 0.0 <= hidden.value <= 1.0
    # Twelve sessions of 256 tokens; where the machine is busy some are computed instead.
    assert 0 < in_time.other <= 12 * 16


def test_a_restart_is_compared_with_a_cold_start(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    bench.run_shape_alone(SHAPES["tiny"], only={"restart"})
    assert bench.report.problems == []
    assert [figure.name.rpartition(", ")[2] for figure in bench.report.figures] == [
        "another question",
        "the same question",
    ]
    assert all(figure.value > 0 for figure in bench.report.figures)
