"""How much memory there is, and how many KV blocks of it a worker takes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from server.engine.options import EngineOptions
from server.worker.errors import WorkerStartError
from server.worker.kv_memory import KvLayout

__all__ = ["HOST_DEFAULT_TOKENS", "MIN_BLOCKS", "available_host_bytes", "choose_num_blocks"]

MIN_BLOCKS = 4
HOST_DEFAULT_TOKENS = 1 << 18
_HOST_SHARE, _HOST_MAX_BYTES = 0.30, 4 << 30
_CUDA_SHARE = 0.85


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


def choose_num_blocks(
    options: EngineOptions, layout: KvLayout, device: torch.device, *, activation_bytes: int
) -> int:
    """Return how many blocks to allocate once the model is loaded.

    Raises ``WorkerStartError`` if there is no room for ``MIN_BLOCKS``.
    """
    if options.num_blocks is not None:
        num_blocks = options.num_blocks
    else:
        budget = options.kv_memory_bytes
        if budget is None:
            budget = _free_share(device, activation_bytes)
            if device.type == "cpu":
                # A small model would take memory that nobody fills; --kv-memory asks for more than this.
                budget = min(budget, HOST_DEFAULT_TOKENS // layout.block_size * layout.bytes_per_block)
        num_blocks = budget // layout.bytes_per_block
    if num_blocks < MIN_BLOCKS:
        raise WorkerStartError(
            f"there is room for {num_blocks} KV blocks of {layout.bytes_per_block} bytes, "
            f"and at least {MIN_BLOCKS} are needed"
        )
    return num_blocks


def _free_share(device: torch.device, activation_bytes: int) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, int(free * _CUDA_SHARE) - activation_bytes)
    return min(int(available_host_bytes() * _HOST_SHARE), _HOST_MAX_BYTES)


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
