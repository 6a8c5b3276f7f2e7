"""S3-FIFO (Yang et al., SOSP 2023), made for trees.

A small queue takes what is new, the main one what was used twice while it was in the small one, or came
back soon after (its digest is still among the ghosts). Both are first in, first out; what was used since
gets another round instead of going.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcore.policies.interface import Entry, EvictionPolicy, digest_of

__all__ = ["S3FifoPolicy"]

SMALL_SHARE = 0.1
MAX_CREDIT = 3
USES_TO_STAY = 2
"""Uses in the small queue that lead to the main one."""
SMALL, MAIN = 0, 1


class _Mark:
    """Where an entry stands."""

    __slots__ = ("credit", "digest", "position", "queue")

    def __init__(self, digest: int, queue: int, position: int) -> None:
        self.digest = digest
        self.queue = queue
        self.position = position
        self.credit = 0


class S3FifoPolicy(EvictionPolicy):
    """Two queues and a list of ghosts."""

    name = "s3fifo"
    description = "S3-FIFO: a small queue for what is new, a main one for what was used again"
    num_groups = 2

    def __init__(self, *, capacity_blocks: int, block_tokens: int = 16) -> None:
        super().__init__(capacity_blocks=capacity_blocks, block_tokens=block_tokens)
        self._num_in = [0, 0]
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
        self._num_in[mark.queue] -= 1
        self.epoch += 1
        if evicted and mark.queue == SMALL:
            self._ghosts[mark.digest] = None
            if len(self._ghosts) > self.capacity_blocks:
                del self._ghosts[next(iter(self._ghosts))]

    def group_of(self, entry: Entry) -> int:
        return self._mark(entry).queue

    def order(self, entry: Entry) -> float:
        return self._mark(entry).position

    def worth(self, group: int, head: Entry, now: float) -> float:
        is_small_full = self._num_in[SMALL] >= SMALL_SHARE * self.capacity_blocks
        return 0.0 if (group == SMALL) == is_small_full else 1.0

    def gets_another_round(self, entry: Entry) -> bool:
        mark = self._mark(entry)
        if mark.credit < (USES_TO_STAY if mark.queue == SMALL else 1):
            return False
        self._position += 1
        mark.position = self._position
        if mark.queue == SMALL:
            self._num_in[SMALL] -= 1
            self._num_in[MAIN] += 1
            mark.queue, mark.credit = MAIN, 0
        else:
            mark.credit -= 1
        return True

    def _mark(self, entry: Entry) -> _Mark:
        """Return an entry's mark; make one of an entry that is new here."""
        mark = entry.mark
        if type(mark) is _Mark:
            return mark
        parent = entry.parent.mark
        digest = digest_of(entry, parent.digest if type(parent) is _Mark else entry.parent.serial)
        queue = SMALL
        if digest in self._ghosts:
            del self._ghosts[digest]
            queue = MAIN
        self._position += 1
        entry.mark = mark = _Mark(digest, queue, self._position)
        self._num_in[queue] += 1
        return mark
