"""Least recently used: the rank is the logical time of the last touch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcore.node import Node

__all__ = ["lru"]


def lru(node: Node) -> float:
    """Rank by recency. A lease touches its whole path, so a parent is never older than its children."""
    return node.last_used
