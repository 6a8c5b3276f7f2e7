"""What is cached, as a person would list it: runs, by value.

A **run** is a maximal chain of full shared blocks in which nothing begins or ends but the run itself: it
goes on as long as there is exactly one full block below, no last logits are kept and no pin ends. A block
that is not full is a run of its own. A run is named by its last block, and stands for the part of a prefix
that is its own; together the runs are all that can be found.

Its **value** is what it can be expected to save: uses per second of anything that leads through it
(``kvcore.heat``) times the seconds of computing its own tokens at their positions, a number without a unit.
As long as nobody uses them, two runs keep their order: so a list can be paged through while the cache lives.

A catalogue is made in pieces, between steps, and is a picture smeared over that time: what came meanwhile
may be missing, what went is left out when a page is shown.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from kvcore.heat import HALF_LIFE_S, rate_of
from kvcore.keys import TOKEN_BYTES
from kvcore.node import Node, NodeState
from kvcore.tree import PrefixTree

__all__ = ["Run", "RunCatalogue", "RunPlace"]

CHUNK = 4096
"""Runs sorted at a time."""

RunPlace = tuple[float, int]
"""Where a run stands in the list: minus the logarithm of its value, free of the present time; its serial."""


@dataclass(slots=True, eq=False)
class Run:
    """One entry of the list."""

    top: Node
    """First block of the run."""
    end: Node
    """Last block of the run; the same node if there is one."""
    above: Run | None
    """The run that this one continues."""
    num_children: int = 0
    """Runs that continue this one."""
    value: float = 0.0
    use_rate: float = 0.0
    place: RunPlace = (math.inf, 0)

    @property
    def num_blocks(self) -> int:
        return self.end.depth - self.top.depth + 1

    @property
    def is_there(self) -> bool:
        """Say whether its last block is still in the tree."""
        return self.end.parent is not None

    def num_tokens(self, block_size: int) -> int:
        """Return the length of the whole prefix."""
        return (self.end.depth - 1) * block_size + len(self.end.packed) // TOKEN_BYTES

    def start(self, block_size: int) -> int:
        """Return the position of its first token."""
        return (self.top.depth - 1) * block_size

    def nodes(self) -> list[Node]:
        """Return its blocks, the last one first."""
        nodes = [self.end]
        while nodes[-1] is not self.top and nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes


class RunCatalogue:
    """All runs that meet a condition, by value. Call ``advance`` until it says that it is complete."""

    def __init__(
        self,
        tree: PrefixTree,
        *,
        cost: Callable[[int, int], float],
        now: float,
        accepts: Callable[[Run], bool] | None = None,
    ) -> None:
        self.made_at = now
        self.num_all = 0
        """Runs seen, whether they meet the condition or not."""
        self._block_size = tree.block_size
        self._cost = cost
        self._accepts = accepts
        self._to_visit: list[tuple[Node, Run | None]] = [(root, None) for root in tree.roots.values()]
        self._runs: list[Run] = []
        self._rates: dict[Run, float] = {}
        self._accepted: list[Run] = []
        self._chunks: list[list[Run]] = []
        self._places: list[list[RunPlace]] = []
        self._num_sorted = 0

    @property
    def total(self) -> int:
        """Return how many runs meet the condition."""
        return len(self._accepted)

    @property
    def accepted(self) -> list[Run]:
        """Return the runs that meet the condition, in no order."""
        return self._accepted

    def advance(self, max_nodes: int) -> bool:
        """Do a piece of work, about as much as visiting ``max_nodes`` blocks; say whether it is complete."""
        if self._to_visit:
            self._visit(max_nodes)
            self.num_all = len(self._runs)
        elif self._runs:
            self._weigh(max_nodes)
        elif self._num_sorted < len(self._accepted):
            self._sort_chunk()
        return not self._to_visit and not self._runs and self._num_sorted >= len(self._accepted)

    def after(self, place: RunPlace | None) -> Iterator[Run]:
        """Iterate over the runs that come after a place, those of the highest value first."""
        starts = [0 if place is None else bisect_right(places, place) for places in self._places]
        rests = [islice(chunk, start, None) for chunk, start in zip(self._chunks, starts, strict=True)]
        return (run for run in heapq.merge(*rests, key=lambda run: run.place) if run.is_there)

    def _visit(self, max_nodes: int) -> None:
        """Find runs: parents come before what continues them."""
        stack, seen, now = self._to_visit, 0, self.made_at
        while stack and seen < max_nodes:
            node, above = stack.pop()
            if node.is_root:
                full = _shared(node, now)
                stack.extend((child, None) for child in full)
                stack.extend((child, None) for child in _open(node, now))
                seen += 1 + len(node.children)
                continue
            if node.parent is None:
                continue  # gone since it was noted
            run = Run(node, node, above)
            if above is not None:
                above.num_children += 1
            rate = rate_of(node.heat, now)
            seen += 1
            if node.state is not NodeState.OPEN:
                while True:
                    full = _shared(node, now)
                    if node.open_children:
                        stack.extend((child, run) for child in _open(node, now))
                    if len(full) != 1 or node.tails or node.pin is not None:
                        break
                    node = full[0]
                    rate += rate_of(node.heat, now)
                    seen += 1
                stack.extend((child, run) for child in full)
                run.end = node
            self._rates[run] = rate
            self._runs.append(run)

    def _weigh(self, max_runs: int) -> None:
        """Give runs their value, those that continue others first: using them is using the others, too."""
        now, size, rates = self.made_at, self._block_size, self._rates
        for _ in range(min(max_runs, len(self._runs))):
            run = self._runs.pop()
            rate = rates.pop(run)
            if run.above is not None:
                rates[run.above] += rate
            run.use_rate = rate
            run.value = rate * self._cost(run.start(size), run.num_tokens(size))
            # Rounded: a catalogue made later computes the same sum in another order.
            lasting = round(math.log2(run.value) + now / HALF_LIFE_S, 5) if run.value > 0 else -math.inf
            run.place = (-lasting, run.end.serial)
            if self._accepts is None or self._accepts(run):
                self._accepted.append(run)

    def _sort_chunk(self) -> None:
        chunk = self._accepted[self._num_sorted : self._num_sorted + CHUNK]
        chunk.sort(key=lambda run: run.place)
        self._chunks.append(chunk)
        self._places.append([run.place for run in chunk])
        self._num_sorted += len(chunk)


def _shared(node: Node, now: float) -> list[Node]:
    """Return the full blocks below a node that anybody may find."""
    return [
        child
        for child in node.children.values()
        if child.owner is None and (child.expires_at is None or child.expires_at > now)
    ]


def _open(node: Node, now: float) -> list[Node]:
    """Return the blocks below a node that are not full and hold something that anybody may find."""
    return [c for c in node.open_children if c.owner is None and c.packed and not c.is_expired(now)]
