"""Eviction policies: one function each.

A policy gives a cached block a rank; the lowest rank among the evictable leaves goes first. A rank may
only rise, and only when the node is touched: the eviction heap is lazy and relies on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcore.policies.lru import lru

if TYPE_CHECKING:
    from kvcore.node import Node

__all__ = ["EvictionPolicy", "lru"]

EvictionPolicy = Callable[["Node"], float]
