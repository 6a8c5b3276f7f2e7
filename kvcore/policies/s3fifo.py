"""S3-FIFO (Yang et al., SOSP 2023), made for trees.

A small queue takes what is new; the main one takes what was used again while it was in the small one, or
came back soon after (its digest is still among the ghosts). Both are first in, first out; what was used
since gets another round instead of going, and pays for it with one of its credits.

In a tree only leaves can go, but the queues hold every block, so a hand must pass the covered ones, too::

    small   [ a* b* ][ c d e ]    a, b were used again: they move to main although c hangs below them
    main    f ─ g ─ h             another round for h is one for f and g: all three pay for it

Without the first, blocks that cannot go fill the small queue, and the main one never gives anything up.
Without the second, a path that nobody wants any more pays block by block: it stays for as many rounds as
all of its credits together.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcore.policies.interface import Entry, EvictionPolicy, digest_of

__all__ = ["S3FifoPolicy"]

SMALL_SHARE = 0.1
MAX_CREDIT = 3
USES_TO_STAY = 1
"""Uses in the small queue that lead to the main one. A request uses a block once, so one is a reuse."""
SMALL, MAIN = 0, 1


class _Mark:
    """Where an entry stands."""

    __slots__ = ("credit", "digest", "position", "queue")

    def __init__(self, digest: int, position: int) -> None:
        self.digest = digest
        self.queue = SMALL
        self.position = position
        self.credit = 0


class S3FifoPolicy(EvictionPolicy):
    """Two queues and a list of ghosts. What is above an entry of the main queue is in the main queue, too."""

    name = "s3fifo"
    description = "S3-FIFO: a small queue for what is new, a main one for what was used again"
    gives_rounds = True
    num_groups = 2

    def __init__(self, *, capacity_blocks: int, block_tokens: int = 16) -> None:
        super().__init__(capacity_blocks=capacity_blocks, block_tokens=block_tokens)
        self._small: dict[_Mark, None] = {}
        """What stands in the small queue, first in first."""
        self._ghosts: dict[int, None] = {}
        self._position = 0

    def opened(self, path: Sequence[Entry], num_tokens: int, now: float) -> None:
        for entry in path:
            mark = self._mark(entry)
            mark.credit = min(MAX_CREDIT, mark.credit + 1)

    def inserted(self, entry: Entry, now: float) -> None:
        self._mark(entry)

    def removed(self, entry: Entry, now: float, *, evicted: bool) -> None:
        mark = entry.mark
        if type(mark) is not _Mark:
            return
        self.epoch += 1
        self._small.pop(mark, None)
        if not evicted:
            return
        if mark.queue == SMALL:
            self._ghosts[mark.digest] = None
            if len(self._ghosts) > self.capacity_blocks:
                del self._ghosts[next(iter(self._ghosts))]
        self._move_what_stays()

    def group_of(self, entry: Entry) -> int:
        return self._mark(entry).queue

    def order(self, entry: Entry) -> float:
        return self._mark(entry).position

    def worth(self, group: int, head: Entry, now: float) -> float:
        return 0.0 if (group == SMALL) == self._is_small_full() else 1.0

    def gets_another_round(self, entry: Entry) -> bool:
        mark = self._mark(entry)
        if mark.queue == SMALL:
            if mark.credit < USES_TO_STAY:
                return False
            self._move_path(entry)
            return True
        if not mark.credit:
            return False
        mark.credit -= 1
        mark.position = self._next_position()
        self._charge_above(entry)
        return True

    def _is_small_full(self) -> bool:
        return len(self._small) >= SMALL_SHARE * self.capacity_blocks

    def _move_what_stays(self) -> None:
        """Move the first of the small queue to the main one, up to the first that was not used again."""
        while self._small and self._is_small_full():
            mark = next(iter(self._small))
            if mark.credit < USES_TO_STAY:
                return
            self._move(mark)

    def _move_path(self, entry: Entry) -> None:
        """Move an entry to the main queue, and what is still in the small one above it."""
        while type(mark := entry.mark) is _Mark and mark.queue == SMALL:
            self._move(mark)
            entry = entry.parent

    def _move(self, mark: _Mark) -> None:
        del self._small[mark]
        mark.queue, mark.credit = MAIN, 0
        mark.position = self._next_position()
        self.epoch += 1

    @staticmethod
    def _charge_above(entry: Entry) -> None:
        """Charge the entries that only ``entry`` keeps from being leaves.

        Above a fork another leaf's turn comes first: what many share is not charged by each of them. Walks
        no farther than the uses that earned the credit did.
        """
        while (entry := entry.parent).num_children == 1 and type(mark := entry.mark) is _Mark:
            mark.credit = max(0, mark.credit - 1)

    def _next_position(self) -> int:
        self._position += 1
        return self._position

    def _mark(self, entry: Entry) -> _Mark:
        """Return an entry's mark; make one of an entry that is new here."""
        mark = entry.mark
        if type(mark) is _Mark:
            return mark
        parent = entry.parent.mark
        digest = digest_of(entry, parent.digest if type(parent) is _Mark else entry.parent.serial)
        entry.mark = mark = _Mark(digest, self._next_position())
        self._small[mark] = None
        if digest in self._ghosts:
            del self._ghosts[digest]
            self._move_path(entry)
        return mark
