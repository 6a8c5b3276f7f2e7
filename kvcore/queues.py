"""The two orders in which entries leave: by rank (eviction) and by time (expiry).

Both are lazy heaps: entries are not moved when a node changes, they are checked when they surface. Dead
entries are swept out when they outnumber the living, so memory follows the tree's size.
"""

from __future__ import annotations

import heapq

from kvcore.node import Node
from kvcore.policies import EvictionPolicy

__all__ = ["EvictionQueue", "ExpiryQueue"]

SLACK = 1024
"""Dead entries tolerated before a heap is rebuilt, beyond its living ones."""

MAX_SPARED = 16
"""How many blocks that requests wait for are passed over for one that nobody waits for."""


Entry = tuple[float, int, Node]


class EvictionQueue:
    """Evictable leaves, lowest rank first. A node is listed at most once."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._heap: list[Entry] = []
        self._listed: set[Node] = set()

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, node: Node) -> None:
        """List a node if it is an evictable leaf now; otherwise do nothing."""
        if node.is_root or node.num_children or node.is_busy or node in self._listed:
            return
        self._listed.add(node)
        heapq.heappush(self._heap, (self._policy(node), node.serial, node))

    def pop(self) -> Node:
        """Remove and return the evictable leaf of the lowest rank. Raises ``IndexError`` if there is none.

        Leaves at which waiting requests are parked are spared, as long as others come soon after.
        """
        spared: list[Entry] = []
        chosen = self._pop_current()
        while chosen is not None and chosen[2].cursors and len(spared) < MAX_SPARED:
            spared.append(chosen)
            chosen = self._pop_current()
        for entry in spared:
            heapq.heappush(self._heap, entry)
        if spared and (chosen is None or chosen[2].cursors):  # somebody waits for all of them
            if chosen is not None:
                heapq.heappush(self._heap, chosen)
            chosen = self._pop_current()
        if chosen is None:
            raise IndexError("nothing can be evicted")
        self._listed.discard(chosen[2])
        return chosen[2]

    def _pop_current(self) -> Entry | None:
        """Remove and return the lowest entry that is true now."""
        while self._heap:
            rank, serial, node = heapq.heappop(self._heap)
            if node.parent is None or node.num_children or node.is_busy:
                self._listed.discard(node)
                continue
            current = self._policy(node)
            if current > rank:
                heapq.heappush(self._heap, (current, serial, node))
                continue
            return rank, serial, node
        return None

    def compact(self, num_living: int) -> None:
        """Drop dead entries once they outnumber ``num_living`` by ``SLACK``."""
        if len(self._heap) <= 2 * num_living + SLACK:
            return
        self._heap = [e for e in self._heap if e[2].parent is not None]
        self._listed = {e[2] for e in self._heap}
        heapq.heapify(self._heap)


class ExpiryQueue:
    """Entries with a lifetime, the first to expire first."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, node: Node, expires_at: float) -> None:
        """List a node for its time. May be listed several times; the earliest true one counts."""
        heapq.heappush(self._heap, (expires_at, node.serial, node))

    def pop_due(self, now: float) -> Node | None:
        """Remove and return a node whose lifetime is over, or None."""
        while self._heap and self._heap[0][0] <= now:
            _, _, node = heapq.heappop(self._heap)
            if node.parent is not None and node.is_expired(now):
                return node
        return None

    def compact(self, num_living: int) -> None:
        """Drop entries of removed nodes once they outnumber ``num_living`` by ``SLACK``."""
        if len(self._heap) <= 2 * num_living + SLACK:
            return
        self._heap = [e for e in self._heap if e[2].parent is not None and e[2].expires_at == e[0]]
        heapq.heapify(self._heap)
