"""What can go wrong in the cache.

::

    CacheError
    ├── OutOfBlocks       the pool cannot provide; nothing was changed
    ├── OverBudget        pins would cover more than they may; nothing was changed
    ├── InUse             a request or a hard pin holds what was to go; nothing was changed
    └── IntegrityError    an invariant is broken: a bug, never a condition to handle
"""

from __future__ import annotations

__all__ = ["CacheError", "InUse", "IntegrityError", "OutOfBlocks", "OverBudget"]


class CacheError(Exception):
    """Base of all errors of the cache."""


class OutOfBlocks(CacheError):
    """More blocks were asked for than are free or evictable. Nothing was changed."""

    def __init__(self, *, needed: int, available: int) -> None:
        super().__init__(f"{needed} blocks needed, {available} available")
        self.needed = needed
        self.available = available


class OverBudget(CacheError):
    """A pin would take its kind beyond its budget. Nothing was changed."""

    def __init__(self, *, needed: int, pinned: int, budget: int) -> None:
        super().__init__(f"{needed} more blocks to pin, {pinned} of {budget} are pinned")
        self.needed = needed
        self.pinned = pinned
        self.budget = budget


class InUse(CacheError):
    """Some of what was to be evicted is held by a request or a hard pin. Nothing was changed."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(f"{num_blocks} blocks are in use")
        self.num_blocks = num_blocks


class IntegrityError(CacheError):
    """An invariant of the cache does not hold."""
