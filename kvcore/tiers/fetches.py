"""Fetches under way: each ends exactly once, whoever comes first — result, timeout or cancellation.

The engine's thread starts, cancels and polls; a tier's threads finish. A result that comes after its
fetch has ended is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.keys import PrefixDigest
from kvcore.tiers.interface import CacheObject, Fetched, FetchFailure, ObjectKey

__all__ = ["FetchBoard", "PendingFetch"]


@dataclass(slots=True, eq=False)
class PendingFetch:
    """One fetch. Read by the thread that works on it."""

    key: ObjectKey
    namespace: PrefixDigest
    started_at: float
    deadline: float
    is_over: bool = False
    """Nobody waits any more: do not begin, and do not bother to finish."""


class FetchBoard:
    """Pending fetches and their outcomes until they are polled. Any thread may call any method."""

    def __init__(self, tier: str, *, clock: Clock, on_ready: Callable[[], None] | None = None) -> None:
        self._tier = tier
        self._clock = clock
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._pending: dict[PendingFetch, None] = {}
        self._done: list[Fetched] = []
        self.fetched = 0
        self.fetched_bytes = 0
        self.failures: dict[FetchFailure, int] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def start(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> PendingFetch:
        """Begin a fetch: it will be polled, whatever happens."""
        now = self._clock.now()
        fetch = PendingFetch(key, namespace, now, now + timeout_s)
        with self._lock:
            self._pending[fetch] = None
        return fetch

    def retract(self, fetch: PendingFetch) -> None:
        """Undo ``start``: nothing will be polled."""
        with self._lock:
            fetch.is_over = True
            self._pending.pop(fetch, None)

    def succeed(
        self, fetch: PendingFetch, found: CacheObject, *, num_bytes: int, is_lossy: bool = False
    ) -> bool:
        """End a fetch with its object; False if it had ended already."""
        return self._finish(fetch, found, None, num_bytes=num_bytes, is_lossy=is_lossy)

    def fail(self, fetch: PendingFetch, failure: FetchFailure, *, num_bytes: int = 0) -> bool:
        """End a fetch without an object; False if it had ended already."""
        return self._finish(fetch, None, failure, num_bytes=num_bytes)

    def cancel(self, keys: Iterable[ObjectKey]) -> None:
        """End all fetches of these keys now."""
        wanted = set(keys)
        for fetch in self._select(lambda fetch: fetch.key in wanted):
            self.fail(fetch, FetchFailure.CANCELLED)

    def cancel_all(self) -> None:
        """End every fetch now."""
        for fetch in self._select(lambda _: True):
            self.fail(fetch, FetchFailure.CANCELLED)

    def expire(self) -> int:
        """End the fetches that are past their timeout; return how many."""
        now = self._clock.now()
        return sum(
            self.fail(fetch, FetchFailure.TIMEOUT) for fetch in self._select(lambda f: f.deadline <= now)
        )

    def take(self) -> list[Fetched]:
        """Return what has ended since the last call, in that order."""
        with self._lock:
            done, self._done = self._done, []
        return done

    def _select(self, is_wanted: Callable[[PendingFetch], bool]) -> list[PendingFetch]:
        with self._lock:
            return [fetch for fetch in self._pending if is_wanted(fetch)]

    def _finish(
        self,
        fetch: PendingFetch,
        found: CacheObject | None,
        failure: FetchFailure | None,
        *,
        num_bytes: int,
        is_lossy: bool = False,
    ) -> bool:
        with self._lock:
            if fetch.is_over:
                return False
            fetch.is_over = True
            del self._pending[fetch]
            if failure is None:
                self.fetched += 1
                self.fetched_bytes += num_bytes
            else:
                self.failures[failure] = self.failures.get(failure, 0) + 1
            seconds = self._clock.now() - fetch.started_at
            self._done.append(Fetched(fetch.key, self._tier, found, failure, seconds, num_bytes, is_lossy))
        if self._on_ready is not None:
            self._on_ready()
        return True
