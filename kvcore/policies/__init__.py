"""Eviction policies, one small module each, and the table of their names.

A policy object is made per cache (per canary, per ghost) with ``make_policy`` and shared with nobody.
See ``kvcore.policies.interface`` for what a policy is told and asked.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvcore.policies.arc import ArcPolicy
from kvcore.policies.fifo import FifoPolicy
from kvcore.policies.foresight import ForesightPolicy
from kvcore.policies.greedy import CostAwarePolicy, LfuPolicy
from kvcore.policies.interface import Entry, EvictionPolicy
from kvcore.policies.lru import LruPolicy
from kvcore.policies.s3fifo import S3FifoPolicy

__all__ = ["POLICIES", "ALIASES", "Entry", "EvictionPolicy", "ForesightPolicy", "LruPolicy", "make_policy"]

_CLASSES: Mapping[str, type[EvictionPolicy]] = {
    c.name: c
    for c in (LruPolicy, LfuPolicy, FifoPolicy, S3FifoPolicy, ArcPolicy, CostAwarePolicy, ForesightPolicy)
}

POLICIES: Mapping[str, str] = {name: c.description for name, c in _CLASSES.items()}
"""The names of the policies, each with one line for people who choose."""

ALIASES: Mapping[str, str] = {"best": "foresight"}


def make_policy(name: str, *, capacity_blocks: int, block_tokens: int = 16) -> EvictionPolicy:
    """Make a policy object for a cache of so many blocks. ``ValueError`` names those that exist."""
    found = _CLASSES.get(ALIASES.get(name, name))
    if found is None:
        raise ValueError(f"no policy is called {name!r}; there are: {', '.join(POLICIES)}")
    return found(capacity_blocks=capacity_blocks, block_tokens=block_tokens)
