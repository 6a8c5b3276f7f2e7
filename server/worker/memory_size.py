"""How many KV blocks a worker takes of the memory that there is."""

from __future__ import annotations

import torch

from server.engine.options import EngineOptions
from server.process.memory import available_host_bytes
from server.worker.errors import WorkerStartError
from server.worker.kv_memory import KvLayout

__all__ = ["HOST_DEFAULT_TOKENS", "MIN_BLOCKS", "choose_num_blocks"]

MIN_BLOCKS = 4
HOST_DEFAULT_TOKENS = 1 << 18
_HOST_SHARE, _HOST_MAX_BYTES = 0.30, 4 << 30
_CUDA_SHARE = 0.85


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
