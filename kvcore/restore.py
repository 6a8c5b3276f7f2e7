"""Entering what came back from a tier, and taking it out again if the step that loads it fails.

Between two steps the engine hands over objects of one prompt, in order; for each that still fits into the
tree a block (or a logits slot) is taken, and the running plan loads the object's bytes into it before
anything else reads it::

    tree:   root ── [b0] ── [b1]              objects:  b2  b3          (b1 is the last on the device)
                              └─ place() ──► [b2] ── [b3]  READY, evictable, found by everybody at once

Nothing is held: what nobody leases in the meantime may be evicted again, and then it is computed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcore.blocks import BlockId
from kvcore.clock import Clock
from kvcore.errors import OutOfBlocks
from kvcore.events import LeaveCause
from kvcore.keys import NamespaceKey
from kvcore.node import Node, NodeState
from kvcore.reclaim import Reclaimer
from kvcore.tails import LogitsSlot, Tail, TailStore
from kvcore.tiers.interface import CacheObject, ObjectKind
from kvcore.tree import PrefixTree

__all__ = ["Placed", "Restorer"]


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """An object that has a place now, and the block or logits slot that its bytes go to."""

    stored: CacheObject
    node: Node
    """The node that bears the block, or at which the logits hang."""
    block: BlockId | None
    slot: LogitsSlot | None
    tail: Tail | None = None
    tier: str = ""


class Restorer:
    """Give objects of tiers their place in the tree. Made by ``CacheManager``; same thread."""

    def __init__(
        self,
        *,
        tree: PrefixTree,
        tails: TailStore,
        reclaimer: Reclaimer,
        clock: Clock,
    ) -> None:
        self._tree = tree
        self._tails = tails
        self._reclaimer = reclaimer
        self._clock = clock
        self.loading: set[Node] = set()
        """Nodes whose blocks the running plan loads: until it has run, their bytes are not there."""
        self.loading_tails: set[Tail] = set()

    def loaded(self) -> None:
        """The plan has run."""
        self.loading.clear()
        self.loading_tails.clear()

    def place(
        self,
        namespace: NamespaceKey,
        tokens: array[int],
        first_block: int,
        objects: Sequence[CacheObject],
        *,
        tier: str = "",
        is_lossy: bool = False,
    ) -> tuple[list[Placed], int]:
        """Place full blocks ``first_block``, ``first_block + 1`` ... of a prompt, as far as there is room.

        Return the placed ones and how many of the objects are on the device now (some were there already).
        Both are empty or 0 if what they follow has gone meanwhile. ``is_lossy``: they are not
        what was stored, bit for bit; they and what is computed from them are marked so.
        """
        size, now = self._tree.block_size, self._clock.now()
        root = self._tree.root(namespace)
        path = self._tree.walk(root, tokens, first_block * size, None, now)
        if len(path) < first_block:
            return [], 0
        anchor = path[-1] if path else root
        placed: list[Placed] = []
        self._tree.hold(anchor)  # so that making room evicts nothing of what leads here; handed down the path
        try:
            for index, stored in enumerate(objects, first_block):
                packed = tokens[index * size : (index + 1) * size].tobytes()
                if stored.tokens != packed or stored.key.kind is not ObjectKind.BLOCK:
                    return placed, index - first_block
                child = self._tree.find_child(anchor, packed, None, now)
                if child is None:
                    block = self._take(anchor)
                    if block is None:
                        return placed, index - first_block
                    child = self._add(anchor, block, packed, stored, now)
                    child.is_lossy |= is_lossy
                    placed.append(Placed(stored, child, block, None, tier=tier))
                self._tree.hold(child)
                self._reclaimer.drop(anchor)
                anchor = child
        finally:
            self._reclaimer.drop(anchor)  # nobody else has ever held it: makes it a leaf to be evicted
        return placed, len(objects)

    def place_tail(
        self,
        namespace: NamespaceKey,
        tokens: array[int],
        partial: CacheObject | None,
        logits: CacheObject,
        *,
        is_lossy: bool = False,
    ) -> list[Placed]:
        """Place the end of an exact prompt: its partial block, if it has one, and its last logits.

        Nothing is placed if its full blocks are not on the device.
        """
        size, now = self._tree.block_size, self._clock.now()
        root = self._tree.root(namespace)
        num_full = len(tokens) // size
        path = self._tree.walk(root, tokens, num_full * size, None, now)
        if len(path) < num_full:
            return []
        anchor = path[-1] if path else root
        rest = tokens[num_full * size :].tobytes()
        placed: list[Placed] = []
        if partial is not None and partial.tokens == rest and rest:
            _, length = self._tree.find_partial(anchor, rest, None, now)
            block = self._take(anchor) if length * 4 < len(rest) else None
            if block is not None:
                node = self._tree.add_open(anchor, block, None)
                node.packed = rest
                node.is_lossy |= is_lossy
                self._enter(node, partial, now)
                self._tree.hold(node)
                self._reclaimer.drop(node)
                placed.append(Placed(partial, node, block, None))
        if logits.tokens == rest and logits.key.kind is ObjectKind.LOGITS:
            left = logits.expires_in_s
            expires_at = None if left is None else now + left
            tail = self._tails.add(anchor, rest, None, now, expires_at=expires_at)
            if tail is not None:
                tail.is_ready = True
                tail.is_lossy = anchor.is_lossy or is_lossy
                self.loading_tails.add(tail)
                placed.append(Placed(logits, anchor, None, tail.slot, tail))
        return placed

    def take_out(self, placed: Iterable[Placed]) -> None:
        """The step that was to load these failed: nobody may find them."""
        placed, now = list(placed), self._clock.now()
        self.loaded()
        for entry in placed:
            if entry.tail is not None and (entry.node.tails or {}).get(entry.tail.key) is entry.tail:
                self._tails.remove(entry.tail)
        nodes = [entry.node for entry in placed if entry.block is not None]
        for node in self._reclaimer.remove_unheld(nodes, LeaveCause.DISCARDED):
            node.limit_life(now)

    def _take(self, anchor: Node) -> BlockId | None:
        """Take one block without evicting what it will hang at."""
        self._tree.hold(anchor)
        try:
            return self._reclaimer.take(1, anchor.space)[0]
        except OutOfBlocks:
            return None
        finally:
            self._reclaimer.drop(anchor)

    def _add(self, anchor: Node, block: BlockId, packed: bytes, stored: CacheObject, now: float) -> Node:
        node = self._tree.add_open(anchor, block, None)
        self._tree.fill(node, packed, producer=None)
        node.state = NodeState.READY
        node.digest = stored.key.digest
        self._enter(node, stored, now)
        self._reclaimer.entered(node)
        return node

    def _enter(self, node: Node, stored: CacheObject, now: float) -> None:
        node.inserted_at = now
        self._reclaimer.count_inserted(node, restored=1)
        if stored.expires_in_s is not None:
            node.limit_life(now + stored.expires_in_s)
        self._reclaimer.watch_lifetime(node)
        self.loading.add(node)
