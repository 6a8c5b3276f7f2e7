"""When nobody waits for an answer any more."""

from __future__ import annotations

import heapq

__all__ = ["Deadlines"]

SLACK = 1024


class Deadlines:
    """Deadlines by request key.

    Those of requests that ended are dropped when they surface, or when they outnumber the others.
    """

    def __init__(self) -> None:
        self._deadline_of: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._deadline_of)

    def add(self, key: int, deadline: float) -> None:
        """Remember that ``key`` must be gone at ``deadline`` (the engine clock's seconds)."""
        self._deadline_of[key] = deadline
        heapq.heappush(self._heap, (deadline, key))

    def discard(self, key: int) -> None:
        """Forget a request that ended."""
        self._deadline_of.pop(key, None)
        if len(self._heap) > 2 * len(self._deadline_of) + SLACK:
            self._heap = [(deadline, k) for k, deadline in self._deadline_of.items()]
            heapq.heapify(self._heap)

    def due(self, now: float) -> list[int]:
        """Remove and return the keys whose deadline has passed."""
        keys = []
        while self._heap and self._heap[0][0] <= now:
            _, key = heapq.heappop(self._heap)
            if self._deadline_of.pop(key, None) is not None:
                keys.append(key)
        return keys
