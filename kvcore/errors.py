"""What can go wrong in the cache.

::

    CacheError
    ├── OutOfBlocks       the pool cannot provide; nothing was changed
    └── IntegrityError    an invariant is broken: a bug, never a condition to handle
"""

from __future__ import annotations

__all__ = ["CacheError", "IntegrityError", "OutOfBlocks"]


class CacheError(Exception):
    """Base of all errors of the cache."""


class OutOfBlocks(CacheError):
    """More blocks were asked for than are free or evictable. Nothing was changed."""

    def __init__(self, *, needed: int, available: int) -> None:
        super().__init__(f"{needed} blocks needed, {available} available")
        self.needed = needed
        self.available = available


class IntegrityError(CacheError):
    """An invariant of the cache does not hold."""
