"""What can go wrong with tiers before and around their work. At work they count faults, and raise none.

::

    CacheError
    ├── TierStartError    a tier cannot be opened as it is configured: for the operator, at start
    └── SnapshotError     a snapshot cannot be written or read, or its name is refused
"""

from __future__ import annotations

from kvcore.errors import CacheError

__all__ = ["SnapshotError", "TierStartError"]


class TierStartError(CacheError):
    """A tier cannot start. The message names the tier, the cause and what to do; it goes to no client."""

    def __init__(self, tier: str, reason: str) -> None:
        super().__init__(f"{tier} tier: {reason}")
        self.tier = tier
        self.reason = reason


class SnapshotError(CacheError):
    """A snapshot as a whole is refused or broken. Single objects of it fail by themselves."""
