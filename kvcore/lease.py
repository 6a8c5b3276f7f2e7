"""A lease: a running request's hold on a path of the tree, and its block table.

Every half-open range of positions, and who frees it::

    0            matched                num_computed        + this step          table end
    |--- shared ----|------- own, settled ----|---- in flight ----|---- (rest of the last block) ----|
    tree's: stays      stay in the tree when     published PENDING    freed with the OPEN node
    when released      released (or go with      or OPEN; READY at
                       a private owner)          commit, gone at discard

``nodes[i]`` is the tree node of block ``i``; the lease holds the deepest one. ``block_table[i]`` is that
node's block, except for blocks in ``duplicates``: two sequences filled the same block in one step, the
tree kept the other's; ours is private until the commit swaps it for the tree's and frees it.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from kvcore.blocks import BlockId
from kvcore.node import Node
from kvcore.tails import LogitsSlot, Tail

__all__ = ["Found", "Lease", "PrefixMatch", "SlotCopy"]


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """Copy slots ``[0, num_slots)`` of block ``source`` to block ``target`` before the step computes."""

    source: BlockId
    target: BlockId
    num_slots: int


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """How much of a prompt was found, in tokens, by kind."""

    block_tokens: int
    """As whole shared blocks."""
    partial_tokens: int
    """By copying the leading slots of one more block."""
    is_exact: bool
    """The whole prompt is known and its last logits are kept (or are computed by the running step)."""

    @property
    def num_tokens(self) -> int:
        return self.block_tokens + self.partial_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What of one prompt is cached right now: a candidate for a lease. Holds nothing, changes nothing.

    Valid until the next change of the cache. ``CacheManager.open`` makes a lease of it, of the path too.
    """

    root: Node
    path: list[Node]
    tail: Tail | None
    source: Node | None
    """Holds the leading slots of the next block."""
    is_being_computed: bool
    """The running step computes what comes next: waiting for it is better than computing it, too."""
    match: PrefixMatch
    is_read: bool = True
    """False: nobody looked."""

    @property
    def end(self) -> Node:
        """Return the deepest node of the path."""
        return self.path[-1] if self.path else self.root


class Lease:
    """See the module's text. Made and changed by ``CacheManager`` alone; others read."""

    __slots__ = (
        "block_table",
        "copy",
        "deferred",
        "duplicates",
        "held",
        "in_flight",
        "inserts_from",
        "is_lossy",
        "is_open",
        "lifetime_s",
        "match",
        "new_tail",
        "nodes",
        "num_computed",
        "owner",
        "pending",
        "root",
        "tokens",
        "used_tail",
    )

    def __init__(
        self, *, found: Found, tokens: array[int], owner: int | None, lifetime_s: float | None
    ) -> None:
        self.root = found.root
        self.tokens = tokens
        """The sequence's own: it grows as tokens are drawn."""
        self.owner = owner
        self.lifetime_s = lifetime_s
        """Of each entry that this lease inserts, from its insertion; None: no end."""
        self.nodes: list[Node] = found.path
        self.block_table: array[int] = array("i", [n.real_block() for n in found.path])
        self.num_computed = found.match.num_tokens
        """Positions whose KV is in its slots once the copies of the running step are done."""
        self.held: Node = found.end
        self.match = found.match
        self.inserts_from = len(found.path)
        """Index of the first node that was not matched: from here on this lease inserted them itself,"""
        self.deferred: set[int] = set()
        """except for these, where the tree had the block of another."""
        self.is_lossy = found.end.is_lossy or (found.source is not None and found.source.is_lossy)
        """A lossy codec had a hand in what it builds on: whatever it computes is marked so."""
        self.copy: SlotCopy | None = None
        self.in_flight = 0
        """Positions that the running step computes, from ``num_computed`` on."""
        self.pending: list[Node] = []
        self.duplicates: dict[int, BlockId] = {}
        self.used_tail: Tail | None = found.tail
        self.new_tail: Tail | None = None
        self.is_open = True

    def __repr__(self) -> str:
        computed = f"{self.num_computed}+{self.in_flight} computed"
        return f"Lease({len(self.block_table)} blocks, {computed}, held={self.held!r})"

    @property
    def inserted(self) -> list[Node]:
        """Return the nodes that this lease put into the tree."""
        first = self.inserts_from
        return [n for i, n in enumerate(self.nodes[first:], first) if i not in self.deferred]

    @property
    def logits_from(self) -> LogitsSlot | None:
        """Return the slot of kept logits that answer this prompt, if it is an exact repeat."""
        return None if self.used_tail is None else self.used_tail.slot

    @property
    def save_logits_to(self) -> LogitsSlot | None:
        """Return the slot that the running step should save the last logits to."""
        return None if self.new_tail is None else self.new_tail.slot
