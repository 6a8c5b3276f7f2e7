"""What a tier holds, by name, within its byte budget. Holds no content, does no input or output.

Room is made leaves first: an object goes only when nothing that continues it is left, and among those the
one whose last use is longest ago (the deeper one on a tie). So a parent outlives its children, as in the
prefix tree, and what is left of a prefix can always be used from its start.

An entry is reserved (counted, not visible), then whole, then gone. Not thread-safe: its tier locks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvcore.errors import IntegrityError
from kvcore.keys import PrefixDigest
from kvcore.tiers.interface import ObjectKey, ObjectKind

__all__ = ["ForeignFile", "IndexEntry", "ObjectIndex", "Reservation"]

NO_DIGEST = PrefixDigest(b"")


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """Something that takes room but is of no use here: another model's object, say."""

    path: str


@dataclass(slots=True, eq=False)
class IndexEntry:
    """One object, or room for one."""

    key: ObjectKey | ForeignFile
    num_bytes: int
    used_at: float = 0.0
    is_whole: bool = False
    namespace: PrefixDigest = NO_DIGEST
    parent: PrefixDigest = NO_DIGEST
    depth: int = 0
    expires_at: float | None = None
    """On the tier's clock."""
    is_gone: bool = False
    turn: int = 0
    """Of its one valid place in the heap of leaves."""

    @property
    def continues(self) -> PrefixDigest:
        """Return the digest of the object that this one hangs below; empty for none."""
        key = self.key
        is_own_parent = (
            isinstance(key, ObjectKey) and key.kind is ObjectKind.BLOCK and key.digest == self.parent
        )
        return NO_DIGEST if is_own_parent else self.parent


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """Room that was found, and what had to leave for it."""

    entry: IndexEntry
    evicted: list[IndexEntry]


