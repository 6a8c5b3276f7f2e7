"""What the cache counts. All run from its start."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CacheCounters"]


@dataclass(slots=True)
class CacheCounters:
    """Blocks by what happened to them."""

    inserted_blocks: int = 0
    evicted_blocks: int = 0
    expired_blocks: int = 0
