"""Vectors by cosine: the nearest one, by comparing with all of them.

One table for each partition (a tenant, and what else must be equal); rows are unit vectors in a float32
matrix that grows by doubling. 10,000 vectors of 384 are 15 MB: one matrix-vector product reads them once.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from server.predict.reuse.predictor import Singles

__all__ = ["Neighbours"]

FIRST_ROWS = 16


class Neighbours:
    """One partition. ``parts`` vectors for each name: a text, or a text and its pair."""

    def __init__(self, num_dimensions: int, parts: int) -> None:
        self._matrices = [np.empty((FIRST_ROWS, num_dimensions), np.float32) for _ in range(parts)]
        self._names: list[Hashable] = []
        self._places: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: Hashable, vectors: list[Singles]) -> None:
        """Add unit vectors under a name that is not there yet."""
        place = len(self._names)
        if place == len(self._matrices[0]):
            self._matrices = [np.concatenate([matrix, np.empty_like(matrix)]) for matrix in self._matrices]
        for matrix, vector in zip(self._matrices, vectors, strict=True):
            matrix[place] = vector
        self._names.append(name)
        self._places[name] = place

    def remove(self, name: Hashable) -> None:
        """Take a name away; the last one moves into its place."""
        place, last = self._places.pop(name), len(self._names) - 1
        if place != last:
            for matrix in self._matrices:
                matrix[place] = matrix[last]
            self._names[place] = self._names[last]
            self._places[self._names[place]] = place
        self._names.pop()

    def nearest(self, vectors: list[Singles]) -> tuple[Hashable, float] | None:
        """Return the most similar name, and how similar: the least of its parts' cosines. None: no names."""
        count = len(self._names)
        if not count:
            return None
        similarity: Singles = np.minimum.reduce(
            [matrix[:count] @ vector for matrix, vector in zip(self._matrices, vectors, strict=True)]
        )
        place = int(similarity.argmax())
        return self._names[place], min(1.0, float(similarity[place]))

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if names and places disagree."""
        assert self._places == {name: place for place, name in enumerate(self._names)}
