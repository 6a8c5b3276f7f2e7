"""Which evictable leaf goes next, where several orders apply at once.

::

    1. what namespaces hold beyond their quota            their own order                QUOTA
    2. what was released                                  least recently used            RELEASED
    3. everything else: the live policy and the canary    each nominates; see below      CAPACITY
    4. what is softly pinned                              least recently used            CAPACITY

**Canary.** A share of the namespaces, chosen by their seeds (so the same ones at every start), is judged by
a policy of its own. Two policies' worths cannot be compared, but what they are asked can: each names the
leaf that it would give up, and of the two the one that was used less recently goes. Recency is one logical
clock for all, and it is what would have divided the room between the two groups without any policy.

A leaf that changes its kind (pinned, released, reused) is offered again to the queue where it belongs now;
the other's entry is dead, which is noticed when it surfaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvcore.errors import IntegrityError
from kvcore.events import LeaveCause
from kvcore.node import Node
from kvcore.policies import EvictionPolicy, LruPolicy
from kvcore.queues import EvictionQueue
from kvcore.spaces import Space

__all__ = ["Canary", "EvictionLanes", "LaneCounts", "Victim"]


COMPACT_EVERY = 64
"""Removals between two looks at how many entries are dead."""


class Victim(NamedTuple):
    """A leaf that goes, and why."""

    node: Node
    cause: LeaveCause


@dataclass(slots=True)
class LaneCounts:
    """Prompt tokens, and those of them that were reused, since a canary began."""

    prompt_tokens: int = 0
    reused_tokens: int = 0

    @property
    def token_hit_rate(self) -> float:
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Canary:
    """A share of the namespaces under another policy."""

    def __init__(self, policy: EvictionPolicy, share: float) -> None:
        if not 0.0 < share <= 0.5:
            raise ValueError("a canary's share is above 0 and at most 0.5")
        self.share = share
        self.queue = EvictionQueue[Node](policy)
        self.counts = LaneCounts()
        self.live_counts = LaneCounts()

    def has(self, space: Space) -> bool:
        """Say whether a namespace is in the canary."""
        return space.position < self.share


class EvictionLanes:
    """All queues of evictable leaves. See the module's text."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.canary: Canary | None = None
        self._main = EvictionQueue[Node](policy)
        self._released = _by_recency(policy.capacity_blocks)
        self._soft = _by_recency(policy.capacity_blocks)
        self._num_compacted = 0
        self._own: dict[Space, EvictionQueue[Node]] = {}
        """Leaves of namespaces that have been at their quota, a second time."""

    @property
    def policy(self) -> EvictionPolicy:
        """Return the live policy."""
        return self._main.policy

    def policy_of(self, space: Space) -> EvictionPolicy:
        """Return the policy that judges a namespace's blocks."""
        canary = self.canary
        if canary is not None and canary.has(space):
            return canary.queue.policy
        return self._main.policy

    def offer(self, node: Node) -> None:
        """List a node in its present place if it is an evictable leaf now; otherwise do nothing."""
        if node.is_root or node.num_children or node.is_busy:
            return
        self._queue_of(node).offer(node)
        if self._own:
            own = self._own.get(node.space)
            if own is not None and node.pin is None:
                own.offer(node)

    def pop(self, now: float) -> Victim:
        """Take the leaf that goes next off the lists. Raises ``IndexError`` if nothing is evictable."""
        while self._released:
            node = self._pop(self._released, now)
            if node is None:
                break
            if not node.cursors:
                return Victim(node, LeaveCause.RELEASED)
            node.is_released = False  # somebody waits for it: as good as a reuse
            self.offer(node)
        node = self._nominate(now)
        if node is None:
            node = self._pop(self._soft, now)
        if node is None:
            raise IndexError("nothing can be evicted")
        return Victim(node, LeaveCause.CAPACITY)

    def pop_of(self, space: Space, now: float) -> Victim | None:
        """Take the least worthy unpinned leaf of one namespace off its list; None if there is none."""
        own = self._own.get(space)
        if own is None:
            own = self._own[space] = EvictionQueue[Node](self.policy_of(space))
            for node in _nodes_of(space):
                if node.pin is None:
                    own.offer(node)
        while True:
            try:
                node = own.pop(now)
            except IndexError:
                return None
            if node.pin is None:
                return Victim(node, LeaveCause.QUOTA)

    def rebuild(self, policy: EvictionPolicy, canary: Canary | None, nodes: Iterable[Node]) -> None:
        """Go on with other policies: list the evictable leaves among ``nodes`` anew. Evicts nothing."""
        self.canary = canary
        self._main.rebuild(policy, ())
        self._released = _by_recency(policy.capacity_blocks)
        self._soft = _by_recency(policy.capacity_blocks)
        self._own.clear()
        nodes = list(nodes)
        for node in nodes:  # what another policy, or another one of this name, has kept of it
            node.mark = None
        for node in nodes:
            self.offer(node)

    def compact(self, num_living: int, space: Space) -> None:
        """Drop dead entries where they outnumber the living, now that ``space`` has lost a node.

        Looks only now and then: dead entries cost memory, nothing else.
        """
        self._num_compacted += 1
        if self._num_compacted % COMPACT_EVERY and space.num_blocks:
            return
        self._main.compact(num_living)
        if self._released:
            self._released.compact(num_living)
        if self._soft:
            self._soft.compact(num_living)
        if self.canary is not None:
            self.canary.queue.compact(num_living)
        own = self._own.get(space) if self._own else None
        if own is not None:
            own.compact(space.num_blocks)
            if not space.num_blocks:
                del self._own[space]

    def check_integrity(self, nodes: Iterable[Node]) -> None:
        """Raise ``IntegrityError`` unless every evictable leaf is listed where it would be looked for."""
        for node in nodes:
            if node.num_children or node.is_busy:
                continue
            if node not in self._queue_of(node):
                raise IntegrityError(f"{node!r} can be evicted, but is not listed where it belongs")
            own = self._own.get(node.space)
            if own is not None and node.pin is None and node not in own:
                raise IntegrityError(f"{node!r} is missing in the list of its namespace")

    def _queue_of(self, node: Node) -> EvictionQueue[Node]:
        if node.pin is not None:
            return self._soft
        if node.is_released:
            return self._released
        canary = self.canary
        if canary is not None and canary.has(node.space):
            return canary.queue
        return self._main

    def _pop(self, queue: EvictionQueue[Node], now: float) -> Node | None:
        """Pop a leaf that still belongs into this queue; offer those that do not where they do."""
        while True:
            try:
                node = queue.pop(now)
            except IndexError:
                return None
            right = self._queue_of(node)
            if right is queue:
                return node
            right.offer(node)

    def _nominate(self, now: float) -> Node | None:
        """Return what the live policy gives up, or the canary's if that was used less recently."""
        node = self._pop(self._main, now)
        if self.canary is None:
            return node
        other = self._pop(self.canary.queue, now)
        if node is None or other is None:
            return node or other
        if other.last_used < node.last_used:
            node, other = other, node
        self._queue_of(other).offer(other)
        return node


def _by_recency(capacity_blocks: int) -> EvictionQueue[Node]:
    return EvictionQueue[Node](LruPolicy(capacity_blocks=capacity_blocks))


def _nodes_of(space: Space) -> Iterator[Node]:
    stack = [] if space.root is None else [space.root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
        stack.extend(node.open_children)
