"""Sessions that are expected back: brought up before they ask.

A session is a conversation or an agent whose requests each extend the one before. It is recognised by the
digest of the last full block that its previous request left: a request whose cached prefix contains that
block goes on with that session::

    request 1   [b0 b1 b2 b3]                      ended: b3 names the session
    request 2   [b0 b1 b2 b3 b4 b5]                returned (b3 is in its prefix), ended: now b5 does

Between the two, ``SessionPredictor`` says when it is worth having its blocks on the device again; they are
fetched while there is room: in a bounded share of the device, of what running requests have not needed of
late. What has come is pinned softly until the session returns or its window ends: it leaves last, and still
gives way, so no request waits for it or is preempted for it::

    blocks  0 ......... in use ......... peak x headroom ....... room ....... all
                                                          (at most a share)
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from kvcore.errors import OverBudget
from kvcore.index import digest_of
from kvcore.keys import TOKEN_BYTES, NamespaceKey, PrefixDigest
from kvcore.lease import Lease
from kvcore.manager import CacheManager
from kvcore.node import Node, NodeState
from kvcore.pins import Pin, PinKind
from kvcore.prefetch import SessionPredictor
from kvcore.restore import Placed
from server.engine.tiering.restoration import Restoration
from server.engine.tiering.restorations import Restorations

__all__ = ["SessionPrefetch"]

MAX_TOKEN_BYTES = 64 << 20
"""Tokens of sessions that are away, in memory; the longest away are forgotten first."""
MAX_LOOK_BACK = 64
"""Blocks from the end of a match in which a session's end is looked for."""
ROOM_SHARE = 4
"""One block in so many may belong to prefixes that were fetched for sessions and not used yet."""
HEADROOM = 1.25
PEAK_HALF_LIFE_S = 1800.0
"""What running requests took so long ago counts half."""


@dataclass(slots=True, eq=False)
class _Away:
    """A session between two requests."""

    number: int
    end: PrefixDigest
    namespace: NamespaceKey
    tokens: array[int]
    fetch: Restoration | None = None
    window_s: float = 0.0
    """How long what is fetched is kept, from its arrival on."""
    pin: Pin | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.tokens) * TOKEN_BYTES


