"""Encodings by key, the least recently used leaving first.

An entry stays when its lifetime is over: lookups no longer get it, but the next one compares it with the
fresh encoding, which it has to compute anyway. That is free evidence about a longer lifetime.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from server.predict.reuse.predictor import Floats, Singles

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

    def __init__(self, *, max_entries: int, max_bytes: int, bytes_per_entry: int) -> None:
        """Hold at least one entry."""
        self.capacity = max(1, min(max_entries, max_bytes // bytes_per_entry))
        self.bytes_per_entry = bytes_per_entry
        self.num_evicted = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return len(self._entries) * self.bytes_per_entry

    def find(self, key: bytes) -> Entry | None:
        """Return the entry, whatever its age, as the most recently used one."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def hits_of(self, key: bytes) -> int:
        """Return the hits of what is kept under the key now. Uses nothing."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry.num_hits

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep it in place of what was there; make room."""
        before = self._entries.pop(key, None)
        if before is not None:
            entry.num_hits = before.num_hits
        self._entries[key] = entry
        while len(self._entries) > self.capacity:
            self._entries.popitem(last=False)
            self.num_evicted += 1

    def clear(self) -> int:
        """Forget all; return how many there were."""
        count = len(self._entries)
        self._entries.clear()
        return count

    def keys(self) -> list[bytes]:
        """Return the keys, the least recently used first."""
        return list(self._entries)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if a bound does not hold or arrays do not belong together."""
        assert len(self._entries) <= self.capacity, "more entries than may be"
        for entry in self._entries.values():
            assert entry.row.base is None, "an entry holds on to the batch that it came from"
            assert entry.encoding.base is None, "an entry holds on to the batch that it came from"
            assert entry.num_hits >= 0
