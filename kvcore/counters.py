"""What the cache counts. All run from its start."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CacheCounters"]


@dataclass(slots=True)
class CacheCounters:
    """Shared blocks by what happened to them; ``kvcore.spaces`` has them by namespace and cause."""

    inserted_blocks: int = 0
    """Such as got their first slot filled."""
    evicted_blocks: int = 0
    """By whatever cause, an operator's wish too."""
    evicted_by_cause: dict[str, int] = field(default_factory=dict)
    expired_blocks: int = 0
