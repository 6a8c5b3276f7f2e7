"""What became of blocks that were fetched ahead: for waiting requests, and for sessions."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RestoreCounters"]


@dataclass(slots=True)
class RestoreCounters:
    """What became of blocks that were fetched for waiting sequences. Seconds are sums over sequences."""

    fetched_blocks: int = 0
    used_blocks: int = 0
    """There when their sequence was admitted, and before it had to be held for them."""
    late_blocks: int = 0
    """Used, but their sequence was held for them."""
    wasted_blocks: int = 0
    """Never used: the sequence went away, or they were evicted again before."""
    restore_s: float = 0.0
    hidden_s: float = 0.0
    decided_fetch: int = 0
    decided_recompute: int = 0
