"""What a batch of a model takes, learned from the batches that it computed: seconds = a + b * tokens.

A weighted least-squares line, in which each batch counts ``KEEP`` times as much as the one after it. Three
things that a plain fit gets wrong:

- Batches that are all of one size say what that size takes, and nothing of how it splits into ``a`` and
  ``b``: the split last seen is kept and scaled. Before any was seen all of it counts as ``b``, so that nobody
  ever waits for a batch to fill on a guess.
- The first batch also pays for what is made once. It counts only until there is a second one.
- One batch in a stall (the machine's, not the model's) would lift the line for long: what takes many times
  what was expected counts as ``MAX_SURPRISE`` times.
"""

from __future__ import annotations

__all__ = ["CostModel"]

KEEP = 0.96
MAX_SURPRISE = 8.0
ENOUGH_SEEN = 8
"""Batches from which on a surprise is the machine's rather than the line's."""
ENOUGH_SPREAD = 0.01
"""Sizes count as different from here on: variance over the squared mean."""


class CostModel:
    """The line of one model. Both coefficients are 0 before the first batch, and never negative."""

    __slots__ = ("_num_seen", "_w", "_x", "_xx", "_xy", "_y", "a_s", "b_s")

    def __init__(self) -> None:
        self.a_s = 0.0
        """Seconds that a batch takes however small it is."""
        self.b_s = 0.0
        """Seconds for each token more."""
        self._num_seen = 0
        self._w = self._x = self._y = self._xx = self._xy = 0.0

    def expected_s(self, num_tokens: float) -> float:
        """Return what a batch of so many tokens should take; 0 if nothing is known."""
        return self.a_s + self.b_s * num_tokens

    def learn(self, num_tokens: int, seconds: float) -> None:
        """Take in a batch that was computed."""
        self._num_seen += 1
        if self._num_seen == 2:
            self._w = self._x = self._y = self._xx = self._xy = 0.0
        elif self._num_seen > ENOUGH_SEEN:
            seconds = min(seconds, MAX_SURPRISE * self.expected_s(num_tokens))
        self._w = KEEP * self._w + 1.0
        self._x = KEEP * self._x + num_tokens
        self._y = KEEP * self._y + seconds
        self._xx = KEEP * self._xx + num_tokens * num_tokens
        self._xy = KEEP * self._xy + num_tokens * seconds
        self._fit()

    def _fit(self) -> None:
        mean_x, mean_y = self._x / self._w, self._y / self._w
        variance = self._xx / self._w - mean_x * mean_x
        if variance > ENOUGH_SPREAD * mean_x * mean_x:
            slope = max(0.0, (self._xy / self._w - mean_x * mean_y) / variance)
            self.a_s = mean_y - slope * mean_x
            if self.a_s < 0.0:
                self.a_s, slope = 0.0, self._xy / self._xx
            self.b_s = slope
        elif (known := self.expected_s(mean_x)) > 0.0:
            self.a_s *= mean_y / known
            self.b_s *= mean_y / known
        else:
            self.a_s, self.b_s = 0.0, mean_y / mean_x if mean_x else 0.0
