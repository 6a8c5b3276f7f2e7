"""Predict: calls a second over gRPC, latencies, processor time by call, and the way from file to answer."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

import kvserve
from loadgen.experiments.figures import Figure
from loadgen.experiments.predict_models import ENCODERS, write_encoder
from loadgen.experiments.processes import run_json, serve
from loadgen.predict_load import LoadReport

__all__ = ["measure_encoder", "measure_features", "measure_first_answer", "measure_texts"]

MATRIX_RATE_TARGET = 0.75
ONE_BY_ONE_TARGET = 4.0
FEATURES_TARGET = 3000.0
TEXTS_TARGET = 1000.0
LOAD_TARGET = 1.5
FEATURES_MODEL = "builtin-encoder"

Outcome = tuple[list[Figure], dict[str, object]]


def measure_encoder(shape: str, dtype: str, *, timeout_s: float) -> Outcome:
    """Return how near the encoder comes to its bare matrix products, and to transformers; no server."""
    said = run_json(
        ["server.worker.predict.bench", "--shape", shape, "--dtype", dtype, "--json", "-"],
        timeout_s=timeout_s,
    )
    return _encoder_figures(shape, dtype, said), said


def _encoder_figures(shape: str, dtype: str, said: dict[str, Any]) -> list[Figure]:
    """Return the figures of ``server.worker.predict.bench``."""
    return [
        Figure(
            experiment="encoder",
            shape=f"{shape}, {dtype}",
            name="rate over that of the bare matrix products",
            value=said["encoder_gflop_per_s"] / said["products_gflop_per_s"],
            unit="",
            target=MATRIX_RATE_TARGET,
            ours=said["encoder_gflop_per_s"],
            other=said["products_gflop_per_s"],
            other_name="GFLOP/s",
            note=said.get("note", ""),
        ),
        Figure(
            experiment="encoder",
            shape=f"{shape}, {dtype}",
            name="over transformers, one by one",
            value=said["one_by_one_s"] / said["encoder_s"],
            unit="x",
            target=ONE_BY_ONE_TARGET,
        ),
    ]


def measure_texts(
    *, cores: int, matrix_gflop_per_s: float, seconds: float, folder: Path, timeout_s: float
) -> Outcome:
    """Return texts of 16 tokens by second, and latencies: as fast as goes, steady, and in bursts."""
    shape = ENCODERS["minilm"]
    model = write_encoder(shape, folder / shape.name)
    limit = matrix_gflop_per_s * 1e9 / (16 * shape.flop_per_token)
    arguments = ["--predict-models", f"minilm={model}", "--threads", "1"]
    with serve("builtin", arguments, log=folder / "server.log", timeout_s=timeout_s) as server:
        kvserve.Client(server.target).predict("river", model="minilm")
        full = _load(server.target, "minilm", ["--seconds", f"{seconds}", "--concurrency", "96"], timeout_s)
        rate = full.calls / full.elapsed_s
        steady = _load(
            server.target, "minilm", ["--seconds", f"{seconds}", "--rate", f"{rate * 0.5:.1f}"], timeout_s
        )
        bursts = _load(server.target, "minilm", ["--seconds", f"{seconds}", "--burst", "64"], timeout_s)
    figures = [
        Figure(
            experiment="predict over gRPC",
            shape="minilm, 16 tokens",
            name="texts by second, 96 calls at a time",
            value=rate,
            unit="/s",
            target=min(TEXTS_TARGET, limit) if limit < TEXTS_TARGET else TEXTS_TARGET,
            other=limit,
            other_name="/s by the machine's matrix rate",
            note=f"{cores} cores for server and load",
        ),
        *_latencies("minilm, 16 tokens", {"steady, half the rate": steady, "bursts of 64": bursts}),
    ]
    return figures, {"full": full, "steady": steady, "bursts": bursts}


def measure_features(*, seconds: float, num_loads: int, folder: Path, timeout_s: float) -> Outcome:
    """Return what the built-in stateful encoder answers by second of processor time, and latencies."""
    with serve("builtin", ["--threads", "1"], log=folder / "server.log", timeout_s=timeout_s) as server:
        load = ["--features", "32", "--seconds", f"{seconds}", "--concurrency", "32"]
        with ThreadPoolExecutor(num_loads) as pool:
            before, started = _cpu_s(server.process.pid), time.perf_counter()
            loads = [
                pool.submit(_load, server.target, FEATURES_MODEL, [*load, "--seed", str(seed)], timeout_s)
                for seed in range(num_loads)
            ]
            runs = [each.result() for each in loads]
            elapsed, used = time.perf_counter() - started, _cpu_s(server.process.pid) - before
        calls = sum(run.calls for run in runs)
        # The warm-up used processor time as well and is not among the calls: the figure is on the low side.
        rate = calls / used
        by_clock = sum(run.calls / run.elapsed_s for run in runs)
        steady = _load(
            server.target,
            FEATURES_MODEL,
            ["--features", "32", "--seconds", f"{seconds}", "--rate", f"{by_clock * 0.4:.1f}"],
            timeout_s,
        )
        bursts = _load(
            server.target,
            FEATURES_MODEL,
            ["--features", "32", "--seconds", f"{seconds}", "--burst", "128"],
            timeout_s,
        )
    figures = [
        Figure(
            experiment="stateful encoder over gRPC",
            shape="32 features, one row a call",
            name="calls by second of one core's time",
            value=rate,
            unit="/s",
            target=FEATURES_TARGET,
            ours=by_clock,
            other_name="",
            note="'ours' by the clock; processor time of all of the server's processes, warm-up included",
        ),
        *_latencies("32 features", {"steady, 0.4 of that rate": steady, "bursts of 128": bursts}),
    ]
    return figures, {"runs": runs, "cpu_s": used, "elapsed_s": elapsed, "steady": steady, "bursts": bursts}


def measure_first_answer(*, repeats: int, folder: Path, timeout_s: float) -> Outcome:
    """Return the time from asking for a model of 100 MB to its first answer, over reading and building it."""
    model = write_encoder(ENCODERS["hundred-megabytes"], folder / "hundred")
    size = (model / "model.safetensors").stat().st_size
    took = []
    arguments = ["--predict-models", f"hundred={model}", "--threads", "1"]
    with serve("builtin", arguments, log=folder / "server.log", timeout_s=timeout_s) as server:
        client = kvserve.Client(server.target)
        for _ in range(repeats + 1):
            started = time.perf_counter()
            client.models.load("hundred")
            client.predict("river", model="hundred")
            took.append(time.perf_counter() - started)
            client.models.unload("hundred")
    alone = run_json(["loadgen.experiments.predict_models", str(model)], timeout_s=timeout_s)
    least = statistics.median(run["read_s"] + run["build_s"] for run in alone[1:])
    ours = statistics.median(took[1:])
    figure = Figure(
        experiment="from file to answer",
        shape=f"{size / 1e6:.0f} MB",
        name="load and first answer over read and build",
        value=ours / least,
        unit="x",
        target=LOAD_TARGET,
        lower_is_better=True,
        ours=ours,
        other=least,
        other_name="s to read the file and build the module",
        note=f"first of all: {took[0]:.3f} s",
    )
    return [figure], {"took_s": took, "alone": alone, "bytes": size}


def _load(target: str, model: str, arguments: list[str], timeout_s: float) -> LoadReport:
    said = run_json(
        ["loadgen.predict_load", "--target", target, "--model", model, *arguments], timeout_s=timeout_s
    )
    return msgspec.convert(said, LoadReport)


def _latencies(shape: str, runs: dict[str, LoadReport]) -> list[Figure]:
    return [
        Figure(
            experiment="predict latency",
            shape=shape,
            name=name,
            value=run.p50_s * 1e3,
            unit="ms median",
            note=(
                f"p95 {run.p95_s * 1e3:.2f} ms, p99 {run.p99_s * 1e3:.2f} ms, "
                f"{run.calls} calls, {run.failed} failed"
            ),
        )
        for name, run in runs.items()
    ]


def _cpu_s(pid: int) -> float:
    """Return the processor time of a process and its children."""
    import psutil  # of the extra `dev`

    parent = psutil.Process(pid)
    total = 0.0
    for process in (parent, *parent.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total
