"""Time and space: taking blocks back from entries that nobody holds.

Four ways lead out of the tree, and every one ends in ``remove``: eviction (a block is needed), expiry
(the lifetime is over), pruning (a lease ends and must leave nothing, or nothing new, behind), clearing.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvcore.blocks import BlockId, BlockPool
from kvcore.clock import Clock
from kvcore.counters import CacheCounters
from kvcore.cursors import CursorBoard
from kvcore.errors import OutOfBlocks
from kvcore.events import CacheListener, LeaveCause
from kvcore.heat import add_heat
from kvcore.lanes import Canary, EvictionLanes, Victim
from kvcore.lease import Lease
from kvcore.node import Node, NodeState
from kvcore.pins import PinBook
from kvcore.policies import EvictionPolicy
from kvcore.queues import ExpiryQueue
from kvcore.quotas import Quotas
from kvcore.spaces import Space, Totals
from kvcore.tails import TailStore
from kvcore.tree import PrefixTree

__all__ = ["Reclaimer"]

MAX_EXPIRIES_PER_SWEEP = 256

_BY_POLICY = (LeaveCause.CAPACITY, LeaveCause.QUOTA)
"""Causes for which a policy chose what goes."""


class Reclaimer:
    """Owns the two orders in which entries leave, and the act of removing them."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        tree: PrefixTree,
        tails: TailStore,
        board: CursorBoard,
        counters: CacheCounters,
        clock: Clock,
        lanes: EvictionLanes,
        pins: PinBook,
        quotas: Quotas,
    ) -> None:
        self._pool = pool
        self._tree = tree
        self._tails = tails
        self._board = board
        self._counters = counters
        self._clock = clock
        self._lanes = lanes
        self._pins = pins
        self._quotas = quotas
        self._expiry = ExpiryQueue()
        self.listeners: list[CacheListener] = []

    @property
    def num_available(self) -> int:
        """Return how many blocks can be had right now: free ones and evictable ones."""
        return self._pool.num_free + self._tree.num_evictable

    def take(self, count: int, space: Space) -> list[BlockId]:
        """Take blocks for a namespace, evicting as many as are missing, its own first if it has too many.

        ``OutOfBlocks``, nothing changed, if it cannot.
        """
        if count > self.num_available:
            raise OutOfBlocks(needed=count, available=self.num_available)
        excess = self._quotas.excess(space, count) if self._quotas.is_any else 0
        missing = count - self._pool.num_free
        if missing > 0 and excess:
            missing -= self._evict_of(space, min(missing, excess), self._clock.now())
        if missing > 0:
            self.evict(missing)
        if excess:
            self._quotas.over[space] = None
        return self._pool.take(count)

    def evict(self, count: int) -> None:
        """Evict ``count`` blocks, leaves before parents. ``OutOfBlocks``, nothing changed, if it cannot."""
        if count > self._tree.num_evictable:
            raise OutOfBlocks(needed=count, available=self._tree.num_evictable)
        now = self._clock.now()
        if self._quotas.over:
            count -= self._evict_over_quota(count, now)
        for _ in range(count):
            self._evict_one(self._lanes.pop(now))

    def watch_lifetime(self, node: Node) -> None:
        """See to it that a node goes when its lifetime is over."""
        if node.expires_at is not None:
            self._expiry.add(node, node.expires_at)

    def sweep_expired(self) -> int:
        """Free entries whose lifetime is over and that nobody holds; return how many. Bounded per call."""
        now, freed = self._clock.now(), 0
        self._pins.sweep(now)
        for _ in range(MAX_EXPIRIES_PER_SWEEP):
            node = self._expiry.pop_due(now)
            if node is None:
                break
            freed += self._remove_subtree(node)
        self._expiry.compact(self._tree.num_nodes)
        return freed

    def drop(self, node: Node) -> None:
        """Remove a hold; what it alone kept can be evicted from now on."""
        if self._tree.drop(node):
            self._lanes.offer(node)

    def count_inserted(self, node: Node, *, restored: int = 0) -> None:
        """Count a shared block whose first slot was filled, by a step or (``restored``: 1) from a tier."""
        if node.owner is None:
            self._counters.inserted_blocks += 1
            node.space.totals.inserted_blocks += 1
            node.space.totals.restored_blocks += restored

    def entered(self, node: Node) -> None:
        """A full block that anybody may find is in the tree now: tell the policy, and those who wait."""
        self._lanes.policy_of(node.space).inserted(node, self._clock.now())
        self._board.published(node.real_parent(), node)

    def offer(self, node: Node) -> None:
        """See to it that a node which has changed its kind (pinned, released) leaves in its new order."""
        self._lanes.offer(node)

    def remove(self, node: Node, cause: LeaveCause) -> None:
        """Take an unheld, childless node out of the tree, with all that hangs at it, and free its block."""
        parent = node.real_parent()
        self._pool.give_back([self.detach(node, cause)])
        self._lanes.offer(parent)
        self._lanes.compact(self._tree.num_nodes, node.space)

    def detach(self, node: Node, cause: LeaveCause) -> BlockId:
        """Take an unheld, childless node out of the tree, with all that hangs at it; return its block."""
        parent = node.real_parent()
        for listener in self.listeners:
            listener.leaving(node, cause)
        if node.pin is not None:
            self._pins.end(node.pin)
        if node.owner is None and node.inserted_at is not None:
            self._count(node.space.totals, cause)
            if node.state is not NodeState.OPEN or node.mark is not None:
                policy = self._lanes.policy_of(node.space)
                policy.removed(node, self._clock.now(), evicted=cause in _BY_POLICY)
            parent.heat = add_heat(parent.heat, node.heat)
        self._tails.remove_all(node)
        self._board.removed(node, parent)
        return self._tree.remove(node)

    def remove_unheld(self, nodes: Iterable[Node], cause: LeaveCause) -> list[Node]:
        """Remove those of ``nodes`` that nobody holds, unless something hangs below; return the others."""
        kept = []
        for node in sorted(nodes, key=lambda n: -n.depth):
            if node.parent is None:
                continue
            if node.num_children or node.is_busy:
                kept.append(node)
            else:
                self.remove(node, cause)
        return kept

    def prune(self, lease: Lease) -> None:
        """Remove what a lease that has just ended must not leave behind, or need not."""
        self._prune_expired(lease)
        self._prune_end(lease)

    def clear(self) -> int:
        """Remove every entry that nobody holds; return how many blocks that freed."""
        before = self._pool.num_free
        self.remove_unheld(self._tree.iterate(), LeaveCause.ADMIN)
        self._tails.clear()
        self._tree.drop_empty_roots()
        return self._pool.num_free - before

    def rebuild(self, policy: EvictionPolicy, canary: Canary | None) -> None:
        """Let other policies judge from now on."""
        self._lanes.rebuild(policy, canary, self._tree.iterate())

    def _evict_over_quota(self, count: int, now: float) -> int:
        """Evict at most ``count`` blocks of namespaces over their limits, the most first; return how many."""
        evicted, quotas = 0, self._quotas
        for space in sorted(quotas.over, key=quotas.excess, reverse=True):
            evicted += self._evict_of(space, min(count - evicted, quotas.excess(space)), now)
            if not quotas.excess(space):
                del quotas.over[space]
        return evicted

    def _evict_of(self, space: Space, count: int, now: float) -> int:
        """Evict at most ``count`` blocks of one namespace, none in use or pinned; return how many."""
        for evicted in range(count):
            victim = self._lanes.pop_of(space, now)
            if victim is None:
                return evicted
            self._evict_one(victim)
        return count

    def _evict_one(self, victim: Victim) -> None:
        pin = victim.node.pin
        if pin is not None:
            self._pins.shrink(pin)
        self.remove(victim.node, victim.cause)

    def _prune_expired(self, lease: Lease) -> None:
        """Remove what became unreachable while it was held."""
        now = self._clock.now()
        for node in lease.nodes:
            if node.expires_at is not None and node.expires_at <= now and node.parent is not None:
                self._remove_subtree(node)
                return

    def _prune_end(self, lease: Lease) -> None:
        """Remove private blocks, and an OPEN block whose content a sibling has, too."""
        for node in reversed(lease.nodes):
            if node.parent is None:
                continue
            is_useless = node.owner is not None or (node.state is NodeState.OPEN and self._is_covered(node))
            if not is_useless or node.num_children or node.is_busy:
                return
            self.remove(node, LeaveCause.DISCARDED)

    def _remove_subtree(self, top: Node) -> int:
        """Remove whatever of an expired subtree nobody holds; return how many blocks that freed."""
        order, stack = [], [top]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(node.children.values())
            stack.extend(node.open_children)
        for node in order if len(self._pins) else ():
            if node.pin is not None:  # its content cannot be found any more
                self._pins.end(node.pin)
        before = self._pool.num_free
        for node in reversed(order):
            if not node.num_children and not node.is_busy:
                self.remove(node, LeaveCause.EXPIRED)
        return self._pool.num_free - before

    def _count(self, totals: Totals, cause: LeaveCause) -> None:
        if cause is LeaveCause.EXPIRED:
            totals.expired_blocks += 1
            self._counters.expired_blocks += 1
        elif cause is LeaveCause.DISCARDED:
            totals.discarded_blocks += 1
        else:
            totals.evicted_blocks[cause] = totals.evicted_blocks.get(cause, 0) + 1
            by_cause = self._counters.evicted_by_cause
            by_cause[cause] = by_cause.get(cause, 0) + 1
            self._counters.evicted_blocks += 1

    def _is_covered(self, node: Node) -> bool:
        """Say whether a sibling holds everything that an OPEN node holds."""
        if not node.packed:
            return True
        parent, now = node.real_parent(), self._clock.now()
        sibling, length = self._tree.find_partial(parent, node.packed, node.owner, now, excluding=node)
        return sibling is not None and length == len(node.tokens)
