"""Encodings by key; of the tenant that holds the most the least recently used one leaves first.

An entry stays when its lifetime is over: lookups no longer get it, but the next one compares it with the
fresh encoding, which it has to compute anyway. That is free evidence about a longer lifetime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.predict.reuse.predictor import Floats, Singles
from server.predict.reuse.shares import FairOrder

__all__ = ["OVERHEAD_BYTES", "EncodingStore", "Entry"]

OVERHEAD_BYTES = 900
"""Of an entry's objects: three array headers, the entry, the key's header, two references in the table."""


@dataclass(slots=True)
class Entry:
    """An encoding, what it was computed from, and when. The arrays are never written to."""

    row: Singles
    encoding: Singles
    anchor: Floats | None
    """The certificate's."""
    stored_at: float
    num_hits: int = 0


class EncodingStore:
    """A table with a bound on entries; as they are all of one size, it is one on bytes too."""

    def __init__(
        self,
        *,
        max_entries: int,
        max_bytes: int,
        bytes_per_entry: int,
        owner_of: Callable[[bytes], bytes],
    ) -> None:
        """Hold at least one entry. ``owner_of`` a key is its tenant."""
        self.capacity = max(1, min(max_entries, max_bytes // bytes_per_entry))
        self.bytes_per_entry = bytes_per_entry
        self.num_evicted = 0
        self._owner_of = owner_of
        self._entries: dict[bytes, Entry] = {}
        self._order: FairOrder[bytes, bytes] = FairOrder()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return len(self._entries) * self.bytes_per_entry

    def find(self, key: bytes) -> Entry | None:
        """Return the entry, whatever its age, as the most recently used one."""
        entry = self._entries.get(key)
        if entry is not None:
            self._order.use(self._owner_of(key), key)
        return entry

    def hits_of(self, key: bytes) -> int:
        """Return the hits of what is kept under the key now. Uses nothing."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry.num_hits

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep it in place of what was there; make room."""
        before = self._entries.get(key)
        if before is not None:
            entry.num_hits = before.num_hits
        self._entries[key] = entry
        self._order.use(self._owner_of(key), key)
        if len(self._entries) > self.capacity:
            leaving = self._order.next_to_leave()
            self._order.discard(self._owner_of(leaving), leaving)
            del self._entries[leaving]
            self.num_evicted += 1

    def clear(self) -> int:
        """Forget all; return how many there were."""
        count = len(self._entries)
        self._entries.clear()
        self._order.clear()
        return count

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if a bound does not hold or arrays do not belong together."""
        assert len(self._entries) <= self.capacity, "more entries than may be"
        self._order.check_integrity()
        for entry in self._entries.values():
            assert entry.row.base is None, "an entry holds on to the batch that it came from"
            assert entry.encoding.base is None, "an entry holds on to the batch that it came from"
            assert entry.num_hits >= 0
