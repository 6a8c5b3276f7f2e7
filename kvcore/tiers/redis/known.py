"""What this server knows of Redis: what it has put there or found, and for how long to believe in it.

::

    object came, or was written    learnt, and present for a while (its lifetime at most)
    looked for, not there          not learnt, absent for a moment: another server may be storing it
    asked for its length alone     present or absent, nothing else is known of it
    removed                        nothing

Present and absent are beliefs (``presence``) and expire; what was learnt stays until there is too much of it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.keys import PrefixDigest
from kvcore.tiers.interface import CacheObject, ObjectKey
from kvcore.tiers.redis.options import RedisOptions
from kvcore.tiers.redis.presence import PresenceTable

__all__ = ["KnownObjects"]


@dataclass(frozen=True, slots=True)
class _Known:
    """What this server has put there, or found."""

    namespace: PrefixDigest
    parent: PrefixDigest
    depth: int
    num_bytes: int
    expires_at: float | None


class KnownObjects:
    """See the module's text. Iterates over what was put there or found. Not locked."""

    def __init__(self, clock: Clock, options: RedisOptions) -> None:
        self.num_bytes = 0
        self._clock = clock
        self._max_known = options.max_known
        self._known: OrderedDict[ObjectKey, _Known] = OrderedDict()
        self._presence = PresenceTable(
            clock, present_s=options.present_s, absent_s=options.absent_s, max_entries=options.max_known
        )

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._known

    def __iter__(self) -> Iterator[ObjectKey]:
        return iter(self._known)

    def is_present(self, key: ObjectKey) -> bool | None:
        """Say whether the object is there; None: not known, or too long ago."""
        return self._presence.get(key)

    def is_expired(self, key: ObjectKey) -> bool:
        """Say whether a lifetime has ended by this process's clock, which nobody sets."""
        known = self._known.get(key)
        return known is not None and known.expires_at is not None and known.expires_at <= self._clock.now()

    def continuing(self, digests: Iterable[PrefixDigest]) -> list[PrefixDigest]:
        """Return the known prefixes that continue these, in any number of steps."""
        wanted = set(digests)
        found = []
        for key, known in sorted(self._known.items(), key=lambda item: item[1].depth):
            if known.parent in wanted and key.digest not in wanted:
                wanted.add(key.digest)
                found.append(key.digest)
        return found

    def select(self, namespace: PrefixDigest | None) -> list[ObjectKey]:
        """Return the objects of one namespace or all."""
        return [key for key, known in self._known.items() if namespace in (None, known.namespace)]

    def note_answer(self, key: ObjectKey, *, is_present: bool) -> None:
        """Remember what Redis said of a key when it was asked for no more than that."""
        self._presence.put(key, is_present=is_present)

    def note_found(self, found: CacheObject, num_bytes: int) -> CacheObject:
        """Remember an object that came; return it with what is left of its lifetime."""
        now = self._clock.now()
        left_s = found.expires_in_s
        before = self._known.get(found.key)
        if left_s is not None and before is not None and before.expires_at is not None:
            left_s = min(left_s, before.expires_at - now)
        self._presence.put(found.key, is_present=True, at_most_s=left_s)
        self._learn(found, num_bytes, None if left_s is None else now + left_s)
        return dataclasses.replace(found, expires_in_s=left_s)

    def note_stored(
        self, stored: CacheObject, num_bytes: int, *, ttl_s: float, expires_at: float | None
    ) -> None:
        """Remember an object that was written."""
        self._presence.put(stored.key, is_present=True, at_most_s=ttl_s)
        self._learn(stored, num_bytes, expires_at)

    def note_missing(self, key: ObjectKey) -> None:
        """Remember that an object is not there, or not of any use."""
        self._presence.put(key, is_present=False)
        self._unlearn(key)

    def forget(self, key: ObjectKey) -> None:
        """Know nothing of an object any more."""
        self._presence.forget(key)
        self._unlearn(key)

    def doubt(self) -> None:
        """Believe no answer any more: Redis may have lost everything."""
        self._presence.clear()

    def _learn(self, described: CacheObject, num_bytes: int, expires_at: float | None) -> None:
        self._unlearn(described.key)
        self._known[described.key] = _Known(
            described.namespace, described.parent, described.depth, num_bytes, expires_at
        )
        self.num_bytes += num_bytes
        while len(self._known) > self._max_known:
            self._unlearn(next(iter(self._known)))

    def _unlearn(self, key: ObjectKey) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self.num_bytes -= known.num_bytes
