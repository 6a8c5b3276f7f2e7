"""Whether a batch that could start should wait for one more call: the rule, and what it looks at.

The compute thread is free, and ``n`` calls of one model wait, fewer than fill a batch. Suppose that one more
call, of ``t`` tokens, comes in ``g`` seconds. With a model that takes ``a + b * tokens``:

- Start now: the newcomer waits for this batch to end and is computed in the next one.
- Wait for it: it ends with this batch, ``a - g`` seconds earlier than so. The ``n`` that wait end
  ``g + b * t`` later, each.

Waiting pays if ``a - g > n * (g + b * t)``. Nobody knows ``g``, but the last ``NUM_GAPS`` gaps between calls
are known: :meth:`Arrivals.hold_s` takes the limit for which the sum over these gaps (those longer than what
has already gone by since the last call) is best, gaps beyond the limit costing ``n`` times the limit for
nothing. If no limit gains clearly, nothing is held: what comes in bursts is awaited within the burst, not
from one burst to the next; what comes at random is not awaited.

Before any of that: **while computing call by call would keep up, nothing is held at all**. That is so as long
as the mean gap is not smaller than what the mean call takes by itself. On a server with little to do, every
call that finds the compute thread idle starts at once, however its neighbours came.

The rule is about calls that are about to come. Under a load that keeps the thread busy, batches fill while
the one before is computed, ``n`` is large, and nothing is held either.

That batch servers are best run by such thresholds: R. K. Deb and R. F. Serfozo, "Optimal control of batch
service queues", Advances in Applied Probability 5 (1973).
"""

from __future__ import annotations

from collections import deque

from server.predict.cost import CostModel

__all__ = ["RESOLUTION_S", "Arrivals"]

NUM_GAPS = 32
MIN_GAPS = 8
"""Fewer tell nothing."""
KEEP = 0.9
MARGIN = 1.25
"""How much longer than the gap that was reckoned with: calls are not punctual to the microsecond."""
CLEAR_SHARE = 0.3
"""A limit must gain so much of ``a`` for each gap: the best of 32 limits on 32 gaps looks better than it is.
With less than this, calls that come at random end later for it."""
RESOLUTION_S = 20e-6
"""Nothing is held for less."""


class Arrivals:
    """The latest calls of one model."""

    __slots__ = ("_gaps", "_sum_gaps_s", "last_s", "mean_tokens")

    def __init__(self) -> None:
        self._gaps: deque[float] = deque()
        self._sum_gaps_s = 0.0
        self.last_s: float | None = None
        self.mean_tokens = 0.0

    def note(self, now_s: float, num_tokens: int) -> None:
        """Take in a call that has come."""
        if self.last_s is None:
            self.mean_tokens = num_tokens
        else:
            gap_s = now_s - self.last_s
            self._gaps.append(gap_s)
            self._sum_gaps_s += gap_s
            if len(self._gaps) > NUM_GAPS:
                self._sum_gaps_s -= self._gaps.popleft()
            self.mean_tokens += (1.0 - KEEP) * (num_tokens - self.mean_tokens)
        self.last_s = now_s

    def hold_s(self, now_s: float, *, num_calls: int, cost: CostModel) -> float:
        """Return how long from now the next call is worth waiting for; 0: start now."""
        num_gaps = len(self._gaps)
        if cost.a_s <= 0.0 or num_gaps < MIN_GAPS or self.last_s is None:
            return 0.0
        if self._sum_gaps_s >= num_gaps * cost.expected_s(self.mean_tokens):
            return 0.0
        gone_s = now_s - self.last_s
        left = sorted(gap_s - gone_s for gap_s in self._gaps if gap_s - gone_s > RESOLUTION_S)
        gain_of_one_s = cost.a_s - num_calls * cost.b_s * self.mean_tokens
        best_s, best_gain_s, gain_s = 0.0, 0.0, 0.0
        for index, gap_s in enumerate(left):
            gain_s += gain_of_one_s - gap_s * (1 + num_calls)
            in_vain_s = (len(left) - index - 1) * num_calls * gap_s
            if gain_s - in_vain_s > best_gain_s:
                best_s, best_gain_s = gap_s, gain_s - in_vain_s
        is_clear = best_gain_s > CLEAR_SHARE * cost.a_s * len(left)
        return MARGIN * best_s if is_clear else 0.0
