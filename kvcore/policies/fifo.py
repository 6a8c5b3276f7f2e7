"""First in, first out: the order is that of creation, whatever is used."""

from __future__ import annotations

from kvcore.policies.interface import Entry, EvictionPolicy

__all__ = ["FifoPolicy"]


class FifoPolicy(EvictionPolicy):
    """Rank by age in the cache."""

    name = "fifo"
    description = "first in, first out: what was computed first goes first, used or not"

    def order(self, entry: Entry) -> float:
        return entry.serial
