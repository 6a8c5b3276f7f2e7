"""Namespaces as the cache knows them: what each holds, what it has counted, and which of them to forget.

A space outlives its root in the tree, so that counters run on when a tenant's last block has gone. Salts
come from outside and may be many: the table is bounded, and those that hold nothing are folded into
``other``, the least recently used first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvcore.keys import NamespaceKey, PrefixDigest

if TYPE_CHECKING:
    from kvcore.node import Node

__all__ = ["Space", "SpaceTable", "Totals"]

MAX_SPACES = 4096
"""Spaces remembered, beyond those that hold blocks."""

ID_DIGITS = 16
"""Hexadecimal digits of a seed that name a space to people."""


@dataclass(slots=True)
class Totals:
    """What is counted, of one space or of all. Tokens are prompt tokens."""

    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_block_tokens: int = 0
    cached_partial_tokens: int = 0
    cached_tail_tokens: int = 0
    restored_tokens: int = 0
    inserted_blocks: int = 0
    """Shared blocks whose first slot was filled (or restored)."""
    evicted_blocks: dict[str, int] = field(default_factory=dict)
    """By cause, of those inserted."""
    expired_blocks: int = 0
    discarded_blocks: int = 0
    restored_blocks: int = 0
    time_saved_s: float = 0.0

    @property
    def left_blocks(self) -> int:
        """Return how many of the inserted blocks have gone again."""
        return sum(self.evicted_blocks.values()) + self.expired_blocks + self.discarded_blocks

    @property
    def reused_tokens(self) -> int:
        return (
            self.cached_block_tokens
            + self.cached_partial_tokens
            + self.cached_tail_tokens
            + self.restored_tokens
        )

    def add(self, other: Totals) -> None:
        """Add all of another's counts."""
        self.requests += other.requests
        self.hits += other.hits
        self.prompt_tokens += other.prompt_tokens
        self.cached_block_tokens += other.cached_block_tokens
        self.cached_partial_tokens += other.cached_partial_tokens
        self.cached_tail_tokens += other.cached_tail_tokens
        self.restored_tokens += other.restored_tokens
        self.inserted_blocks += other.inserted_blocks
        for cause, count in other.evicted_blocks.items():
            self.evicted_blocks[cause] = self.evicted_blocks.get(cause, 0) + count
        self.expired_blocks += other.expired_blocks
        self.discarded_blocks += other.discarded_blocks
        self.restored_blocks += other.restored_blocks
        self.time_saved_s += other.time_saved_s


class Space:
    """One namespace: its name, its root while it has one, what it holds and what it has counted."""

    __slots__ = ("_seed", "key", "num_blocks", "num_pinned_blocks", "root", "totals")

    def __init__(self, key: NamespaceKey) -> None:
        self.key = key
        self.root: Node | None = None
        self.num_blocks = 0
        """Nodes in the tree, private and not full ones, too."""
        self.num_pinned_blocks = 0
        self.totals = Totals()
        self._seed: PrefixDigest | None = None

    def __repr__(self) -> str:
        return f"Space({self.id}, {self.num_blocks} blocks)"

    @property
    def seed(self) -> PrefixDigest:
        """Return the digest that the chains of this namespace start from."""
        if self._seed is None:
            self._seed = self.key.seed()
        return self._seed

    @property
    def position(self) -> float:
        """Return a number in [0, 1) that is the same for this namespace for ever: who is in a canary."""
        return int.from_bytes(self.seed[:6], "big") / (1 << 48)

    @property
    def id(self) -> str:
        """Return the name by which people know it: nothing can be learned from it."""
        return self.seed.hex()[:ID_DIGITS]


class SpaceTable:
    """All spaces, the least recently used first."""

    def __init__(self, *, max_spaces: int = MAX_SPACES) -> None:
        self.other = Totals()
        """What was counted by spaces that have been forgotten."""
        self._max_spaces = max_spaces
        self._spaces: dict[NamespaceKey, Space] = {}

    def __len__(self) -> int:
        return len(self._spaces)

    @property
    def all(self) -> Collection[Space]:
        return self._spaces.values()

    def get(self, key: NamespaceKey) -> Space | None:
        """Return a space if it is remembered; no recency is touched."""
        return self._spaces.get(key)

    def use(self, key: NamespaceKey) -> Space:
        """Return a space, made if it is new, as the most recently used one."""
        space = self._spaces.pop(key, None)
        if space is None:
            if len(self._spaces) >= self._max_spaces:
                self._forget_one()
            space = Space(key)
        self._spaces[key] = space
        return space

    def totals(self) -> Totals:
        """Return the sum over everything that was ever counted."""
        total = Totals()
        total.add(self.other)
        for space in self._spaces.values():
            total.add(space.totals)
        return total

    def _forget_one(self) -> None:
        """Fold the least recently used space without a root into ``other``; none if all have roots.

        Roots are in proportion to what is cached (``PrefixTree.root``), and so is this table.
        """
        for key, space in self._spaces.items():
            if space.root is None:
                self.other.add(space.totals)
                del self._spaces[key]
                return
