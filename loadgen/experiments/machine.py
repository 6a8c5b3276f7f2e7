"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec

__all__ = ["Limits", "load_average", "machine_facts"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Measured limits."""

    cores: int
    torch_version: str
    torch_capability: str
    read_bytes_per_s: float
    read_kernel: str
    float32_flops: float
    bfloat16_flops: float


def load_average() -> float:
    """Return the machine's load over the last minute; -1 where nobody counts it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_facts(limits: Limits) -> dict[str, str | int | float]:
    """Return the facts that belong beside every figure."""
    return {
        "processor": _processor(),
        "system": platform.platform(),
        "cores": limits.cores,
        "python": platform.python_version(),
        "torch": limits.torch_version,
        "torch capability": limits.torch_capability,
        "read bandwidth, GB/s": limits.read_bytes_per_s / 1e9,
        "how it was read": limits.read_kernel,
        "matrix rate float32, GFLOP/s": limits.float32_flops / 1e9,
        "matrix rate bfloat16, GFLOP/s": limits.bfloat16_flops / 1e9,
        "load before": load_average(),
    }
