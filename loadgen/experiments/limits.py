"""What this machine can do at best: bytes read a second, operations a second. As a process of its own.

    python -m loadgen.experiments.limits

Prints one JSON object. Bandwidth is read with all cores, each reading one or several arrays that no cache
holds; the best of several kernels and repeats counts, since a limit that is too low flatters.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch
from torch.nn import functional

from loadgen.experiments.machine import Limits

__all__ = ["main"]


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Return the shortest time of several runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def read_bandwidth(cores: int, bytes_per_core: int, repeats: int) -> tuple[float, str]:
    """Return the bytes read a second by all cores at once, and how."""
    torch.set_num_threads(1)
    count = bytes_per_core // 4
    arrays = [torch.ones(count) for _ in range(cores)]
    quarters = [array.view(4, -1) for array in arrays]
    kernels: dict[str, Callable[[int], object]] = {
        "sum, 1 stream a core": lambda core: arrays[core].sum(),
        "dot, 2 streams a core": lambda core: torch.dot(
            quarters[core][:2].flatten(), quarters[core][2:].flatten()
        ),
        "maximum, 1 stream a core": lambda core: arrays[core].max(),
        "sum, 4 streams a core": lambda core: quarters[core].sum(dim=0)[0],
    }
    best, best_name = 0.0, ""
    with ThreadPoolExecutor(cores) as pool:
        for name, kernel in kernels.items():
            elapsed = best_of(repeats, lambda kernel=kernel: list(pool.map(kernel, range(cores))))  # type: ignore[misc]
            if (rate := cores * count * 4 / elapsed) > best:
                best, best_name = rate, name
    return best, best_name


def matrix_rate(cores: int, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Return the operations a second of a square matrix product."""
    torch.set_num_threads(cores)
    left, right = torch.ones(size, size).to(dtype), torch.ones(size, size).to(dtype)
    return 2 * size**3 / best_of(repeats, lambda: functional.linear(left, right))


def main(arguments: list[str] | None = None) -> int:
    """Print the limits."""
    parser = argparse.ArgumentParser(description="Measure read bandwidth and matrix rates.")
    parser.add_argument("--mib-per-core", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    cores = available_cores()
    rate, kernel = read_bandwidth(cores, options.mib_per_core << 20, options.repeats)
    limits = Limits(
        cores=cores,
        torch_version=str(torch.__version__),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        read_bytes_per_s=rate,
        read_kernel=kernel,
        float32_flops=matrix_rate(cores, torch.float32, 1024, options.repeats),
        bfloat16_flops=matrix_rate(cores, torch.bfloat16, 1024, options.repeats),
    )
    print(msgspec.json.encode(limits).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
