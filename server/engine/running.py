"""The running sequences, in order of service."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from kvcore.errors import IntegrityError
from kvcore.lease import Lease
from server.engine.request import Sequence

__all__ = ["RunningSet", "lease_of"]


def lease_of(sequence: Sequence) -> Lease:
    """Return the lease of a running sequence; raise ``IntegrityError`` if it has none."""
    if sequence.lease is None:
        raise IntegrityError(f"{sequence!r} is running without a lease")
    return sequence.lease


class RunningSet:
    """Sorted by priority, then arrival: the order of service, and backwards the order of preemption."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._order: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._order)

    @property
    def last(self) -> Sequence:
        """Return the one that has to go first when blocks run out."""
        return self._order[-1]

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place."""
        insort(self._order, sequence, key=_service_order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out. Raises ``IntegrityError`` if it is not here."""
        index = bisect_left(self._order, _service_order(sequence), key=_service_order)
        if index == len(self._order) or self._order[index] is not sequence:
            raise IntegrityError(f"{sequence!r} is not running")
        del self._order[index]

    def blocks_outstanding(self, sequence: Sequence) -> int:
        """Return how many blocks the tokens that a sequence has need beyond those that it holds."""
        return max(0, -(-len(sequence.tokens) // self._block_size) - len(lease_of(sequence).block_table))

    def all_blocks_outstanding(self) -> int:
        """Return the sum over all: what is promised to sequences that are behind."""
        return sum(map(self.blocks_outstanding, self._order))


def _service_order(sequence: Sequence) -> tuple[int, int]:
    return (-sequence.request.spec.priority, sequence.arrival)
