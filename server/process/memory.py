"""How much memory a process can still take."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_host_bytes"]


def available_host_bytes() -> int:
    """Return how much memory this process can still take, of the machine or of its cgroup."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) << 10
    except OSError:
        pass  # not Linux: half of the machine's memory stands in
    limit = _read_number("/sys/fs/cgroup/memory.max")
    used = _read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        # Pages of cached files count as used but give way.
        available = min(available, limit - used + _cgroup_file_bytes())
    return max(0, available)


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_file_bytes() -> int:
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
