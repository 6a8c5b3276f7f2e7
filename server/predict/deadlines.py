"""What must be gone by when."""

from __future__ import annotations

import heapq
import itertools
from typing import Generic, TypeVar

__all__ = ["Deadlines"]

SLACK = 1024

KeyT = TypeVar("KeyT")


class Deadlines(Generic[KeyT]):
    """Keys by deadline.

    Those of what ended are dropped from the heap when they surface, or when they outnumber the others.
    """

    def __init__(self) -> None:
        self._deadline_of: dict[KeyT, float] = {}
        self._heap: list[tuple[float, int, KeyT]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._deadline_of)

    def add(self, key: KeyT, deadline_s: float) -> None:
        """Remember a key; it has no deadline here so far."""
        self._deadline_of[key] = deadline_s
        heapq.heappush(self._heap, (deadline_s, next(self._numbers), key))

    def discard(self, key: KeyT) -> None:
        """Forget a key, if it is here."""
        if self._deadline_of.pop(key, None) is not None and len(self._heap) > 2 * len(self) + SLACK:
            self._heap = [entry for entry in self._heap if entry[2] in self._deadline_of]
            heapq.heapify(self._heap)

    def first(self) -> KeyT | None:
        """Return the key with the nearest deadline."""
        while self._heap:
            if self._heap[0][2] in self._deadline_of:
                return self._heap[0][2]
            heapq.heappop(self._heap)
        return None

    @property
    def first_s(self) -> float | None:
        """Return the nearest deadline."""
        return None if self.first() is None else self._heap[0][0]

    def due(self, now_s: float) -> list[KeyT]:
        """Remove and return the keys whose deadline has come."""
        keys = []
        while self._heap and self._heap[0][0] <= now_s:
            _, _, key = heapq.heappop(self._heap)
            if self._deadline_of.pop(key, None) is not None:
                keys.append(key)
        return keys
