"""What happens to cached blocks, for those who follow it: tiers, the watch, whoever comes.

A listener is called in the middle of a change. It may read the node and what is above it, keep what it
needs, and must not change the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from kvcore.node import Node
from kvcore.tails import Tail

__all__ = ["CacheListener", "LeaveCause"]


class LeaveCause(StrEnum):
    """Why a block left the cache."""

    CAPACITY = "capacity"
    """Its room was needed."""
    QUOTA = "quota"
    """Its namespace had more than its share."""
    ADMIN = "admin"
    """An operator evicted or cleared it."""
    RELEASED = "released"
    """Its room was needed, and somebody had said that it is not."""
    EXPIRED = "expired"
    """Its lifetime was over."""
    DISCARDED = "discarded"
    """Its content may not be used (a failed step), was private, or stands elsewhere, too."""

    @property
    def is_eviction(self) -> bool:
        """Say whether sound content was given up."""
        return self not in (LeaveCause.EXPIRED, LeaveCause.DISCARDED)


class CacheListener(Protocol):
    """Follows a cache. Every method is called on the cache's own thread."""

    def stored(self, nodes: Sequence[Node]) -> None:
        """Full shared blocks became READY; one lease's, parents first."""

    def tail_stored(self, tail: Tail) -> None:
        """The last logits of a shared prompt are READY."""

    def leaving(self, node: Node, cause: LeaveCause) -> None:
        """A node is about to be taken out: its parent, block, tokens and tails are still in place.

        Called for every node, private and not full ones, too; children before parents.
        """
