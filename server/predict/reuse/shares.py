"""Who gives up a place when there is none: of the owner that holds the most, what it used least recently.

So a tenant that floods a cache pushes out its own entries once it holds more than the others, and a tenant
that holds little keeps it. Of several that hold the most, it is the one that has held so many for longest.
With one owner this is LRU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["FairOrder"]

OwnerT = TypeVar("OwnerT", bound=Hashable)
KeyT = TypeVar("KeyT", bound=Hashable)


class FairOrder(Generic[OwnerT, KeyT]):
    """The order in which keys leave. Every call takes the same time, however many owners there are."""

    def __init__(self) -> None:
        self._keys: dict[OwnerT, OrderedDict[KeyT, None]] = {}
        """Of each owner, the least recently used first; nobody without any."""
        self._holders: dict[int, dict[OwnerT, None]] = {}
        """Who holds so many."""
        self._most = 0
        """The largest number that anybody holds."""

    def use(self, owner: OwnerT, key: KeyT) -> None:
        """Note that the key was used; enter it if it is new."""
        keys = self._keys.get(owner)
        if keys is None:
            keys = self._keys[owner] = OrderedDict()
        elif key in keys:
            keys.move_to_end(key)
            return
        keys[key] = None
        self._move(owner, len(keys) - 1, len(keys))

    def discard(self, owner: OwnerT, key: KeyT) -> None:
        """Take out a key that is there. Raises ``KeyError``."""
        keys = self._keys[owner]
        del keys[key]
        if not keys:
            del self._keys[owner]
        self._move(owner, len(keys) + 1, len(keys))

    def next_to_leave(self) -> KeyT:
        """Return it, and leave it there. There has to be one."""
        owner = next(iter(self._holders[self._most]))
        return next(iter(self._keys[owner]))

    def clear(self) -> None:
        """Forget all."""
        self._keys.clear()
        self._holders.clear()
        self._most = 0

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if owners are counted wrongly."""
        counted = {owner: count for count, owners in self._holders.items() for owner in owners}
        assert counted == {owner: len(keys) for owner, keys in self._keys.items()}
        assert all(self._holders.values()), "a number that nobody holds was kept"
        assert self._most == max(self._holders, default=0)

    def _move(self, owner: OwnerT, before: int, after: int) -> None:
        """Count an owner that holds one more or one less."""
        if before:
            holders = self._holders[before]
            del holders[owner]
            if not holders:
                del self._holders[before]
        if after:
            self._holders.setdefault(after, {})[owner] = None
        if after > self._most or self._most not in self._holders:
            self._most = after
