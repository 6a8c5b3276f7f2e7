"""The waiting room: everything that belongs to a sequence while it waits.

A waiting sequence has a place in the queue and, if it may read the cache, a cursor in the prefix tree
that tells the queue how much of it is cached. The further samples of a request are held back, outside
the queue, until the first one has computed the prompt that they share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcore.cursors import Cursor
from kvcore.lease import Lease
from kvcore.manager import CacheManager
from server.engine.queue import WaitingQueue
from server.engine.request import Request, Sequence, SequenceState

if TYPE_CHECKING:
    from server.engine.tiering.restoration import Restoration
    from server.engine.tiering.restorations import Restorations

__all__ = ["WaitingRoom"]

MAX_CURSOR_MOVES_PER_PLAN = 64


class WaitingRoom:
    """Keep waiting sequences and their cursors."""

    def __init__(self, cache: CacheManager, *, waiting_bound_s: float) -> None:
        self.queue = WaitingQueue(self._need_of, waiting_bound_s=waiting_bound_s)
        self._cache = cache
        self._num_held_back = 0
        self.restorations: Restorations | None = None
        """Brings up what tiers have of waiting prompts; None: there are no tiers."""

    def __len__(self) -> int:
        return len(self.queue) + self._num_held_back

    def receive(self, request: Request) -> None:
        """Take in a new request: its first sample, or all of them where they share nothing."""
        first = request.sequences[:1] if request.spec.use_kv_cache else request.sequences
        for sequence in first:
            self.enter(sequence)
        for sequence in request.sequences[len(first) :]:
            self.queue.number(sequence)
            request.held_back.append(sequence)
            self._num_held_back += 1

    def enter(self, sequence: Sequence) -> None:
        """Queue a sequence and follow how much of it is cached."""
        if sequence.may_read:
            tokens = sequence.tokens
            sequence.cursor = Cursor(tokens, len(tokens) - 1, sequence.owner, sequence)
            self._cache.park(sequence.request.namespace, sequence.cursor)
            if self.restorations is not None and sequence.request.spec.read_prefix:
                sequence.restoration = self.restorations.follow(sequence.request.namespace, tokens)
        self.queue.add(sequence)

    def leave(self, sequence: Sequence, *, admitted: Lease | None = None) -> None:
        """Forget a sequence that was admitted, with its lease, or has ended."""
        held_back = sequence.request.held_back
        if sequence in held_back:
            held_back.remove(sequence)
            self._num_held_back -= 1
            return
        self.queue.remove(sequence)
        if sequence.cursor is not None:
            self._cache.board.leave(sequence.cursor)
            sequence.cursor = None
        if sequence.restoration is not None:
            self._end_restoration(sequence, sequence.restoration, admitted)

    def _end_restoration(self, sequence: Sequence, restoration: Restoration, admitted: Lease | None) -> None:
        assert self.restorations is not None  # it made the restoration
        sequence.restoration = None
        if admitted is None:
            self.restorations.left(restoration)
            return
        request = sequence.request
        num_blocks, report = self.restorations.admitted(restoration, admitted.nodes)
        if not request.was_admitted:
            request.restored_tokens = num_blocks * self._cache.block_size
            request.restore = report

    def let_in(self, request: Request) -> None:
        """Queue samples that were held back: all once the prompt is computed, one if nobody computes it."""
        held_back = request.held_back
        if not held_back:
            return
        count = len(held_back)
        if request.first_token_at is None:
            if any(s.state is not SequenceState.DONE and s not in held_back for s in request.sequences):
                return
            count = 1
        ready = held_back[:count]
        del held_back[:count]
        self._num_held_back -= count
        for sequence in ready:
            self.enter(sequence)

    def follow_cache(self, now: float) -> None:
        """Let cursors move on to what was published since, a bounded number per call."""
        for cursor in self._cache.board.settle(max_moves=MAX_CURSOR_MOVES_PER_PLAN, now=now):
            if isinstance(cursor.payload, Sequence):
                self.queue.update(cursor.payload)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.queue)

    def _need_of(self, sequence: Sequence) -> int:
        cursor = sequence.cursor
        cached = 0 if cursor is None else cursor.num_blocks * self._cache.block_size
        return len(sequence.tokens) - cached
