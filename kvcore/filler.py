"""Filling the blocks of leases, one step at a time: planned before the step, entered after it.

::

    block of a lease     extend                                   commit
    stays partial        OPEN                                     OPEN, stamped: its lifetime begins
    gets full            PENDING: others in the plan may follow   READY
    gets full, and the   detached from the tree, a duplicate      given back; the tree's block in its place
    tree has it already

A lease holds the deepest of its nodes; whatever lies above is held through it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvcore.blocks import BlockId, BlockPool
from kvcore.clock import Clock
from kvcore.events import LeaveCause
from kvcore.lease import Lease
from kvcore.node import Node, NodeState
from kvcore.reclaim import Reclaimer
from kvcore.tails import Tail, TailStore
from kvcore.tree import PrefixTree

__all__ = ["Filler"]


class Filler:
    """Give leases blocks to fill, and enter what was filled into the tree."""

    def __init__(
        self, *, pool: BlockPool, tree: PrefixTree, tails: TailStore, reclaimer: Reclaimer, clock: Clock
    ) -> None:
        self._pool = pool
        self._tree = tree
        self._tails = tails
        self._reclaimer = reclaimer
        self._clock = clock
        self._block_size = tree.block_size

    def extend(self, lease: Lease, num_tokens: int) -> None:
        """Plan the next ``num_tokens``; raise ``OutOfBlocks``, and change nothing, without room for them."""
        size = self._block_size
        start, stop = lease.num_computed, lease.num_computed + num_tokens
        missing = -(-stop // size) - len(lease.block_table)
        if missing <= 0 and stop % size:
            lease.in_flight = num_tokens  # stays inside the OPEN block: nothing to publish
            return
        now = self._clock.now()
        if missing > 0:
            lease.block_table.extend(self._reclaimer.take(missing, lease.root.space))
        lease.in_flight = num_tokens
        for index in range(start // size, -(-stop // size)):
            anchor = lease.nodes[index - 1] if index else lease.root
            if index == len(lease.nodes):
                block = BlockId(lease.block_table[index])
                lease.nodes.append(self._tree.add_open(anchor, block, lease.owner))
                lease.nodes[-1].is_lossy |= lease.is_lossy
            if (index + 1) * size <= stop:
                packed = lease.tokens[index * size : (index + 1) * size].tobytes()
                twin = self._tree.find_child(anchor, packed, lease.owner, now)
                if twin is None:
                    self._publish(lease, lease.nodes[index], packed, now)
                else:
                    self._defer_to(lease, index, twin)
        self.hold_deepest(lease)

    def add_tail(self, lease: Lease) -> None:
        """Keep the last logits of the prompt that the running step completes."""
        num_full = len(lease.tokens) // self._block_size
        node = lease.nodes[num_full - 1] if num_full else lease.root
        rest = lease.tokens[num_full * self._block_size :].tobytes()
        now = self._clock.now()
        expires_at = None if lease.lifetime_s is None else now + lease.lifetime_s
        lease.new_tail = self._tails.add(node, rest, lease.owner, now, expires_at=expires_at)
        if lease.new_tail is not None:
            lease.new_tail.is_lossy = lease.is_lossy

    def commit(self, leases: Iterable[Lease], *, spoiled: Collection[Lease]) -> None:
        """Enter what the step has filled, for all leases of the plan; ``spoiled`` ones keep no logits."""
        now = self._clock.now()
        listeners = self._reclaimer.listeners
        leases, stored, kept = list(leases), list[list[Node]](), list[Tail]()
        for lease in leases:
            for node in lease.pending:
                node.state = NodeState.READY
                node.producer = None
            if listeners and lease.pending and lease.owner is None and lease not in spoiled:
                stored.append(list(lease.pending))
            lease.pending.clear()
        for lease in leases:
            self._settle(lease, now)
            if lease.new_tail is not None:
                if lease in spoiled:
                    self._tails.remove(lease.new_tail)
                else:
                    lease.new_tail.is_ready = True
                    if lease.owner is None:
                        kept.append(lease.new_tail)
                lease.new_tail = None
            lease.used_tail = None
        self._tails.end_step()
        for listener in listeners:
            for nodes in stored:
                listener.stored(nodes)
            for tail in kept:
                listener.tail_stored(tail)

    def hold_deepest(self, lease: Lease) -> None:
        """Let a lease hold its deepest node, and no other."""
        if lease.nodes and lease.nodes[-1] is not lease.held:
            self._move_hold(lease, lease.nodes[-1])

    def _publish(self, lease: Lease, node: Node, packed: bytes, now: float) -> None:
        self._tree.fill(node, packed, producer=lease)
        self._stamp(node, lease, now)
        lease.pending.append(node)
        if lease.owner is None:
            self._reclaimer.entered(node)

    def _defer_to(self, lease: Lease, index: int, twin: Node) -> None:
        """The tree has this very block already: keep ours private for the step, follow theirs from here."""
        own = lease.nodes[index]
        lease.nodes[index] = twin
        lease.is_lossy = lease.is_lossy or twin.is_lossy
        if lease.held is own:
            self._move_hold(lease, twin)
        lease.deferred.add(index)
        lease.duplicates[index] = self._reclaimer.detach(own, LeaveCause.DISCARDED)

    def _settle(self, lease: Lease, now: float) -> None:
        """Enter what the step has computed."""
        lease.num_computed += lease.in_flight
        lease.in_flight = 0
        lease.copy = None
        for index, block in lease.duplicates.items():
            lease.block_table[index] = lease.nodes[index].real_block()
            self._pool.give_back([block])
        lease.duplicates.clear()
        if lease.nodes and lease.nodes[-1].state is NodeState.OPEN:
            last = lease.nodes[-1]
            start = (len(lease.nodes) - 1) * self._block_size
            last.packed = lease.tokens[start : lease.num_computed].tobytes()
            self._stamp(last, lease, now)

    def _stamp(self, node: Node, lease: Lease, now: float) -> None:
        """Note when the first slot of a block was filled; its lifetime starts then."""
        if node.inserted_at is not None:
            return
        node.inserted_at = now
        self._reclaimer.count_inserted(node)
        if lease.lifetime_s is not None:
            node.limit_life(now + lease.lifetime_s)
        self._reclaimer.watch_lifetime(node)

    def _move_hold(self, lease: Lease, node: Node) -> None:
        self._tree.hold(node)
        previous, lease.held = lease.held, node
        self._reclaimer.drop(previous)
