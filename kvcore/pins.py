"""Pins: an operator's hold on a prefix.

A pin ends at one node and covers the whole path from the root to it. A **hard** pin is a hold like a
lease's: none of its blocks is evictable. A **soft** pin only puts its blocks last: they are taken when
nothing else can be, from the end, so the pin shrinks block by block and keeps the front.

* Each kind has a budget, a share of the pool. A block under several pins of a kind counts once.
* A pin ends with its own lifetime, when it is taken away, when its content expires or may not be used any
  more, or when an operator evicts it (soft ones). It does not keep content alive: a lifetime bounds how
  stale an answer can be, and pinning is no way around that (``CacheManager.set_lifetime`` is).
* One pin per node: pinning again changes kind and lifetime.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

from kvcore.errors import IntegrityError, OverBudget
from kvcore.node import Node, NodeState
from kvcore.tree import PrefixTree

__all__ = ["Pin", "PinBook", "PinKind", "PinOutcome"]

HARD_SHARE = 0.5
SOFT_SHARE = 0.8
"""Shares of the pool that pins may cover unless told otherwise."""


class PinKind(StrEnum):
    """How firmly a pin holds."""

    SOFT = "soft"
    HARD = "hard"


@dataclass(slots=True, eq=False)
class Pin:
    """One pin. It holds while its node points back at it."""

    node: Node
    kind: PinKind
    ends_at: float | None


@dataclass(frozen=True, slots=True)
class PinOutcome:
    """What a new pin covers."""

    num_blocks: int
    newly_pinned_blocks: int
    """Of these, such as no other pin covered before."""


class PinBook:
    """All pins of one cache, what they cover, and when they end."""

    def __init__(
        self,
        tree: PrefixTree,
        *,
        num_blocks: int,
        let_go: Callable[[Node], None],
        hard_share: float = HARD_SHARE,
        soft_share: float = SOFT_SHARE,
    ) -> None:
        """``let_go`` is told of a node that a pin does not cover any more, and that may be evicted now."""
        for share in (hard_share, soft_share):
            if not 0.0 <= share <= 1.0:
                raise ValueError("a pin budget is a share of the pool, from 0 to 1")
        self.budgets = {
            PinKind.HARD: int(hard_share * num_blocks),
            PinKind.SOFT: int(soft_share * num_blocks),
        }
        self.on_end: Callable[[Pin], None] | None = None
        """Told of each pin that ends, by whatever cause, while its node is still in place."""
        self._tree = tree
        self._let_go = let_go
        self._pins: dict[Pin, None] = {}
        self._covered: dict[PinKind, dict[Node, int]] = {kind: {} for kind in PinKind}
        """How many pins of a kind cover a node."""
        self.num_pinned = 0
        """Blocks that any pin covers."""
        self._ending: list[tuple[float, int, Pin]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def all(self) -> list[Pin]:
        return list(self._pins)

    def num_pins(self, kind: PinKind) -> int:
        return sum(pin.kind is kind for pin in self._pins)

    def num_blocks(self, kind: PinKind) -> int:
        """Return how many blocks pins of a kind cover, each counted once."""
        return len(self._covered[kind])

    def num_shared(self, path: Sequence[Node]) -> int:
        """Return how many nodes of a path hard pins cover."""
        return sum(node in self._covered[PinKind.HARD] for node in path)

    def kind_of(self, node: Node) -> PinKind | None:
        """Return how firmly a node is pinned, by a pin that ends here or below."""
        for kind in (PinKind.HARD, PinKind.SOFT):
            if node in self._covered[kind]:
                return kind
        return None

    def covers(self, node: Node) -> bool:
        """Say whether any pin covers a node."""
        return node in self._covered[PinKind.HARD] or node in self._covered[PinKind.SOFT]

    def pin(
        self,
        node: Node,
        kind: PinKind,
        *,
        now: float,
        lifetime_s: float | None = None,
        budget: int | None = None,
    ) -> PinOutcome:
        """Pin a path down to a settled shared node; a pin that ends there already is replaced.

        Raises ``OverBudget``, and changes nothing, if pins of this kind would cover more than ``budget``
        (or less: their own). The last block of a running request cannot be pinned: it still changes.
        """
        if node.is_root or node.owner is not None or node.state is NodeState.PENDING:
            raise IntegrityError(f"{node!r} cannot be pinned")
        if node.state is NodeState.OPEN and node.is_busy and node.pin is None:
            raise IntegrityError(f"{node!r} cannot be pinned: it is being filled")
        previous = node.pin
        covered = self._covered[kind]
        path = list(_path_to(node))
        fresh = [n for n in path if n not in covered]
        limit = self.budgets[kind] if budget is None else min(budget, self.budgets[kind])
        if fresh and len(covered) + len(fresh) > limit:
            raise OverBudget(needed=len(fresh), pinned=len(covered), budget=limit)
        newly = sum(not self.covers(n) for n in path)
        ends_at = None if lifetime_s is None else now + lifetime_s
        if previous is not None:
            if previous.kind is kind:
                previous.ends_at = ends_at
                self._schedule(previous)
                return PinOutcome(len(path), 0)
            self._take_off(previous)
        pin = Pin(node, kind, ends_at)
        node.pin = pin
        self._pins[pin] = None
        for covered_node in path:
            self._cover(covered_node, kind)
        if kind is PinKind.HARD:
            self._tree.hold(node)
        elif not node.is_busy:
            self._let_go(node)  # to its place among the soft ones
        self._schedule(pin)
        return PinOutcome(len(path), newly)

    def end(self, pin: Pin) -> None:
        """End a pin; what it alone covered can be evicted like anything else. Does nothing twice."""
        if pin.node.pin is not pin:
            return
        if self.on_end is not None:
            self.on_end(pin)
        node = pin.node
        self._take_off(pin)
        if not node.is_busy:
            self._let_go(node)

    def shrink(self, pin: Pin) -> None:
        """The last block of a soft pin is being taken: go on with the rest of it, if there is any.

        A pin that ends at the parent already goes on instead, for the longer of the two lifetimes if it
        is a soft one.
        """
        node, parent = pin.node, pin.node.real_parent()
        if parent.is_root:
            self.end(pin)
            return
        other = parent.pin
        if other is not None:
            if other.kind is PinKind.SOFT and other.ends_at is not None:
                longer = None if pin.ends_at is None else max(pin.ends_at, other.ends_at)
                if longer != other.ends_at:
                    other.ends_at = longer
                    self._schedule(other)
            self.end(pin)
            return
        node.pin = None
        self._uncover(node, pin.kind)
        pin.node = parent
        parent.pin = pin

    def end_through(self, nodes: set[Node]) -> None:
        """End every pin whose path leads through one of ``nodes``."""
        for pin in self.all:
            if any(n in nodes for n in _path_to(pin.node)):
                self.end(pin)

    def sweep(self, now: float) -> None:
        """End the pins whose lifetime is over."""
        while self._ending and self._ending[0][0] <= now:
            _, _, pin = heapq.heappop(self._ending)
            if pin.ends_at is not None and pin.ends_at <= now:
                self.end(pin)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless pins, their nodes and what they cover agree."""
        for kind, covered in self._covered.items():
            expected: dict[Node, int] = {}
            for pin in self._pins:
                if pin.kind is kind:
                    for node in _path_to(pin.node):
                        expected[node] = expected.get(node, 0) + 1
            if expected != covered:
                raise IntegrityError(f"{kind} pins cover {len(expected)} blocks, {len(covered)} are counted")
        union = {node for covered in self._covered.values() for node in covered}
        if len(union) != self.num_pinned:
            raise IntegrityError(f"{len(union)} blocks are pinned, {self.num_pinned} are counted")
        for pin in self._pins:
            if pin.node.pin is not pin or pin.node.parent is None:
                raise IntegrityError(f"{pin!r} has lost its node")

    # -- inside -------------------------------------------------------------------------------------

    def _take_off(self, pin: Pin) -> None:
        """Remove a pin and what it holds."""
        node = pin.node
        node.pin = None
        del self._pins[pin]
        for covered in _path_to(node):
            self._uncover(covered, pin.kind)
        if pin.kind is PinKind.HARD:
            self._tree.drop(node)

    def _cover(self, node: Node, kind: PinKind) -> None:
        if not self.covers(node):
            node.space.num_pinned_blocks += 1
            self.num_pinned += 1
        covered = self._covered[kind]
        covered[node] = covered.get(node, 0) + 1

    def _uncover(self, node: Node, kind: PinKind) -> None:
        covered = self._covered[kind]
        covered[node] -= 1
        if not covered[node]:
            del covered[node]
            if not self.covers(node):
                node.space.num_pinned_blocks -= 1
                self.num_pinned -= 1

    def _schedule(self, pin: Pin) -> None:
        if pin.ends_at is not None:
            heapq.heappush(self._ending, (pin.ends_at, next(self._numbers), pin))
            if len(self._ending) > 2 * len(self._pins) + 64:
                self._ending = [e for e in self._ending if e[2].node.pin is e[2] and e[2].ends_at == e[0]]
                heapq.heapify(self._ending)


def _path_to(node: Node) -> list[Node]:
    """Return a node and all above it that bear a block."""
    path = []
    while not node.is_root:
        path.append(node)
        node = node.real_parent()
    return path