class SessionPrefetch:
    """Recognise sessions, and fetch those that are due. Engine's thread; nothing blocks."""

    def __init__(self, cache: CacheManager, restorations: Restorations, predictor: SessionPredictor) -> None:
        """``restorations`` are this object's own: its counters are about sessions alone."""
        self._cache = cache
        self._restorations = restorations
        self._predictor = predictor
        self._numbers = itertools.count(1)
        self._away: OrderedDict[Hashable, _Away] = OrderedDict()
        self._by_end: dict[PrefixDigest, _Away] = {}
        self._num_bytes = 0
        self._peak_blocks = 0.0
        """In use at the busiest time of late."""
        self._peak_at = 0.0

    def __len__(self) -> int:
        return len(self._away)

    @property
    def is_busy(self) -> bool:
        """Say whether a fetch is under way."""
        return self._restorations.is_busy

    def returned(self, lease: Lease, asked: Sequence[PrefixDigest], now: float) -> int:
        """A request was admitted: return the number of the session that it goes on with, or of a new one.

        ``asked`` are digests of its prompt that were computed to look into tiers.
        """
        found = self._find(lease, asked)
        if found is None:
            return next(self._numbers)
        self._predictor.returned(found.number, now)
        fetch = found.fetch
        if fetch is not None:
            if fetch.is_over:
                self._restorations.admitted(fetch, lease.nodes)
            else:
                self._restorations.left(fetch)
        self._drop(found)
        return found.number

    def ended(self, number: int, lease: Lease, namespace: NamespaceKey, now: float) -> None:
        """A session's request has finished: from now on it is away."""
        full = [node for node in lease.nodes if node.state is not NodeState.OPEN]
        if not full or full[-1].parent is None or full[-1].owner is not None:
            return
        end = digest_of(full[-1])
        previous = self._by_end.get(end)
        if previous is not None:
            self._forget(previous)
        tokens = lease.tokens[: len(full) * self._cache.block_size]
        away = _Away(number, end, namespace, tokens)
        self._away[number] = away
        self._by_end[end] = away
        self._num_bytes += away.num_bytes
        self._predictor.ended(number, now)
        while self._num_bytes > MAX_TOKEN_BYTES:
            self._forget(next(iter(self._away.values())))

    def advance(self, now: float, *, is_computing: bool) -> list[Placed]:
        """Fetch who is due; return what the plan is to load."""
        for number in self._predictor.expire(now):
            self._end_fetch(number)
        self._note_use(now)
        room = self._room()
        for number, num_missing in self._predictor.due(now, room, self._num_missing):
            away = self._away.get(number)
            if away is None or self._size(away) > room:
                continue  # all of its prefix will be kept, not only what comes
            room -= self._size(away)
            away.fetch = self._restorations.follow(away.namespace, away.tokens)
            away.window_s = self._predictor.started(number, now, num_missing) - now
        placed = self._restorations.advance(is_computing=is_computing)
        for away in [a for a in self._away.values() if a.fetch is not None and a.fetch.is_over]:
            fetch = away.fetch
            assert fetch is not None
            if fetch.nodes and all(node.parent is not None for node in fetch.nodes):
                if away.pin is None:
                    self._keep(away, fetch, now)
                self._predictor.arrived(away.number)
            else:  # nothing came, or some of it has been evicted again
                self._predictor.lost(away.number)
                self._end_fetch(away.number)
        return placed

    # -- inside -------------------------------------------------------------------------------------

    def _find(self, lease: Lease, asked: Sequence[PrefixDigest]) -> _Away | None:
        if not self._by_end:
            return None
        for digest in reversed(asked[-MAX_LOOK_BACK:]):
            if digest in self._by_end:
                return self._by_end[digest]
        for node in reversed(lease.nodes[-MAX_LOOK_BACK:]):
            if node.digest is not None and node.digest in self._by_end:
                return self._by_end[node.digest]
        return None

    def _note_use(self, now: float) -> None:
        in_use = float(self._cache.pool.num_blocks - self._cache.num_available)
        faded = self._peak_blocks * 0.5 ** (max(0.0, now - self._peak_at) / PEAK_HALF_LIFE_S)
        self._peak_blocks, self._peak_at = max(in_use, faded), now

    def _room(self) -> int:
        num_blocks = self._cache.pool.num_blocks
        held = sum(self._size(away) for away in self._away.values() if away.fetch is not None)
        return min(num_blocks - int(HEADROOM * self._peak_blocks), num_blocks // ROOM_SHARE) - held

    def _size(self, away: _Away) -> int:
        return len(away.tokens) // self._cache.block_size

    def _keep(self, away: _Away, fetch: Restoration, now: float) -> None:
        """Pin what has come, unless an operator's pin does already or there are too many."""
        end = max(fetch.nodes, key=lambda node: node.depth)
        if end.pin is not None or end.state is not NodeState.READY:
            return
        with contextlib.suppress(OverBudget):
            self._cache.pins.pin(end, PinKind.SOFT, now=now, lifetime_s=away.window_s)
            away.pin = end.pin

    def _let_go(self, away: _Away) -> None:
        if away.pin is not None:
            self._cache.pins.end(away.pin)
            away.pin = None

    def _num_missing(self, number: Hashable) -> int:
        away = self._away.get(number)
        if away is None:
            return 0
        tree = self._cache.tree
        path: list[Node] = tree.walk(
            tree.root(away.namespace), away.tokens, len(away.tokens), None, float("-inf")
        )
        return len(away.tokens) // self._cache.block_size - len(path)

    def _end_fetch(self, number: Hashable) -> None:
        away = self._away.get(number)
        if away is not None and away.fetch is not None:
            self._let_go(away)
            self._restorations.left(away.fetch)
            away.fetch = None

    def _forget(self, away: _Away) -> None:
        self._predictor.forget(away.number)
        if away.fetch is not None:
            self._restorations.left(away.fetch)
        self._drop(away)

    def _drop(self, away: _Away) -> None:
        self._let_go(away)
        away.fetch = None
        del self._away[away.number]
        if self._by_end.get(away.end) is away:
            del self._by_end[away.end]
        self._num_bytes -= away.num_bytes
