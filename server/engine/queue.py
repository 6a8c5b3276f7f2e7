"""The waiting queue: longest cached prefix first, aged by response ratio, with a bound.

A waiting sequence belongs to a bucket by priority and by the size of what it has to compute (powers of
two of uncached tokens); inside a bucket it stands by arrival. The next one is the bucket head with the
highest response ratio ``(waited + service) / service``: short work, which is what a long cached prefix
makes of a request, goes first, and everything overtakes in the end. Choosing looks at heads alone, so it
costs the same at ten and at ten thousand waiting.

**Bound.** A head that has waited longer than ``waiting_bound_s`` goes before everything else, the
earliest arrival first, and if it does not fit nothing else is admitted either. So once a request has
waited that long, none that arrived after it is admitted before it.

**Lazy.** An entry that moved or left stays in its heap until it surfaces, or until such entries are more
than the others. A need that grew (something was evicted) is noticed when the sequence surfaces.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterator
from itertools import count

from server.engine.request import Sequence

__all__ = ["WaitingQueue"]

Bucket = tuple[int, int]
Entry = tuple[int, int, Sequence]
"""Arrival, place (a serial number, valid while it is the sequence's), sequence."""
Rank = tuple[int, float, float]
"""The lowest goes first: overdue by arrival, then by priority and response ratio."""

SLACK = 1024
"""Dead entries tolerated before the heaps are rebuilt, beyond the living ones."""

MAX_DEAD_TO_POP = 32
"""From so many dead entries in a row on, rebuilding a heap is cheaper than popping them one by one."""


class WaitingQueue:
    """Order waiting sequences by what ``need_of`` says that they have to compute, in tokens."""

    def __init__(self, need_of: Callable[[Sequence], int], *, waiting_bound_s: float) -> None:
        self.waiting_bound_s = waiting_bound_s
        self.seconds_per_token = 1e-3
        """Measured cost of computing one token; only ratios matter."""
        self._need_of = need_of
        self._buckets: dict[Bucket, list[Entry]] = {}
        self._members: dict[Sequence, None] = {}
        self._num_entries = 0
        self._places = count(1)
        self._arrivals = count(1)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def number(self, sequence: Sequence) -> None:
        """Give a new sequence its place in the order of arrival."""
        if not sequence.arrival:
            sequence.arrival = next(self._arrivals)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that was here before keeps its place in the order of arrival."""
        self.number(sequence)
        self._members[sequence] = None
        self._place(sequence, self._bucket_of(sequence))

    def update(self, sequence: Sequence) -> None:
        """Note that a waiting sequence needs more or less than before."""
        if sequence in self._members:
            bucket = self._bucket_of(sequence)
            if bucket != sequence.bucket:
                self._place(sequence, bucket)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out. Does nothing if it is not waiting."""
        if sequence in self._members:
            del self._members[sequence]
            sequence.bucket, sequence.place = None, 0

    def smallest_need(self) -> tuple[int, int]:
        """Return the size class that needs least, as an upper bound in tokens, and its size at most.

        ``(0, 0)`` if nobody waits.
        """
        classes: dict[int, int] = {}
        for bucket in list(self._buckets):
            if self._head(bucket) is not None:
                classes[bucket[1]] = classes.get(bucket[1], 0) + len(self._buckets[bucket])
        if not classes:
            return 0, 0
        smallest = min(classes)
        return (1 << smallest) - 1, classes[smallest]

    def candidates(
        self, now: float, *, limit: int, largest: int | None = None
    ) -> Generator[tuple[Sequence, bool], None, None]:
        """Yield at most ``limit`` sequences in the order of admission, with "is overdue" beside each.

        Those that need more than ``largest`` tokens are left out, unless they are overdue. The caller removes
        those that it admits; others keep their places.
        """
        set_aside: list[tuple[Bucket, Entry]] = []
        heads: list[tuple[Rank, int, Bucket]] = []
        for bucket in list(self._buckets):
            self._push_head(heads, bucket, now, largest)
        try:
            for _ in range(limit):
                best = self._pop_head(heads, now, largest)
                if best is None:
                    return
                bucket, is_overdue = best
                entry = heapq.heappop(self._buckets[bucket])
                set_aside.append((bucket, entry))
                yield entry[2], is_overdue
                self._push_head(heads, bucket, now, largest)
        finally:
            for bucket, entry in set_aside:
                if entry[2].place == entry[1]:
                    heapq.heappush(self._buckets.setdefault(bucket, []), entry)
                else:
                    self._num_entries -= 1

    def _push_head(
        self, heads: list[tuple[Rank, int, Bucket]], bucket: Bucket, now: float, largest: int | None
    ) -> None:
        head = self._head(bucket)
        if head is None:
            return
        arrival, place, sequence = head
        waited = now - sequence.request.submitted_at
        priority, size_class = bucket
        if waited > self.waiting_bound_s:
            heapq.heappush(heads, ((0, arrival, 0.0), place, bucket))
        elif largest is None or 1 << (size_class - 1) <= largest:
            service_s = (1 << size_class) * self.seconds_per_token
            heapq.heappush(heads, ((1, -priority, -(waited + service_s) / service_s), place, bucket))

    def _pop_head(
        self, heads: list[tuple[Rank, int, Bucket]], now: float, largest: int | None
    ) -> tuple[Bucket, bool] | None:
        """Return the bucket whose head goes next, and whether that is overdue."""
        while heads:
            rank, place, bucket = heapq.heappop(heads)
            head = self._head(bucket)
            if head is None:
                continue
            true_bucket = self._bucket_of(head[2])
            if true_bucket != bucket:  # its need has changed unnoticed
                self._place(head[2], true_bucket)
                self._push_head(heads, true_bucket, now, largest)
            elif head[1] == place:
                return bucket, rank[0] == 0
            self._push_head(heads, bucket, now, largest)
        return None

    def _head(self, bucket: Bucket) -> Entry | None:
        """Return the first living entry of a bucket; drop dead ones before it, and an empty bucket."""
        heap = self._buckets.get(bucket)
        if heap is None:
            return None
        for _ in range(MAX_DEAD_TO_POP):
            if not heap or heap[0][2].place == heap[0][1]:
                break
            heapq.heappop(heap)
            self._num_entries -= 1
        else:
            self._drop_dead(heap)
        if not heap:
            del self._buckets[bucket]
            return None
        return heap[0]

    def _place(self, sequence: Sequence, bucket: Bucket) -> None:
        sequence.bucket, sequence.place = bucket, next(self._places)
        heapq.heappush(self._buckets.setdefault(bucket, []), (sequence.arrival, sequence.place, sequence))
        self._num_entries += 1
        if self._num_entries > 2 * len(self._members) + SLACK:
            self._rebuild()

    def _rebuild(self) -> None:
        """Drop all dead entries."""
        for bucket, heap in list(self._buckets.items()):
            self._drop_dead(heap)
            if not heap:
                del self._buckets[bucket]

    def _drop_dead(self, heap: list[Entry]) -> None:
        before = len(heap)
        heap[:] = [entry for entry in heap if entry[2].place == entry[1]]
        heapq.heapify(heap)
        self._num_entries -= before - len(heap)

    def _bucket_of(self, sequence: Sequence) -> Bucket:
        return (sequence.request.spec.priority, max(1, self._need_of(sequence)).bit_length())
