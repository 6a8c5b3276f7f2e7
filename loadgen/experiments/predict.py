"""Predict: calls a second over gRPC, latencies, processor time by call, and the way from file to answer."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

import kvserve
from loadgen.experiments.figures import Figure
from loadgen.experiments.predict_models import ENCODERS, write_encoder
from loadgen.experiments.processes import run_json, run_module, serve
from loadgen.predict_load import LoadReport

__all__ = ["measure_encoder", "measure_features", "measure_first_answer", "measure_texts"]

MATRIX_RATE_TARGET = 0.75
ONE_BY_ONE_TARGET = 4.0
FEATURES_TARGET = 3000.0
TEXTS_TARGET = 1000.0
LOAD_TARGET = 1.5
FEATURES_MODEL = "builtin-encoder"

Outcome = tuple[list[Figure], dict[str, object]]


def measure_encoder(shape: str, dtype: str, *, folder: Path, timeout_s: float) -> Outcome:
    """Return how near the encoder comes to its bare matrix products, and to transformers; no server.

    Raises ``ProcessFailed``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{shape}-{dtype}.json"
    arguments = ["--shape", shape, "--dtype", dtype, "--json", str(file)]
    run_module(["server.worker.predict.bench", *arguments], timeout_s=timeout_s)
    said: dict[str, Any] = msgspec.json.decode(file.read_bytes())
    cases = {case["name"]: case for case in said["cases"]}
    spread = next(case for name, case in cases.items() if name.startswith("spread"))
    return [
        *_product_figures(shape, dtype, spread),
        *_peer_figures(shape, dtype, spread, cases["short"]),
    ], said


def _product_figures(shape: str, dtype: str, case: dict[str, Any]) -> list[Figure]:
    rate = case["product_operations"] / case["encoder_s"] / 1e9
    shares = {"products": "products", "attention": "attention", "elementwise": "norm and activation"}
    rest = ", ".join(f"{text} {case[f'{part}_share']:.0%}" for part, text in shares.items())
    figures = []
    for name, seconds in (
        (f"torch's, {dtype}", case["torch_products_s"]),
        ("torch's, float32", case["torch_float32_products_s"]),
        ("our own", case["own_products_s"]),
    ):
        figures.append(
            Figure(
                experiment="encoder",
                shape=f"{shape}, {dtype}, 8 to 256 tokens",
                name=f"rate over the bare matrix products, {name}",
                value=seconds / case["encoder_s"],
                unit="",
                target=MATRIX_RATE_TARGET,
                ours=rate,
                other=case["product_operations"] / seconds / 1e9,
                other_name="GFLOP/s",
                note=f"of the time: {rest}",
            )
        )
    return figures[1:] if dtype == "float32" else figures


