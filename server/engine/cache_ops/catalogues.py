"""Catalogues of the cache, kept for a while: pages of one list, and statistics, share them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable

from kvcore.clock import Clock
from kvcore.manager import CacheManager
from kvcore.runs import Run, RunCatalogue
from server.engine.cache_ops.interface import MAX_NODES_PER_PIECE

__all__ = ["Catalogues"]

FRESH_S = 0.5
"""Statistics may count the entries of a catalogue of this age."""
KEEP_S = 30.0
"""Further pages of a list may come from one of this age."""


class Catalogues:
    """The last catalogue made, and the making of another."""

    def __init__(self, cache: CacheManager, clock: Clock) -> None:
        self._cache = cache
        self._clock = clock
        self._last: RunCatalogue | None = None
        self._condition: Hashable = None

    def complete(
        self,
        condition: Hashable = None,
        accepts: Callable[[Run], bool] | None = None,
        *,
        max_age_s: float | None = None,
    ) -> Generator[None, None, RunCatalogue]:
        """Return a catalogue of the runs that ``accepts`` takes, which ``condition`` names.

        It is made anew unless the last one was for the same condition and is not older than ``max_age_s``.
        """
        now = self._clock.now()
        last = self._last
        is_same = last is not None and self._condition == condition
        if is_same and last is not None and max_age_s is not None and now - last.made_at <= max_age_s:
            return last
        catalogue = RunCatalogue(self._cache.tree, cost=self._cache.cost, now=now, accepts=accepts)
        while not catalogue.advance(MAX_NODES_PER_PIECE):
            yield None
        self._last, self._condition = catalogue, condition
        return catalogue
