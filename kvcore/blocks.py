"""The pool of physical KV blocks: which numbers are free.

The pool knows nothing of what a block holds. A block is either free (here), or held by exactly one
tree node, or private to one lease; ``CacheManager.check_integrity`` counts all three.

The free list is a stack: the block given back last is taken first, while its memory is still warm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NewType

from kvcore.errors import IntegrityError, OutOfBlocks

__all__ = ["BlockId", "BlockPool"]

BlockId = NewType("BlockId", int)
"""Number of a physical block, in ``[0, num_blocks)``."""


class BlockPool:
    """Hand out block numbers and take them back."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError("a pool needs at least one block")
        self.num_blocks = num_blocks
        self._free = [BlockId(b) for b in range(num_blocks - 1, -1, -1)]
        self._is_free = bytearray(b"\x01" * num_blocks)

    def __repr__(self) -> str:
        return f"BlockPool({self.num_free} of {self.num_blocks} free)"

    @property
    def num_free(self) -> int:
        """Return how many blocks are in nobody's hands."""
        return len(self._free)

    def take(self, count: int) -> list[BlockId]:
        """Take ``count`` blocks. Raises ``OutOfBlocks`` and changes nothing if there are fewer."""
        if count > len(self._free):
            raise OutOfBlocks(needed=count, available=len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = 0
        return taken

    def give_back(self, blocks: Iterable[BlockId]) -> None:
        """Return blocks to the pool. Raises ``IntegrityError`` for one that is free already."""
        for block in blocks:
            if self._is_free[block]:
                raise IntegrityError(f"block {block} given back twice")
            self._is_free[block] = 1
            self._free.append(block)

    def is_free(self, block: BlockId) -> bool:
        """Say whether a block is in the pool."""
        return bool(self._is_free[block])
