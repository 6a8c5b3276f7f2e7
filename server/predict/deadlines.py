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

    The heap holds numbers, not keys: nothing is kept alive of a key that is forgotten. Its number is dropped
    when it surfaces, or when such numbers outnumber the others.
    """

    def __init__(self) -> None:
        self._number_of: dict[KeyT, int] = {}
        self._key_of: dict[int, KeyT] = {}
        self._heap: list[tuple[float, int]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._key_of)

    def add(self, key: KeyT, deadline_s: float) -> None:
        """Remember a key; it has no deadline here so far."""
        number = next(self._numbers)
        self._number_of[key] = number
        self._key_of[number] = key
        heapq.heappush(self._heap, (deadline_s, number))

    def discard(self, key: KeyT) -> None:
        """Forget a key, if it is here."""
        number = self._number_of.pop(key, None)
        if number is None:
            return
        del self._key_of[number]
        if len(self._heap) > 2 * len(self) + SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._key_of]
            heapq.heapify(self._heap)

    def first(self) -> KeyT | None:
        """Return the key with the nearest deadline."""
        while self._heap:
            number = self._heap[0][1]
            if number in self._key_of:
                return self._key_of[number]
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
            key = self._key_of.pop(heapq.heappop(self._heap)[1], None)
            if key is not None:
                del self._number_of[key]
                keys.append(key)
        return keys
