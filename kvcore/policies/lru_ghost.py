"""What LRU would hold, as cheaply as it can be known: one ordered table instead of a tree and a queue.

A request uses its whole path at once, and of what was used at once the deepest goes first. So if each
request's blocks are put to the young end from the deepest to the first, the old end is always the leaf
that LRU evicts, and no block ever goes before what hangs below it. Keys name whole prefixes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

__all__ = ["LruGhost"]


class LruGhost:
    """Decides as ``GhostCache`` with ``LruPolicy`` does (a test holds it to that), some ten times faster."""

    def __init__(self, *, capacity_blocks: int) -> None:
        if capacity_blocks < 1:
            raise ValueError("capacity_blocks must be at least 1")
        self._capacity = capacity_blocks
        self._entries: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def request(self, blocks: Sequence[Hashable]) -> int:
        """Serve one request: return how many of its leading blocks were there, and keep all that fits."""
        entries = self._entries
        num_matched = len(blocks)
        for position, key in enumerate(blocks):
            if key not in entries:
                num_matched = position
                break
        for key in reversed(blocks[: self._capacity]):
            entries[key] = None
            entries.move_to_end(key)
        for _ in range(len(entries) - self._capacity):
            entries.popitem(last=False)
        return num_matched
