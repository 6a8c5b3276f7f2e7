"""The clairvoyant bound: evict the leaf whose next use is farthest in the future."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence

from kvcore.policies import Entry, EvictionPolicy

__all__ = ["OPTIMAL", "OptimalPolicy"]

OPTIMAL = "optimal"


class OptimalPolicy(EvictionPolicy):
    """Belady's rule on a trace that is known beforehand; for ``GhostCache`` only, one ``request`` each."""

    name = OPTIMAL
    description = "the clairvoyant bound: knows the trace, evicts what is used again last"

    def __init__(
        self, uses: Sequence[tuple[Hashable, Sequence[Hashable]]], *, capacity_blocks: int, block_tokens: int
    ) -> None:
        """``uses`` are the trace's (namespace, blocks), in order."""
        super().__init__(capacity_blocks=capacity_blocks, block_tokens=block_tokens)
        self._number = -1
        self._uses: dict[int, list[int]] = {}
        for number, (namespace, blocks) in enumerate(uses):
            digest = hash(namespace)
            for block in blocks:
                digest = hash((digest, block))
                self._uses.setdefault(digest, []).append(number)

    def opened(self, path: Sequence[Entry], num_tokens: int, now: float) -> None:
        self._number += 1

    def inserted(self, entry: Entry, now: float) -> None:
        parent = entry.parent
        entry.mark = hash((hash(parent.key) if parent.is_root else parent.mark, entry.key))

    def order(self, entry: Entry) -> float:
        uses = self._uses[entry.mark]
        place = bisect_right(uses, self._number)
        return -float(uses[place] if place < len(uses) else 1 << 60)
