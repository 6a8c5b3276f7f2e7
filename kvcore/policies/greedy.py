"""Two policies that rank by value and let value fade: LFU with ageing, and cost-aware.

Both are of the GreedyDual family (Cao and Irani, 1997; LFU with dynamic ageing, Arlitt et al., 2000). An
entry's order is its value plus the **tide** at its last use; the tide is the order of what was evicted
last. So an old winner that nobody uses any more is overtaken, at the pace at which the cache turns over.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from kvcore.policies.interface import Entry, EvictionPolicy

__all__ = ["CostAwarePolicy", "LfuPolicy"]

ATTENTION_TOKENS = 8192
"""At this position attention over what came before costs about as much as the rest of the model."""


class FadingPolicy(EvictionPolicy):
    """Order by ``value`` plus the tide at the last use."""

    def __init__(self, *, capacity_blocks: int, block_tokens: int = 16) -> None:
        super().__init__(capacity_blocks=capacity_blocks, block_tokens=block_tokens)
        self._tide = 0.0

    @abstractmethod
    def value(self, entry: Entry) -> float:
        """Return what an entry that has just been used is worth."""

    def opened(self, path: Sequence[Entry], num_tokens: int, now: float) -> None:
        for entry in path:
            entry.mark = self._tide + self.value(entry)

    def inserted(self, entry: Entry, now: float) -> None:
        entry.mark = self._tide + self.value(entry)

    def removed(self, entry: Entry, now: float, *, evicted: bool) -> None:
        if evicted:
            self._tide = max(self._tide, self.order(entry))

    def order(self, entry: Entry) -> float:
        return entry.mark if type(entry.mark) is float else self.value(entry)


class LfuPolicy(FadingPolicy):
    """The value is the number of hits."""

    name = "lfu"
    description = "least frequently used, with ageing: few hits go first, and old hits fade"

    def value(self, entry: Entry) -> float:
        return 1.0 + entry.hits


class CostAwarePolicy(FadingPolicy):
    """The value is the compute that an entry's hits have saved per byte; all blocks have the same bytes."""

    name = "cost"
    description = "compute saved per byte: hits times what a block at that depth costs to compute, fading"

    def value(self, entry: Entry) -> float:
        return (1.0 + entry.hits) * (1.0 + entry.depth * self.block_tokens / ATTENTION_TOKENS)
