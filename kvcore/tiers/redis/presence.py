"""What a tier remembers of a remote place: what it said was there, or not, and until when to believe it."""

from __future__ import annotations

from collections import OrderedDict

from kvcore.clock import Clock
from kvcore.tiers.interface import ObjectKey

__all__ = ["PresenceTable"]


class PresenceTable:
    """Answers, each believed for a bounded time; the oldest go when there are too many. Not locked."""

    def __init__(self, clock: Clock, *, present_s: float, absent_s: float, max_entries: int) -> None:
        self._clock = clock
        self._present_s = present_s
        self._absent_s = absent_s
        self._max_entries = max_entries
        self._entries: OrderedDict[ObjectKey, tuple[bool, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: ObjectKey) -> bool | None:
        """Return whether the object is there; None: not known, or too long ago."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        is_present, until = entry
        if self._clock.now() >= until:
            del self._entries[key]
            return None
        return is_present

    def put(self, key: ObjectKey, *, is_present: bool, at_most_s: float | None = None) -> None:
        """Remember an answer that was given just now."""
        believed_s = self._present_s if is_present else self._absent_s
        if at_most_s is not None:
            believed_s = min(believed_s, at_most_s)
        self._entries[key] = (is_present, self._clock.now() + believed_s)
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def forget(self, key: ObjectKey) -> None:
        self._entries.pop(key, None)

    def clear(self) -> None:
        self._entries.clear()
