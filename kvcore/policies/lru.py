"""Least recently used: the order is the logical time of the last touch."""

from __future__ import annotations

from kvcore.policies.interface import Entry, EvictionPolicy

__all__ = ["LruPolicy"]


class LruPolicy(EvictionPolicy):
    """Rank by recency. A request touches its whole path, so a parent is never older than its children."""

    name = "lru"
    description = "least recently used: what nobody has asked for in the longest time goes first"

    def order(self, entry: Entry) -> float:
        return entry.last_used
