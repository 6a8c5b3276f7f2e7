"""The watch: what happens to full shared blocks, told as few notes.

Consecutive blocks of one prefix to which the same thing happens at once are one note, named by the deepest
of them. Notes are numbered as they are made; at most ``MAX_NOTES_PER_TURN`` are kept for one turn of the
loop, and those beyond leave a gap in the numbers: a loss is never silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.events import LeaveCause
from kvcore.index import digest_of
from kvcore.node import Node, NodeState
from kvcore.pins import Pin
from kvcore.tails import Tail
from server.engine.admin_messages import CacheEventKind, CacheEventNote, CacheEvents
from server.engine.cache_ops.naming import num_tokens_of

__all__ = ["CacheWatch"]

MAX_NOTES_PER_TURN = 1024


@dataclass(slots=True)
class _Draft:
    """A note that may still grow."""

    kind: CacheEventKind
    namespace: str
    prefix_id: str
    num_tokens: int
    num_blocks: int
    time_s: float
    cause: str
    tier: str


class CacheWatch:
    """A listener of the cache that makes notes while it is on. Costs next to nothing while it is off."""

    def __init__(self, clock: Clock, *, block_size: int, epoch: int) -> None:
        self.epoch = epoch
        self.is_on = False
        self._clock = clock
        self._started = clock.now()
        self._block_size = block_size
        self._drafts: list[_Draft] = []
        self._first = 1
        """Number of the first draft."""
        self._num_lost = 0
        """Notes of this turn that were made after the list was full."""
        self._expected: Node | None = None
        """The parent of the block that left last: if it leaves next, it joins the same note."""

    def drain(self) -> list[CacheEvents]:
        """Return the notes made since the last call, as one message or none."""
        drafts, self._drafts = self._drafts, []
        first = self._first
        self._first += len(drafts) + self._num_lost
        self._num_lost, self._expected = 0, None
        if not drafts:
            return []
        notes = [
            CacheEventNote(
                first + offset,
                draft.kind,
                draft.namespace,
                draft.prefix_id,
                draft.num_tokens,
                draft.num_blocks,
                draft.time_s,
                draft.cause,
                draft.tier,
            )
            for offset, draft in enumerate(drafts)
        ]
        return [CacheEvents(self.epoch, notes)]

    def note(
        self, kind: CacheEventKind, node: Node, num_blocks: int, *, cause: str = "", tier: str = ""
    ) -> None:
        """Note that something happened to ``num_blocks`` blocks that end with ``node``."""
        self._expected = None
        if not self.is_on:
            return
        if len(self._drafts) >= MAX_NOTES_PER_TURN:
            self._num_lost += 1
            return
        now = self._clock.now() - self._started
        num_tokens, prefix_id = num_tokens_of(node, self._block_size), digest_of(node).hex()
        self._drafts.append(_Draft(kind, node.space.id, prefix_id, num_tokens, num_blocks, now, cause, tier))

    # -- as a listener of the cache -----------------------------------------------------------------

    def stored(self, nodes: Sequence[Node]) -> None:
        if self.is_on:
            self.note(CacheEventKind.STORED, nodes[-1], len(nodes))

    def tail_stored(self, tail: Tail) -> None:
        """Kept logits are no blocks."""

    def leaving(self, node: Node, cause: LeaveCause) -> None:
        if not self.is_on or node.owner is not None or node.state is not NodeState.READY:
            return
        kind = CacheEventKind.EXPIRED if cause is LeaveCause.EXPIRED else CacheEventKind.EVICTED
        why = "" if cause is LeaveCause.EXPIRED else cause.value
        last = self._drafts[-1] if self._drafts else None
        if node is self._expected and last is not None and (last.kind, last.cause) == (kind, why):
            last.num_blocks += 1
        else:
            self.note(kind, node, 1, cause=why)
        self._expected = node.parent if not self._num_lost else None

    def pin_ended(self, pin: Pin) -> None:
        """A pin ended, whoever ended it. Pass this to ``PinBook.on_end``."""
        self.note(CacheEventKind.UNPINNED, pin.node, pin.node.depth, cause=pin.kind.value)
