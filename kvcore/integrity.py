"""The invariants of the cache, checked from the outside.

* Every block is in exactly one place: free, in one node, or a lease's duplicate in flight.
* Holds add up: a node's holds are the leases and hard pins that hold it, its busy children are counted.
* Parents outlive children; depth and child counts agree with the structure.
* ``num_evictable`` is the number of nodes under no hold; each such leaf is listed for eviction.
* Pins cover what they count, on nodes that stand; what a namespace counts adds up to what it holds.
* A PENDING node belongs to a lease in flight; a private node to its owner.
* A lease's table and path agree.
* Every logits slot is free, leaving, or held by one tail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvcore.blocks import BlockPool
from kvcore.errors import IntegrityError
from kvcore.keys import TOKEN_BYTES
from kvcore.lanes import EvictionLanes
from kvcore.lease import Lease
from kvcore.node import Node, NodeState
from kvcore.pins import PinBook, PinKind
from kvcore.tails import TailStore
from kvcore.tree import PrefixTree

__all__ = ["check_integrity"]


def check_integrity(
    pool: BlockPool,
    tree: PrefixTree,
    tails: TailStore,
    pins: PinBook,
    lanes: EvictionLanes,
    leases: Iterable[Lease],
) -> None:
    """Raise ``IntegrityError`` naming the first invariant that does not hold."""
    leases = list(leases)
    nodes = list(tree.iterate())
    _check_blocks(pool, nodes, leases)
    _check_holds(tree, nodes, leases, pins)
    pins.check_integrity()
    lanes.check_integrity(nodes)
    _check_spaces(tree, nodes, pins)
    for node in nodes:
        _check_structure(tree, node)
    for lease in leases:
        _check_lease(tree, lease)
    tails.check_integrity()


def _check_blocks(pool: BlockPool, nodes: list[Node], leases: list[Lease]) -> None:
    held = Counter(node.block for node in nodes)
    held.update(block for lease in leases for block in lease.duplicates.values())
    for block, times in held.items():
        if block is None or times > 1:
            raise IntegrityError(f"block {block} is in {times} places")
        if pool.is_free(block):
            raise IntegrityError(f"block {block} is in use and free")
    if len(held) + pool.num_free != pool.num_blocks:
        raise IntegrityError(f"{pool.num_blocks - len(held) - pool.num_free} blocks are lost")


def _check_spaces(tree: PrefixTree, nodes: list[Node], pins: PinBook) -> None:
    held = Counter(node.space for node in nodes)
    counted = Counter(node.space for node in nodes if node.owner is None and node.inserted_at is not None)
    for key, root in tree.roots.items():
        if root.space.root is not root or tree.spaces.get(key) is not root.space:
            raise IntegrityError(f"{root.space!r} and its root do not know each other")
    if sum(s.num_pinned_blocks for s in tree.spaces.all) != pins.num_pinned:
        raise IntegrityError(f"namespaces do not count {pins.num_pinned} pinned blocks")
    for space in tree.spaces.all:
        totals = space.totals
        if space.num_blocks != held[space]:
            raise IntegrityError(f"{space!r} counts its blocks wrong: {held[space]} found")
        if totals.inserted_blocks - totals.left_blocks != counted[space]:
            raise IntegrityError(f"{space!r} counts {totals}, but {counted[space]} are there")
        if totals.hits > totals.requests or totals.reused_tokens > totals.prompt_tokens:
            raise IntegrityError(f"{space!r} counts more hits than requests: {totals}")


def _check_holds(tree: PrefixTree, nodes: list[Node], leases: list[Lease], pins: PinBook) -> None:
    everything = [*tree.roots.values(), *nodes]
    holds = Counter(lease.held for lease in leases)
    holds.update(pin.node for pin in pins.all if pin.kind is PinKind.HARD)
    busy_children: Counter[Node] = Counter()
    for node in everything:
        if node.num_holds != holds[node]:
            raise IntegrityError(
                f"{node!r} counts {node.num_holds} holds, leases and pins have {holds[node]}"
            )
        if node.is_busy and node.parent is not None:
            busy_children[node.parent] += 1
    for node in everything:
        if node.num_busy_children != busy_children[node]:
            raise IntegrityError(
                f"{node!r} counts {node.num_busy_children} busy children, not {busy_children[node]}"
            )
    if tree.num_nodes != len(nodes):
        raise IntegrityError(f"{tree.num_nodes} nodes counted, {len(nodes)} found")
    evictable = sum(not node.is_busy for node in nodes)
    if tree.num_evictable != evictable:
        raise IntegrityError(f"{tree.num_evictable} evictable counted, {evictable} found")
    children = Counter(node.parent for node in nodes)
    for node in everything:
        if node.num_children != children[node]:
            raise IntegrityError(f"{node!r} counts {node.num_children} children, not {children[node]}")


def _check_structure(tree: PrefixTree, node: Node) -> None:
    parent = node.parent
    if parent is None:
        raise IntegrityError(f"{node!r} is reachable but was removed")
    if node.depth != parent.depth + 1:
        raise IntegrityError(f"{node!r} is not one deeper than its parent")
    if parent.state is NodeState.OPEN:
        raise IntegrityError(f"{node!r} hangs below a block that is not full")
    if node.state is NodeState.OPEN:
        if len(node.packed) >= tree.block_size * TOKEN_BYTES or node not in parent.open_children:
            raise IntegrityError(f"{node!r} is OPEN, but full or not listed")
    elif len(node.packed) != tree.block_size * TOKEN_BYTES:
        raise IntegrityError(f"{node!r} is full but holds {len(node.tokens)} tokens")
    elif parent.children.get(node.key) is not node and node not in tree.displaced:
        raise IntegrityError(f"{node!r} is not listed by its parent")
    if node.state is NodeState.PENDING:
        producer = node.producer
        if producer is None or not producer.is_open or node not in producer.pending:
            raise IntegrityError(f"{node!r} is PENDING, but nobody fills it")
    elif node.producer is not None:
        raise IntegrityError(f"{node!r} is not PENDING, but has a producer")
    if node.mark is not None and node.owner is not None:
        raise IntegrityError(f"{node!r} is private, but a policy has seen it")
    if node.digest is not None and node.state is NodeState.OPEN:
        raise IntegrityError(f"{node!r} keeps the digest of tokens that still change")
    for key, group in (node.cursors or {}).items():
        if group.node is not node or group.key != key or not group.members:
            raise IntegrityError(f"{node!r} lists a wrong group of cursors")
    if node.owner is not None and not node.is_busy:
        raise IntegrityError(f"{node!r} is private but its owner has gone")


def _check_lease(tree: PrefixTree, lease: Lease) -> None:
    if not lease.is_open:
        raise IntegrityError(f"{lease!r} is closed but listed")
    if len(lease.nodes) != len(lease.block_table):
        raise IntegrityError(f"{lease!r}: {len(lease.nodes)} nodes")
    previous = lease.root
    for index, node in enumerate(lease.nodes):
        if node.parent is not previous:
            raise IntegrityError(f"{lease!r}: node {index} does not follow its predecessor")
        block = lease.duplicates.get(index, node.block)
        if lease.block_table[index] != block:
            raise IntegrityError(f"{lease!r}: table names block {lease.block_table[index]}, not {block}")
        previous = node
    if lease.held is not previous:
        raise IntegrityError(f"{lease!r} does not hold its deepest node")
    if lease.num_computed + lease.in_flight > len(lease.block_table) * tree.block_size:
        raise IntegrityError(f"{lease!r} has computed more than its table covers")
