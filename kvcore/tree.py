"""The prefix tree: one node is one block, a child's key is the exact token ids of its block.

::

    root (namespace) ── [t0..t15] ── [t16..t31] ──┬── [t32..t47]          READY
                                                  ├── [u32..u47]          PENDING: filled by this step
                                                  └╌╌ (t32, u33, u34)     OPEN: not full, found by token

Exact keys leave nothing to collide. They are the packed bytes of the ids: a walk over 32,768 tokens is
2,048 look-ups of 64 bytes each, and the garbage collector never visits a key.

**Holds.** A lease or a hard pin holds its deepest node only; ``num_busy_children`` carries "somewhere
below me is a hold" upwards, one counter per node, stopping at the first ancestor that is busy anyway. A
node that is not busy is *evictable*: it can go once its children have gone, so ``num_evictable`` blocks
can always be had, and an eviction never has to be undone half way.

**Private nodes.** A request that may leave nothing behind owns its nodes: their key starts with the
owner's number, so nobody else finds them, and they go when the hold goes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from struct import Struct

from kvcore.blocks import BlockId
from kvcore.errors import IntegrityError
from kvcore.keys import TOKEN_BYTES, NamespaceKey
from kvcore.lease import Lease
from kvcore.node import Node, NodeState, key_of
from kvcore.spaces import SpaceTable

__all__ = ["PrefixTree", "num_common_tokens"]

MAX_PARTIAL_CANDIDATES = 64
"""How many children a search inside a block looks at, the latest first: bounds cost, not correctness."""

MIN_NAMESPACES_TO_SWEEP = 64


def num_common_tokens(left: bytes, right: bytes) -> int:
    """Return how many leading tokens two packed sequences have in common."""
    length = min(len(left), len(right))
    left, right = left[:length], right[:length]
    if left == right:
        return length // TOKEN_BYTES
    difference = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    lowest_bit = (difference & -difference).bit_length() - 1
    return lowest_bit // (8 * TOKEN_BYTES)


class PrefixTree:
    """Structure, holds and matching. Blocks are counted here but given and taken by ``CacheManager``."""

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError("a block holds at least one position")
        self.block_size = block_size
        self.spaces = SpaceTable()
        self.roots: dict[NamespaceKey, Node] = {}
        self.num_nodes = 0
        self.num_evictable = 0
        self.displaced: dict[Node, None] = {}
        """Expired nodes that lost their key to a successor before they could go."""
        self._split = Struct(f"{block_size * TOKEN_BYTES}s").iter_unpack
        self._tick = 0
        self._max_roots = MIN_NAMESPACES_TO_SWEEP

    def __repr__(self) -> str:
        counts = f"{self.num_nodes} nodes, {self.num_evictable} evictable"
        return f"PrefixTree({counts}, {len(self.roots)} namespaces)"

    # -- namespaces and time ------------------------------------------------------------------------

    def root(self, namespace: NamespaceKey) -> Node:
        """Return a namespace's root, made on first use.

        Now and then a new one drops all empty ones, so the table stays in proportion to what is cached.
        """
        found = self.roots.get(namespace)
        if found is None:
            if len(self.roots) >= self._max_roots:
                self.drop_empty_roots()
                self._max_roots = max(MIN_NAMESPACES_TO_SWEEP, 2 * len(self.roots))
            space = self.spaces.use(namespace)
            found = space.root = Node(parent=None, block=None, owner=None, tick=0, space=space)
            found.state = NodeState.READY
            self.roots[namespace] = found
        return found

    def drop_empty_roots(self) -> None:
        """Forget namespaces that hold nothing and that nobody waits at."""
        empty = [
            key
            for key, root in self.roots.items()
            if not root.num_children and not root.is_busy and not root.cursors and not root.tails
        ]
        for key in empty:
            self.roots.pop(key).space.root = None

    def next_tick(self) -> int:
        """Advance the logical clock of recency."""
        self._tick += 1
        return self._tick

    # -- matching -----------------------------------------------------------------------------------

    def find_child(self, node: Node, packed: bytes, owner: int | None, now: float) -> Node | None:
        """Return the full child for exactly these tokens that ``owner`` may see and that has not expired."""
        child = node.children.get(packed)
        if child is not None and not child.is_expired(now):
            return child
        if owner is not None:  # a shared entry that has expired hides no private one
            child = node.children.get((owner, packed))
            if child is not None and not child.is_expired(now):
                return child
        return None

    def walk(self, node: Node, tokens: array[int], limit: int, owner: int | None, now: float) -> list[Node]:
        """Return the longest path of full nodes below ``node`` for the rest of ``tokens[:limit]``."""
        size = self.block_size
        path: list[Node] = []
        start = node.depth * size
        num_blocks = (limit - start) // size
        if num_blocks <= 0 or not node.children:
            return path
        for (key,) in self._split(tokens[start : start + num_blocks * size].tobytes()):
            child = node.children.get(key)
            if child is None or child.expires_at is not None or owner is not None:
                child = self.find_child(node, key, owner, now)  # the rare cases, out of the loop's way
                if child is None:
                    break
            path.append(child)
            node = child
        return path

    def find_partial(
        self, node: Node, wanted: bytes, owner: int | None, now: float, *, excluding: Node | None = None
    ) -> tuple[Node | None, int]:
        """Return the child that shares the most leading tokens with ``wanted``, and how many.

        Only settled content counts: OPEN and READY nodes; a PENDING block cannot be copied from yet.
        """
        best, best_length = None, 0
        first = wanted[:TOKEN_BYTES]
        if not first:
            return best, best_length
        candidates = (
            islice(reversed(node.open_children), MAX_PARTIAL_CANDIDATES),
            islice(reversed(node.children.values()), MAX_PARTIAL_CANDIDATES),
        )
        for group in candidates:
            for child in group:
                if (
                    not child.packed.startswith(first)
                    or child.state is NodeState.PENDING
                    or child is excluding
                ):
                    continue
                if (child.owner is not None and child.owner != owner) or child.is_expired(now):
                    continue
                length = num_common_tokens(wanted, child.packed)
                if length > best_length:
                    best, best_length = child, length
        return best, best_length

    # -- structure ----------------------------------------------------------------------------------

    def add_open(self, parent: Node, block: BlockId, owner: int | None) -> Node:
        """Add an OPEN node with no tokens yet, used now. It is evictable until it is held."""
        node = Node(parent=parent, block=block, owner=owner, tick=self.next_tick(), space=parent.space)
        node.space.num_blocks += 1
        parent.open_children[node] = None
        parent.num_children += 1
        self.num_nodes += 1
        self.num_evictable += 1
        return node

    def fill(self, node: Node, packed: bytes, *, producer: Lease | None) -> None:
        """Publish an OPEN node under its full key, PENDING. An expired holder of the key is displaced.

        Without a producer (a block that was restored) the caller makes it READY.
        """
        parent = node.real_parent()
        del parent.open_children[node]
        node.packed = packed
        key = key_of(packed, node.owner)
        predecessor = parent.children.pop(key, None)
        if predecessor is not None:
            self.displaced[predecessor] = None
        parent.children[key] = node
        node.state = NodeState.PENDING
        node.producer = producer

    def remove(self, node: Node) -> BlockId:
        """Take an unheld, childless node out and return its block."""
        parent = node.real_parent()
        if node.block is None or node.num_children or node.is_busy:
            raise IntegrityError(f"{node!r} cannot be removed: it is held or has children")
        if node.state is NodeState.OPEN:
            del parent.open_children[node]
        elif parent.children.get(node.key) is node:
            del parent.children[node.key]
        else:
            del self.displaced[node]
        parent.num_children -= 1
        node.space.num_blocks -= 1
        self.num_nodes -= 1
        self.num_evictable -= 1
        node.parent = None
        node.producer = None
        return node.block

    # -- holds --------------------------------------------------------------------------------------

    def hold(self, node: Node) -> None:
        """Add a lease's or a hard pin's hold: the node and all its ancestors stop being evictable."""
        was_busy = node.is_busy
        node.num_holds += 1
        current = node
        while not was_busy:
            if current.block is not None:
                self.num_evictable -= 1
            if current.parent is None:
                break
            current = current.parent
            was_busy = current.num_holds > 0 or current.num_busy_children > 0
            current.num_busy_children += 1

    def drop(self, node: Node) -> bool:
        """Remove a hold; say whether the node became evictable by it (and with it ancestors, perhaps)."""
        node.num_holds -= 1
        current = node
        while not current.num_holds and not current.num_busy_children:
            if current.block is not None:
                self.num_evictable += 1
            if current.parent is None:
                break
            current = current.parent
            current.num_busy_children -= 1
        return not node.is_busy

    def num_idle(self, path: Sequence[Node]) -> int:
        """Return how many nodes of a path from a root are evictable: those below its last busy one."""
        low, high = 0, len(path)  # busy is closed towards the root: bisect
        while low < high:
            middle = (low + high) // 2
            if path[middle].is_busy:
                low = middle + 1
            else:
                high = middle
        return len(path) - low

    def touch(self, path: Sequence[Node], now: float) -> None:
        """Mark a path as used now."""
        tick = self.next_tick()
        for node in path:
            node.last_used = tick
            node.used_at = now

    # -- inspection ---------------------------------------------------------------------------------

    def iterate(self) -> Iterator[Node]:
        """Yield every node that bears a block, parents first (displaced nodes as roots of their own)."""
        stack = [*self.roots.values(), *self.displaced]
        while stack:
            node = stack.pop()
            if not node.is_root:
                yield node
            stack.extend(node.children.values())
            stack.extend(node.open_children)
