"""ARC, the adaptive replacement cache (Megiddo and Modha, FAST 2003), made for trees.

Entries used once and entries used again are two lists in order of recency. Each has ghosts of what left
it last; a ghost that comes back says that its list should have been longer, and moves the border.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcore.policies.interface import Entry, EvictionPolicy, digest_of

__all__ = ["ArcPolicy"]

ONCE, AGAIN = 0, 1


class _Mark:
    """Where an entry stands."""

    __slots__ = ("digest", "side")

    def __init__(self, digest: int, side: int) -> None:
        self.digest = digest
        self.side = side


class ArcPolicy(EvictionPolicy):
    """Two lists, two lists of ghosts, and a border that learns."""

    name = "arc"
    description = "ARC: recency and frequency, balanced by what comes back after it was evicted"
    num_groups = 2

    def __init__(self, *, capacity_blocks: int, block_tokens: int = 16) -> None:
        super().__init__(capacity_blocks=capacity_blocks, block_tokens=block_tokens)
        self._num_in = [0, 0]
        self._ghosts: tuple[dict[int, None], dict[int, None]] = ({}, {})
        self._target = 0.0
        """How many entries used once shall stay."""

    def opened(self, path: Sequence[Entry], num_tokens: int, now: float) -> None:
        for entry in path:
            mark = self._mark(entry)
            if mark.side == ONCE:
                mark.side = AGAIN
                self._num_in[ONCE] -= 1
                self._num_in[AGAIN] += 1

    def inserted(self, entry: Entry, now: float) -> None:
        self._mark(entry)

    def removed(self, entry: Entry, now: float, *, evicted: bool) -> None:
        mark = entry.mark
        if type(mark) is not _Mark:
            return
        self._num_in[mark.side] -= 1
        self.epoch += 1
        if not evicted:
            return
        self._ghosts[mark.side][mark.digest] = None
        capacity = self.capacity_blocks
        if self._num_in[ONCE] + len(self._ghosts[ONCE]) > capacity:
            self._forget(ONCE)
        if sum(self._num_in) + len(self._ghosts[ONCE]) + len(self._ghosts[AGAIN]) > 2 * capacity:
            self._forget(AGAIN)

    def group_of(self, entry: Entry) -> int:
        return self._mark(entry).side

    def order(self, entry: Entry) -> float:
        return entry.last_used

    def worth(self, group: int, head: Entry, now: float) -> float:
        return 0.0 if (group == ONCE) == (self._num_in[ONCE] > self._target) else 1.0

    def _forget(self, side: int) -> None:
        ghosts = self._ghosts[side]
        if ghosts:
            del ghosts[next(iter(ghosts))]

    def _mark(self, entry: Entry) -> _Mark:
        """Return an entry's mark; make one of an entry that is new here, and learn if it was here before."""
        mark = entry.mark
        if type(mark) is _Mark:
            return mark
        parent = entry.parent.mark
        digest = digest_of(entry, parent.digest if type(parent) is _Mark else entry.parent.serial)
        once, again = self._ghosts
        side = ONCE
        if digest in once:
            self._target = min(float(self.capacity_blocks), self._target + max(1.0, len(again) / len(once)))
            del once[digest]
            side = AGAIN
        elif digest in again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))
            del again[digest]
            side = AGAIN
        entry.mark = mark = _Mark(digest, side)
        self._num_in[side] += 1
        return mark
