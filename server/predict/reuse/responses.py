"""Responses to texts: by the exact text, and by what is nearest to it. Nothing crosses a partition.

When there is no room the tenant that holds the most gives up the response it used least recently. Every
response leaves when its lifetime, counted from when it was computed, is over; as that is the same for all,
those that were kept first expire first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from server.predict.messages import Output, TextItem
from server.predict.reuse.neighbours import Neighbours
from server.predict.reuse.predictor import Singles
from server.predict.reuse.shares import FairOrder

__all__ = ["Partition", "Response", "ResponseCache"]

OVERHEAD_BYTES = 1000
"""Of a response's objects and its places in four tables."""


@dataclass(frozen=True, slots=True)
class Partition:
    """What must be equal whatever is similar."""

    tenant: str
    truncate: bool
    has_pair: bool


@dataclass(frozen=True, slots=True)
class Response:
    """What the model said to a text, and when."""

    partition: Partition
    text: TextItem
    output: Output
    vectors: list[Singles]
    """Unit vectors of the text and its pair; empty: it has no neighbours, only repeats."""
    stored_at: float

    @property
    def num_bytes(self) -> int:
        texts = len(self.text.text) + len(self.text.pair or "")
        return 4 * texts + len(self.output.values) + sum(v.nbytes for v in self.vectors) + OVERHEAD_BYTES


class ResponseCache:
    """See the module's text. The owner's lock is around every call."""

    def __init__(self, *, max_entries: int, lifetime_s: float | None) -> None:
        self.max_entries = max_entries
        self._lifetime_s = math.inf if lifetime_s is None else lifetime_s
        self._kept: OrderedDict[tuple[Partition, TextItem], Response] = OrderedDict()
        """Oldest first."""
        self._order: FairOrder[str, tuple[Partition, TextItem]] = FairOrder()
        """By tenant."""
        self._neighbours: dict[Partition, Neighbours] = {}
        self.num_bytes = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._kept)

    def expire(self, now: float) -> set[tuple[Partition, TextItem]]:
        """Drop what is too old; return the names of it."""
        gone = set()
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            if now - oldest.stored_at < self._lifetime_s:
                break
            self._drop(name)
            gone.add(name)
        return gone

    def exact(self, partition: Partition, text: TextItem) -> Response | None:
        """Return the response to this very text, as the most recently used."""
        found = self._kept.get((partition, text))
        if found is not None:
            self._order.use(partition.tenant, (partition, text))
        return found

    def nearest(self, partition: Partition, vectors: list[Singles]) -> tuple[Response, float] | None:
        """Return the response to the most similar text, and how similar it is. It is not used by that."""
        table = self._neighbours.get(partition)
        found = None if table is None else table.nearest(vectors)
        if found is None:
            return None
        text, similarity = found
        assert isinstance(text, TextItem)
        return self._kept[partition, text], similarity

    def put(self, response: Response) -> None:
        """Keep it in place of what was there; make room."""
        name = (response.partition, response.text)
        if name in self._kept:
            self._drop(name)
        self._kept[name] = response
        self._order.use(response.partition.tenant, name)
        self.num_bytes += response.num_bytes
        if response.vectors:
            table = self._neighbours.get(response.partition)
            if table is None:
                table = Neighbours(len(response.vectors[0]), len(response.vectors))
                self._neighbours[response.partition] = table
            table.add(response.text, response.vectors)
        if len(self._kept) > self.max_entries:
            self._drop(self._order.next_to_leave())
            self.num_evicted += 1

    def clear(self) -> int:
        """Forget all; return how many there were."""
        count = len(self._kept)
        self._kept.clear()
        self._order.clear()
        self._neighbours.clear()
        self.num_bytes = 0
        return count

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the tables disagree."""
        assert len(self._kept) <= self.max_entries
        self._order.check_integrity()
        assert self.num_bytes == sum(response.num_bytes for response in self._kept.values())
        ages = [response.stored_at for response in self._kept.values()]
        assert ages == sorted(ages), "responses do not expire in the order in which they were kept"
        near = sum(bool(response.vectors) for response in self._kept.values())
        assert near == sum(len(table) for table in self._neighbours.values())
        for table in self._neighbours.values():
            assert len(table), "an empty partition was kept"
            table.check_integrity()

    def _drop(self, name: tuple[Partition, TextItem]) -> None:
        response = self._kept.pop(name)
        self._order.discard(response.partition.tenant, name)
        self.num_bytes -= response.num_bytes
        if response.vectors:
            table = self._neighbours[response.partition]
            table.remove(response.text)
            if not len(table):
                del self._neighbours[response.partition]
