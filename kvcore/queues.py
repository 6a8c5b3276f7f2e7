"""The two orders in which entries leave: by worth (eviction) and by time (expiry).

Both are lazy heaps: entries are not moved when a node changes, they are checked when they surface. Dead
entries are swept out when they outnumber the living, so memory follows the tree's size.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from kvcore.node import Node
    from kvcore.policies.interface import Entry, EvictionPolicy

    class Leaf(Entry, Protocol):
        """What the eviction queue reads of a node, besides what the policy does."""

        @property
        def is_busy(self) -> bool: ...

        @property
        def cursors(self) -> object: ...


__all__ = ["EvictionQueue", "ExpiryQueue"]

SLACK = 1024
"""Dead entries tolerated before a heap is rebuilt, beyond its living ones."""

MAX_SPARED = 16
"""How many blocks that requests wait for are passed over for one that nobody waits for."""


LeafT = TypeVar("LeafT", bound="Leaf")

Expiring = tuple[float, int, "Node"]


class EvictionQueue(Generic[LeafT]):
    """Evictable leaves, one heap for each of the policy's groups.

    A leaf is listed once: offered again, as at the end of each use, it gets the place that it has now,
    and its old heap entry is dead.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._heaps: list[list[tuple[float, int, int, LeafT]]] = [[] for _ in range(policy.num_groups)]
        self._num_pushed = 0
        self._listed: dict[LeafT, tuple[float, int, int, LeafT]] = {}
        """The heap entry that counts, for each listed leaf."""
        self._ranking: list[tuple[float, int, int]] = []
        self._ranked: list[int] = []
        """For each group the number of the head that was ranked last."""
        self._unranked: set[int] = set()
        self._ranked_at, self._ranked_epoch = 0.0, -1

    def __len__(self) -> int:
        return sum(map(len, self._heaps))

    def __contains__(self, node: LeafT) -> bool:
        return node in self._listed

    @property
    def policy(self) -> EvictionPolicy:
        return self._policy

    def offer(self, node: LeafT) -> None:
        """List a node in its present place if it is an evictable leaf now; otherwise do nothing."""
        if not (node.is_root or node.num_children or node.is_busy):
            self._push(node)

    def pop(self, now: float) -> LeafT:
        """Remove and return the evictable leaf of least worth. Raises ``IndexError`` if there is none.

        Leaves at which waiting requests are parked are spared, as long as others come soon after.
        """
        chosen = self._pop_least(now)
        if chosen is not None and chosen.cursors:
            chosen = self._pop_unawaited(chosen, now)
        if chosen is None:
            raise IndexError("nothing can be evicted")
        return chosen

    def rebuild(self, policy: EvictionPolicy, leaves: Iterable[LeafT]) -> None:
        """Go on with another policy, which has seen none of these: list the evictable of ``leaves`` anew."""
        self._policy = policy
        self._heaps = [[] for _ in range(policy.num_groups)]
        self._listed.clear()
        self._ranked_epoch = -1
        self._unranked.clear()
        for leaf in leaves:
            self.offer(leaf)

    def compact(self, num_living: int) -> None:
        """Drop dead entries once they outnumber ``num_living`` by ``SLACK``."""
        if len(self) <= 2 * num_living + SLACK:
            return
        self._listed = {node: e for node, e in self._listed.items() if node.parent is not None}
        self._heaps = [[e for e in heap if self._listed.get(e[3]) is e] for heap in self._heaps]
        for heap in self._heaps:
            heapq.heapify(heap)
        self._ranked_epoch = -1

    def _push(self, node: LeafT) -> None:
        policy = self._policy
        order = policy.order(node)
        listed = self._listed.get(node)
        if listed is not None and listed[0] == order and policy.num_groups == 1:
            return
        self._num_pushed += 1  # so that no comparison ever reaches the node
        self._listed[node] = entry = (order, node.serial, self._num_pushed, node)
        group = policy.group_of(node)
        heap = self._heaps[group]
        heapq.heappush(heap, entry)
        if policy.num_groups > 1 and heap[0] is entry:
            self._unranked.add(group)

    def _pop_unawaited(self, chosen: LeafT, now: float) -> LeafT:
        """Return another leaf than ``chosen``, for which a request waits, if one comes soon after."""
        spared = [chosen]
        while (other := self._pop_least(now)) is not None:
            if not other.cursors:
                break
            spared.append(other)
            if len(spared) > MAX_SPARED:
                other = None
                break
        if other is None:  # somebody waits for all of them
            other = spared.pop(0)
        for node in spared:
            self._push(node)
        return other

    def _pop_least(self, now: float) -> LeafT | None:
        """Take the leaf of least worth off the list and return it."""
        policy = self._policy
        has_several = policy.num_groups > 1
        if has_several and not self._is_ranked(now):
            self._rank(now)
        while True:
            group = self._least_group(now) if has_several else self._only_group()
            if group is None:
                return None
            head = heapq.heappop(self._heaps[group])[3]  # settled: the group was just looked at
            del self._listed[head]
            if has_several:
                self._unranked.add(group)  # later, when the leaf's parent may have become the head
            if not policy.gives_rounds or not policy.gets_another_round(head):
                return head
            self._push(head)

    def _only_group(self) -> int | None:
        return None if self._settled_head(0) is None else 0

    # Of several groups, ``_ranking`` is a heap of (worth, group, head). What was said of another head than
    # the present one is dead, and every change of a head is followed by a new entry.

    def _is_ranked(self, now: float) -> bool:
        if self._ranked_epoch != self._policy.epoch:
            return False
        return self._ranked_at <= now <= self._ranked_at + self._policy.worth_lifetime_s

    def _rank(self, now: float) -> None:
        """Ask for the worth of every group's head."""
        self._ranking.clear()
        self._ranked = [0] * len(self._heaps)
        self._ranked_at, self._ranked_epoch = now, self._policy.epoch
        for group, heap in enumerate(self._heaps):
            if heap:
                self._rank_group(group, now)

    def _rank_group(self, group: int, now: float) -> None:
        head = self._settled_head(group)
        if head is None:
            return
        number = self._heaps[group][0][2]
        if self._ranked[group] != number:
            self._ranked[group] = number
            heapq.heappush(self._ranking, (self._policy.worth(group, head, now), group, number))

    def _least_group(self, now: float) -> int | None:
        """Return the group whose head is worth least."""
        ranking = self._ranking
        while True:
            while self._unranked:
                self._rank_group(self._unranked.pop(), now)
            if not ranking:
                return None
            _, group, number = ranking[0]
            if self._settled_head(group) is not None and self._heaps[group][0][2] == number:
                return group
            heapq.heappop(ranking)
            if self._ranked[group] == number:
                self._ranked[group] = 0
                self._unranked.add(group)

    def _settled_head(self, group: int) -> LeafT | None:
        """Return the head of a group that is true now, after moving those that are not."""
        heap, policy, listed = self._heaps[group], self._policy, self._listed
        while heap:
            entry = heap[0]
            node = entry[3]
            if listed.get(node) is not entry:
                heapq.heappop(heap)
            elif node.parent is None or node.num_children or node.is_busy:
                heapq.heappop(heap)
                del listed[node]
            elif policy.group_of(node) != group or policy.order(node) > entry[0]:
                heapq.heappop(heap)
                self._push(node)
            else:
                return node
        return None


class ExpiryQueue:
    """Entries with a lifetime, the first to expire first."""

    def __init__(self) -> None:
        self._heap: list[Expiring] = []

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