class ObjectIndex:
    """Entries within ``max_bytes``; see the module's text."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_objects = 0
        """Whole ones, foreign files not counted."""
        self._whole_bytes = 0
        self._entries: dict[ObjectKey | ForeignFile, IndexEntry] = {}
        self._num_children: dict[PrefixDigest, int] = {}
        self._leaves: list[tuple[float, int, int, IndexEntry]] = []
        self._expiries: list[tuple[float, int, IndexEntry]] = []
        self._turn = 0

    def __iter__(self) -> Iterator[IndexEntry]:
        """Iterate over whole entries."""
        return (entry for entry in list(self._entries.values()) if entry.is_whole)

    def select(self, namespace: PrefixDigest | None) -> list[IndexEntry]:
        """Return the objects of one namespace or all, those on their way too; foreign files never."""
        return [
            entry
            for entry in self._entries.values()
            if isinstance(entry.key, ObjectKey) and namespace in {None, entry.namespace}
        ]

    def below(self, digests: Iterable[PrefixDigest]) -> list[IndexEntry]:
        """Return the entries of these prefixes and of all that continues them, the deepest first.

        Those whose content is on its way, too; what is merely reserved is known by its own name alone.
        """
        wanted = set(digests)
        chosen = []
        for entry in sorted(self._entries.values(), key=lambda entry: entry.depth):
            if isinstance(entry.key, ObjectKey) and (entry.key.digest in wanted or entry.parent in wanted):
                wanted.add(entry.key.digest)
                chosen.append(entry)
        chosen.reverse()
        return chosen

    def get(self, key: ObjectKey) -> IndexEntry | None:
        """Return the entry, reserved or whole."""
        return self._entries.get(key)

    def reserve(self, key: ObjectKey, num_bytes: int) -> Reservation | None:
        """Make room for an object that is not there yet; None, and nothing changed, if there is none."""
        if key in self._entries:
            return None
        evicted = self.make_room(num_bytes)
        if evicted is None:
            return None
        entry = IndexEntry(key, num_bytes)
        self._entries[key] = entry
        self.num_bytes += num_bytes
        return Reservation(entry, evicted)

    def resize(self, entry: IndexEntry, num_bytes: int) -> list[IndexEntry] | None:
        """Set a reserved entry's size to what it turned out to be; None if there is no room for that."""
        evicted = self.make_room(num_bytes - entry.num_bytes)
        if evicted is not None:
            self.num_bytes += num_bytes - entry.num_bytes
            entry.num_bytes = num_bytes
        return evicted

    def admit(self, entry: IndexEntry, now: float) -> None:
        """Turn a reserved entry, described by its owner, into a whole one."""
        entry.is_whole = True
        self._whole_bytes += entry.num_bytes
        if isinstance(entry.key, ObjectKey):
            self.num_objects += 1
        if entry.continues:
            self._num_children[entry.continues] = self._num_children.get(entry.continues, 0) + 1
        if entry.expires_at is not None:
            self._turn += 1
            heapq.heappush(self._expiries, (entry.expires_at, self._turn, entry))
        self.touch(entry, now)

    def load(self, entry: IndexEntry) -> None:
        """Add what was there before, over the budget if need be; ``used_at`` says when it was last used."""
        self._entries[entry.key] = entry
        self.num_bytes += entry.num_bytes
        self.admit(entry, entry.used_at)

    def touch(self, entry: IndexEntry, now: float) -> None:
        """Note a use."""
        entry.used_at = now
        self._push(entry)

    def drop(self, entry: IndexEntry) -> None:
        """Forget an entry, reserved or whole; nothing happens if it has gone already."""
        if entry.is_gone:
            return
        entry.is_gone = True
        del self._entries[entry.key]
        self.num_bytes -= entry.num_bytes
        if not entry.is_whole:
            return
        self._whole_bytes -= entry.num_bytes
        if isinstance(entry.key, ObjectKey):
            self.num_objects -= 1
        if parent := entry.continues:
            self._num_children[parent] -= 1
            if not self._num_children[parent]:
                del self._num_children[parent]
                above = self._entries.get(ObjectKey(parent, ObjectKind.BLOCK))
                if above is not None and above.is_whole:
                    self._push(above)

    def make_room(self, num_bytes: int) -> list[IndexEntry] | None:
        """Drop entries until ``num_bytes`` more fit, and return them; None, and none dropped, if hopeless."""
        if self.num_bytes - self._whole_bytes + num_bytes > self.max_bytes:
            return None
        evicted = []
        while self.num_bytes + num_bytes > self.max_bytes:
            entry = self._oldest_leaf()
            self.drop(entry)
            evicted.append(entry)
        return evicted

    def take_expired(self, now: float) -> list[IndexEntry]:
        """Drop and return the entries whose lifetime is over."""
        expired = []
        while self._expiries and self._expiries[0][0] <= now:
            entry = heapq.heappop(self._expiries)[2]
            if not entry.is_gone:
                self.drop(entry)
                expired.append(entry)
        return expired

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless sums, children and leaves agree with the entries."""
        entries = list(self._entries.values())
        if self.num_bytes != sum(entry.num_bytes for entry in entries):
            raise IntegrityError("the index's bytes do not add up")
        if self._whole_bytes != sum(entry.num_bytes for entry in entries if entry.is_whole):
            raise IntegrityError("the index's whole bytes do not add up")
        children: dict[PrefixDigest, int] = {}
        for entry in entries:
            if entry.is_whole and entry.continues:
                children[entry.continues] = children.get(entry.continues, 0) + 1
        if children != self._num_children:
            raise IntegrityError("the index's children are miscounted")
        listed = {id(entry) for _, _, turn, entry in self._leaves if turn == entry.turn}
        if any(e.is_whole and self._is_leaf(e) and id(e) not in listed for e in entries):
            raise IntegrityError("a leaf of the index cannot be evicted")

    def _is_leaf(self, entry: IndexEntry) -> bool:
        key = entry.key
        is_inner = (
            isinstance(key, ObjectKey) and key.kind is ObjectKind.BLOCK and key.digest in self._num_children
        )
        return not is_inner

    def _oldest_leaf(self) -> IndexEntry:
        while self._leaves:
            _, _, turn, entry = heapq.heappop(self._leaves)
            if not entry.is_gone and turn == entry.turn and self._is_leaf(entry):
                return entry
        raise IntegrityError("bytes are held, but nothing can be evicted")

    def _push(self, entry: IndexEntry) -> None:
        """List an entry as one that may go; that it is a leaf is checked when it is taken from the list."""
        if self._is_leaf(entry):
            self._turn += 1
            entry.turn = self._turn
            heapq.heappush(self._leaves, (entry.used_at, -entry.depth, entry.turn, entry))
        if len(self._leaves) > 2 * len(self._entries) + 64:
            self._leaves = [
                (e.used_at, -e.depth, e.turn, e)
                for e in self._entries.values()
                if e.is_whole and self._is_leaf(e)
            ]
            heapq.heapify(self._leaves)
