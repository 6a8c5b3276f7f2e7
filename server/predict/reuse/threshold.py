"""How similar an input must be for its neighbour's response: learned from answers that were compared.

Similarities fall into bins, narrower towards 1 (each half as far from it as the one before, in two steps):

    cosine   -1 ----- 0.5 --- 0.65 -- 0.75 - 0.82 ... 0.999 - 1
    bin            0        1       2       3      ...       last

Each bin has an account in a risk meter: of how many comparisons the neighbour's response was another one.
Every input that is computed although it has a neighbour is such a comparison, so that learning needs no
reuse; of those that are reused a sampled share is computed as well. The threshold is the lower end of the
lowest bin that is **proved** to be under the rate, no bin above it being proved to be over it. One
assumption: among inputs above the threshold, more similar ones are no worse. It is watched: a bin that is
proved over the rate moves the threshold above itself, whatever is below it. As long as no bin is proved,
nothing is reused; a few bad comparisons are enough for a bin to lose its proof.

Each bin being under the rate, every mixture of them is. The confidence is shared out over the bins, because
the best of many is chosen.

When the alarm fires, inputs are no longer what they were: the bins forget what they learned, and nothing is
reused until it has been learned anew.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from kvcore.risk import RiskBudget, RiskMeter

__all__ = ["NOTHING", "Threshold"]

EDGES = tuple(1.0 - 2.0 ** (-step / 2) for step in range(2, 21))
"""Lower ends of all bins but the first: 0.5, 0.65, 0.75, ... 0.999."""

NOTHING = 2.0
"""The threshold that no similarity reaches."""

CONFIDENCE = 0.95
"""That no bin is taken for safe wrongly, of all."""


class Threshold:
    """See the module's text. One thread, or a lock around it."""

    def __init__(self, max_error_rate: float) -> None:
        """Hold a rate between 0 and 1. Raises ``ValueError``."""
        self._budget = RiskBudget(max_changed=max_error_rate)
        self.value = NOTHING
        self.num_resets = 0
        self._bins = self._make_bins()

    def observe(self, similarity: float, cosine: float, l2: float, *, changed: bool) -> bool:
        """Learn from one comparison; say whether the threshold moved."""
        place = bisect_right(EDGES, similarity)
        if place == 0:  # nothing of that sort will be reused whatever is learned
            return False
        self._bins.observe(place, cosine, l2, changed)
        return self._set()

    def reset(self) -> bool:
        """Forget everything; say whether the threshold moved."""
        self.num_resets += 1
        self._bins = self._make_bins()
        return self._set()

    def _make_bins(self) -> RiskMeter:
        confidence = 1.0 - (1.0 - CONFIDENCE) / len(EDGES)
        assert self._budget.max_changed is not None
        needed = math.log(1.0 / (1.0 - confidence)) / self._budget.max_changed
        # As in reuse.meters: four times what proves a bin safe in which nothing was ever wrong.
        return RiskMeter(
            self._budget,
            confidence=confidence,
            half_life=max(100.0, needed * 2 * math.log(2)),
            max_keys=len(EDGES),
            share_interval="chernoff",
        )

    def _set(self) -> bool:
        before, lowest = self.value, None
        for place in range(len(EDGES), 0, -1):
            if self._bins.is_over_budget(place):
                break
            if self._bins.is_proven_safe(place):
                lowest = place
        self.value = NOTHING if lowest is None else EDGES[lowest - 1]
        return self.value != before