def _peer_figures(shape: str, dtype: str, spread: dict[str, Any], short: dict[str, Any]) -> list[Figure]:
    peers = {
        "transformers_one_by_one_s": "float32, one by one",
        "transformers_own_type_one_by_one_s": f"{dtype}, one by one",
        "transformers_padded_s": "float32, padded and sorted",
    }
    return [
        Figure(
            experiment="encoder",
            shape=f"{shape}, {dtype}, {text}",
            name=f"over transformers, {peer}",
            value=case[field] / case["encoder_s"],
            unit="x",
            target=ONE_BY_ONE_TARGET if field.endswith("one_by_one_s") else None,
        )
        for case, text in ((spread, "8 to 256 tokens"), (short, "64 inputs of 16 tokens"))
        for field, peer in peers.items()
        if dtype != "float32" or field != "transformers_own_type_one_by_one_s"
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
    """Return what the built-in stateful encoder answers by second of processor time, and latencies.

    Beside it what a bare method of grpcio's asyncio server takes here: no server in Python takes less.
    """
    floor = run_json(["loadgen.experiments.bare_grpc", "--seconds", f"{seconds / 2}"], timeout_s=timeout_s)
    details: dict[str, object] = {"bare": floor}
    figures = []
    with serve("builtin", ["--threads", "1"], log=folder / "server.log", timeout_s=timeout_s) as server:

        def load(*arguments: str) -> LoadReport:
            return _load(server.target, FEATURES_MODEL, ["--features", "32", *arguments], timeout_s)

        span = ["--seconds", f"{seconds}", "--warm-up", "0.1"]
        by_clock = 0.0
        for kind, rows, arguments in (
            ("stream", 1, ["--stream", "--concurrency", "64"]),
            ("unary", 64, ["--concurrency", "8", "--rows", "64"]),
            ("unary", 1, ["--concurrency", "32"]),
        ):
            with ThreadPoolExecutor(num_loads) as pool:
                before = _cpu_s(server.process.pid)
                seeds = [("--seed", str(seed)) for seed in range(num_loads)]
                runs = list(pool.map(lambda seed: load(*span, *arguments, *seed), seeds))  # noqa: B023
                used = _cpu_s(server.process.pid) - before
            calls = sum(run.calls for run in runs)
            by_clock = sum(run.calls / run.elapsed_s for run in runs)
            details[f"{kind}, {rows}"] = {"runs": runs, "cpu_s": used}
            figures.append(
                Figure(
                    experiment="stateful encoder over gRPC",
                    shape=f"32 features, {kind}, {rows} row{'s' * (rows > 1)} a request",
                    name="rows by second of one core's time",
                    value=rows * calls / used,
                    unit="/s",
                    target=FEATURES_TARGET if rows == 1 else None,
                    ours=rows * by_clock,
                    other=rows * floor[kind],
                    other_name="/s if a bare method were all",
                    note="'ours' by the clock; time of all of the server's processes, warm-up included",
                )
            )
        steady = load(*span, "--rate", f"{by_clock * 0.4:.1f}")
        bursts = load(*span, "--burst", "128")
    figures += _latencies("32 features", {"steady, 0.4 of the unary rate": steady, "bursts of 128": bursts})
    more, on_one_core = _measure_on_one_core(seconds=seconds, folder=folder, timeout_s=timeout_s)
    return [*figures, *more], details | {"steady": steady, "bursts": bursts, "on one core": on_one_core}


def _measure_on_one_core(*, seconds: float, folder: Path, timeout_s: float) -> Outcome:
    """Return what all of the server's processes on one core together answer, and a bare method on one.

    The load runs on the other cores; where there are none, nothing is measured.
    """
    cores = sorted(_cores())
    if len(cores) < 2:
        return [], {}
    *others, core = cores
    floor = run_json(
        ["loadgen.experiments.bare_grpc", "--seconds", f"{seconds / 2}", "--core", str(core)],
        timeout_s=timeout_s,
    )
    figures = []
    details: dict[str, object] = {"bare": floor}
    with contextlib.ExitStack() as stack:
        with _running_on({core}):
            server = stack.enter_context(
                serve("builtin", ["--threads", "1"], log=folder / "one-core.log", timeout_s=timeout_s)
            )
        stack.enter_context(_running_on(set(others)))
        for kind, arguments in (("stream", ["--stream", "--concurrency", "64"]), ("unary", [])):
            span = ["--features", "32", "--seconds", f"{seconds}", "--warm-up", "0.5"]
            run = _load(server.target, FEATURES_MODEL, [*span, *arguments], timeout_s)
            details[kind] = run
            figures.append(
                Figure(
                    experiment="stateful encoder over gRPC",
                    shape=f"32 features, {kind}, 1 row a request",
                    name="rows by second, the server's processes on one core",
                    value=run.calls / run.elapsed_s,
                    unit="/s",
                    target=FEATURES_TARGET,
                    other=floor[f"{kind}_by_clock"],
                    other_name="/s of a bare method on one core",
                    note=f"p50 {run.p50_s * 1e3:.1f} ms, p99 {run.p99_s * 1e3:.1f} ms, {run.failed} failed",
                )
            )
    return figures, details


def _cores() -> set[int]:
    """Return the cores that this process may run on; none where that cannot be said."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@contextlib.contextmanager
def _running_on(cores: set[int]) -> Iterator[None]:
    """Keep this thread, and processes that are started in it, on these cores."""
    before = _cores()
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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
            client.models.load("hundred").wait()
            client.predict("river", model="hundred")
            took.append(time.perf_counter() - started)
            client.models.unload("hundred")
    alone = run_json(["loadgen.experiments.predict_models", str(model)], timeout_s=timeout_s)
    least = statistics.median(run["read_s"] + run["build_s"] for run in alone[1:])
    lean = statistics.median(run["lean_s"] for run in alone[1:])
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
        note=f"first of all {took[0]:.3f} s; mapped and without drawing weights, building takes {lean:.3f} s",
    )
    return [figure], {"loads_s": took, "alone": alone, "bytes": size}


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
