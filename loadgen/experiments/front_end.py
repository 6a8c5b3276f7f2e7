"""The front end alone: tokens a second that it streams on one core, with nothing behind it."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loadgen.experiments.figures import Figure
from loadgen.experiments.processes import LineProcess, run_loadgen

__all__ = ["measure_front_end"]

TARGET_TOKENS_PER_S = 100_000.0


def measure_front_end(
    *, log: Path, num_loads: int, streams: int, new_tokens: int, timeout_s: float
) -> tuple[list[Figure], dict[str, object]]:
    """Return tokens by second of the server's processor time, and by second of the clock.

    The server runs on core 0 alone. Several load processes read, since one reads more slowly than the
    server writes; on a machine with few cores they compete with it, which the first figure does not see.
    """
    command = [sys.executable, "-m", "server.bench_front_end", "--core", "0"]
    with LineProcess(command, log=log) as server:
        target = f"127.0.0.1:{server.read(60.0)}"

        def cpu_s() -> float:
            server.write("cpu")
            return float(json.loads(server.read(60.0))["cpu_s"])

        def load(seed: int) -> int:
            sizes = ["--workload", "unique", "--requests", str(streams), "--own", "16"]
            rest = ["--new", str(new_tokens), "--concurrency", str(streams), "--seed", str(seed)]
            return run_loadgen(target, [*sizes, *rest], timeout_s=timeout_s).summary.generated_tokens

        with ThreadPoolExecutor(num_loads) as pool:
            list(pool.map(load, range(1)))
            before, started = cpu_s(), time.perf_counter()
            tokens = sum(pool.map(load, range(num_loads)))
            elapsed, used = time.perf_counter() - started, cpu_s() - before
    figure = Figure(
        experiment="front end alone",
        shape="",
        name="tokens by second of one core's time",
        value=tokens / used,
        unit="tokens/s",
        target=TARGET_TOKENS_PER_S,
        ours=tokens / elapsed,
        other=TARGET_TOKENS_PER_S,
        other_name="asked",
        note=f"'ours' by the clock, starting {num_loads} load processes included; {streams} streams each",
    )
    return [figure], {"tokens": tokens, "cpu_s": used, "elapsed_s": elapsed}
