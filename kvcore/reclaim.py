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
from kvcore.lease import Lease
from kvcore.node import Node, NodeState
from kvcore.policies import EvictionPolicy
from kvcore.queues import EvictionQueue, ExpiryQueue
from kvcore.tails import TailStore
from kvcore.tree import PrefixTree

__all__ = ["Reclaimer"]

MAX_EXPIRIES_PER_SWEEP = 256


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
        policy: EvictionPolicy,
    ) -> None:
        self._pool = pool
        self._tree = tree
        self._tails = tails
        self._board = board
        self._counters = counters
        self._clock = clock
        self._eviction = EvictionQueue(policy)
        self._expiry = ExpiryQueue()

    @property
    def num_available(self) -> int:
        """Return how many blocks can be had right now: free ones and evictable ones."""
        return self._pool.num_free + self._tree.num_evictable

    def take(self, count: int) -> list[BlockId]:
        """Take blocks, evicting as many as are missing. ``OutOfBlocks``, nothing changed, if it cannot."""
        if count > self.num_available:
            raise OutOfBlocks(needed=count, available=self.num_available)
        missing = count - self._pool.num_free
        if missing > 0:
            self.evict(missing)
        return self._pool.take(count)

    def evict(self, count: int) -> None:
        """Evict ``count`` blocks, leaves before parents. ``OutOfBlocks``, nothing changed, if it cannot."""
        if count > self._tree.num_evictable:
            raise OutOfBlocks(needed=count, available=self._tree.num_evictable)
        for _ in range(count):
            self.remove(self._eviction.pop())
        self._counters.evicted_blocks += count

    def watch_lifetime(self, node: Node) -> None:
        """See to it that a node goes when its lifetime is over."""
        if node.expires_at is not None:
            self._expiry.add(node, node.expires_at)

    def sweep_expired(self) -> int:
        """Free entries whose lifetime is over and that nobody holds; return how many. Bounded per call."""
        now, freed = self._clock.now(), 0
        for _ in range(MAX_EXPIRIES_PER_SWEEP):
            node = self._expiry.pop_due(now)
            if node is None:
                break
            freed += self._remove_subtree(node)
        self._expiry.compact(self._tree.num_nodes)
        self._counters.expired_blocks += freed
        return freed

    def drop(self, node: Node) -> None:
        """Remove a hold; what it alone kept can be evicted from now on."""
        if self._tree.drop(node):
            self._eviction.offer(node)

    def remove(self, node: Node) -> None:
        """Take an unheld, childless node out of the tree, with all that hangs at it, and free its block."""
        parent = node.real_parent()
        self._tails.remove_all(node)
        self._board.removed(node, parent)
        self._pool.give_back([self._tree.remove(node)])
        self._eviction.offer(parent)
        self._eviction.compact(self._tree.num_nodes)

    def remove_unheld(self, nodes: Iterable[Node]) -> list[Node]:
        """Remove those of ``nodes`` that nobody holds, unless something hangs below; return the others."""
        kept = []
        for node in sorted(nodes, key=lambda n: -n.depth):
            if node.parent is None:
                continue
            if node.num_children or node.is_busy:
                kept.append(node)
            else:
                self.remove(node)
        return kept

    def prune(self, lease: Lease) -> None:
        """Remove what a lease that has just ended must not leave behind, or need not."""
        self._prune_expired(lease)
        self._prune_end(lease)

    def clear(self) -> int:
        """Remove every entry that nobody holds; return how many blocks that freed."""
        before = self._pool.num_free
        self.remove_unheld(self._tree.iterate())
        self._tails.clear()
        self._tree.drop_empty_roots()
        return self._pool.num_free - before

    def _prune_expired(self, lease: Lease) -> None:
        """Remove what became unreachable while it was held."""
        now = self._clock.now()
        for node in lease.nodes:
            if node.expires_at is not None and node.expires_at <= now and node.parent is not None:
                self._counters.expired_blocks += self._remove_subtree(node)
                return

    def _prune_end(self, lease: Lease) -> None:
        """Remove private blocks, and an OPEN block whose content a sibling has, too."""
        for node in reversed(lease.nodes):
            if node.parent is None:
                continue
            is_useless = node.owner is not None or (node.state is NodeState.OPEN and self._is_covered(node))
            if not is_useless or node.num_children or node.is_busy:
                return
            self.remove(node)

    def _remove_subtree(self, top: Node) -> int:
        """Remove whatever of a subtree nobody holds; return how many blocks that freed."""
        order, stack = [], [top]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(node.children.values())
            stack.extend(node.open_children)
        before = self._pool.num_free
        for node in reversed(order):
            if not node.num_children and not node.is_busy:
                self.remove(node)
        return self._pool.num_free - before

    def _is_covered(self, node: Node) -> bool:
        """Say whether a sibling holds everything that an OPEN node holds."""
        if not node.packed:
            return True
        parent, now = node.real_parent(), self._clock.now()
        sibling, length = self._tree.find_partial(parent, node.packed, node.owner, now, excluding=node)
        return sibling is not None and length == len(node.tokens)
