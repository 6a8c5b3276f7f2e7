"""What a policy sees of an entry, and what an eviction queue asks of a policy.

A policy judges *entries*: nodes of the server's tree, and the ghosts of the simulator and the trial. It
never takes one away; the queue asks which evictable leaf is worth least. So that this costs O(log n), a
policy sorts leaves into a few **groups**. Inside a group the **order** decides and does not depend on
the time; between the groups the **worth** of their heads does, at the time of asking.

::

    opened(path) ─► inserted(entry) ... ─► closed(path) ─► [leaf: group_of, order] ─► removed(entry)
                     every full block       output known     the least worth of the heads goes first

An order and a group are read when a leaf is listed (at the end of each use, and when its last child has
gone) and again when it surfaces: in between its order should only rise. A policy keeps what it knows of
an entry in ``entry.mark``, which nobody else reads. A mark that is None, or another policy's, is a new
entry's: a policy may take over a warm cache.

Every policy object stands alone: no state outside it. One thread. Times are seconds of the caller's clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Protocol

__all__ = ["Entry", "EvictionPolicy", "digest_of"]


class Entry(Protocol):
    """What a policy may read of a cached block. Everything but ``mark`` is read-only to it."""

    last_used: int
    """Logical time of the last use; the ends of one path have the same."""
    hits: int
    inserted_at: float | None
    num_children: int
    depth: int
    """Blocks from the root; the first block's is 1."""
    mark: Any

    @property
    def parent(self) -> Any:
        """The entry above, the root's entry above the first block; None of a removed one."""

    @property
    def key(self) -> Hashable:
        """What tells siblings apart, the same when the same block is inserted again."""

    @property
    def serial(self) -> int:
        """Unique in the process, in the order of creation."""

    @property
    def is_root(self) -> bool: ...


class EvictionPolicy(ABC):
    """Decide which evictable leaf goes first. The events do nothing unless a policy wants them."""

    name: ClassVar[str]
    description: ClassVar[str]
    """One line for people who choose."""
    num_groups: int = 1
    gives_rounds: ClassVar[bool] = False
    """Whether ``gets_another_round`` is ever true: asked once for each leaf that goes, it is not for free."""
    worth_lifetime_s: float = 0.0
    """For how long a worth that was asked for may be used; the heads may change meanwhile."""
    epoch: int = 0
    """A policy that changes its mind about all worths at once counts this up."""

    def __init__(self, *, capacity_blocks: int, block_tokens: int = 16) -> None:
        if capacity_blocks < 1 or block_tokens < 1:
            raise ValueError("capacity_blocks and block_tokens must be at least 1")
        self.capacity_blocks = capacity_blocks
        self.block_tokens = block_tokens

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.capacity_blocks} blocks)"

    # B027: empty on purpose, not abstract.
    def opened(self, path: Sequence[Entry], num_tokens: int, now: float) -> None:  # noqa: B027
        """A request of ``num_tokens`` prompt tokens was admitted; ``path`` is what it found, root first.

        Called after the path was touched and its hits were counted, before anything is inserted or
        evicted for the request. The path is empty if nothing was found.
        """

    def inserted(self, entry: Entry, now: float) -> None:  # noqa: B027
        """A full block that anybody may find has entered the tree below ``entry.parent``.

        Not called for blocks that are not full, nor for private ones: these have no mark.
        """

    def closed(  # noqa: B027
        self, path: Sequence[Entry], num_tokens: int, num_output_tokens: int, now: float
    ) -> None:
        """A request has ended, after ``num_output_tokens`` of output; ``path`` is all it leaves, root first.

        Called before its hold is dropped, so before any of its entries is listed again. ``num_tokens`` is
        the prompt's length. Not called for a request that was cancelled, preempted or failed.
        """

    def removed(self, entry: Entry, now: float, *, evicted: bool) -> None:  # noqa: B027
        """An entry leaves: by eviction, or because it expired, was released or cleared.

        ``entry.parent`` is still set. Entries without a mark may come here, too.
        """

    def group_of(self, entry: Entry) -> int:
        """Return the group of a leaf, from 0 to ``num_groups`` - 1."""
        return 0

    @abstractmethod
    def order(self, entry: Entry) -> float:
        """Return the place of a leaf in its group, the lowest goes first."""

    def gets_another_round(self, entry: Entry) -> bool:
        """Say whether a leaf that is about to go shall be listed anew instead, in another place."""
        return False

    def worth(self, group: int, head: Entry, now: float) -> float:
        """Return what the head of a group is worth now; among the groups the lowest goes first."""
        return 0.0


def digest_of(entry: Entry, parent_digest: int) -> int:
    """Return a number for an entry's path, equal when the same path is cached again. In this process only."""
    return hash((parent_digest, entry.key))
