"""Down: which blocks and last logits are copied out of the worker, and handed to tiers.

::

    cache                      this step's plan                worker             tiers
    leaving(capacity) ──────►  saves: before anything of  ──►  copies bytes  ──►  host, or where it pays
    stored, tail_stored ──┐    the step touches the block                         (evicted)
                          └►  queue, a few per step  ─────────────────────────►   disk, Redis (written)

An evicted block is given to another in the same plan, so its bytes leave first thing in that step. What
was stored is written behind, as much per step as it does not feel, and more while nobody computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.events import CacheListener, LeaveCause
from kvcore.keys import TOKEN_BYTES
from kvcore.manager import CacheManager
from kvcore.node import Node, NodeState
from kvcore.tails import Tail
from kvcore.tiers.interface import CacheObject, ObjectFormat, ObjectKind
from kvcore.tiers.stack import StackTicket, StoreReason, TierStack
from server.engine.plan import KvSave
from server.engine.tiering.wanted import Wanted, block_object, logits_object, partial_object

__all__ = ["Offloader"]

BUSY_BYTES_PER_STEP = 4 << 20
"""Written behind in a step that computes: about a millisecond of copying."""
IDLE_BYTES_PER_STEP = 32 << 20
BUSY_ENTRIES_PER_STEP = 64
IDLE_ENTRIES_PER_STEP = 512
"""Looked at, whether there is something to write or not: some 20 microseconds each."""
RETRY_S = 0.02
PATIENCE_S = 2.0
"""After so long without a tier that takes anything, what is queued is given up, one by one."""
MAX_QUEUED = 1 << 16
"""Blocks waiting to be written behind; the oldest are given up (they may still go when evicted)."""


Find = Callable[[], Wanted | None]
OnSaved = Callable[[CacheObject | None], None]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A save of the running plan, and who gets its bytes."""

    wanted: Wanted
    node: Node | None
    """Of a full block."""
    stack: TierStack
    ticket: StackTicket


@dataclass(frozen=True, slots=True)
class _Export:
    """A save of the running plan for somebody who asked for it."""

    wanted: Wanted
    on_saved: OnSaved


class Offloader(CacheListener):
    """Follow a cache, and turn what should be kept elsewhere into saves of the next plan."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        blocks: TierStack,
        tails: TierStack,
        object_format: ObjectFormat,
        clock: Clock,
    ) -> None:
        """``tails`` takes partial blocks and last logits: the same tiers under budgets of their own."""
        self._tree = cache.tree
        self._restorer = cache.restorer
        self._blocks = blocks
        self._tails = tails
        self._format = object_format
        self._clock = clock
        self._writes_behind = any(tier.is_persistent for tier in blocks.tiers)
        self._queue: deque[Node | Tail] = deque()
        self._urgent: list[_Pending] = []
        self._in_plan: list[_Pending | _Export] = []
        self._exports: deque[tuple[Callable[[], Wanted | None], Callable[[CacheObject | None], None]]] = (
            deque()
        )
        self._retry_at = 0.0
        self._refused_since: float | None = None
        self._is_refused = False
        """The last object found no tier that would take it now, though none has it."""
        self.num_dropped = 0

    @property
    def has_work(self) -> bool:
        """Say whether something waits to be saved that could be saved now."""
        return bool(self._urgent) or bool(self._queue) or bool(self._exports)

    # -- what the cache says ------------------------------------------------------------------------

    def stored(self, nodes: Sequence[Node]) -> None:
        if self._writes_behind:
            self._queue.extend(node for node in nodes if node.owner is None)
            self._trim()

    def tail_stored(self, tail: Tail) -> None:
        if self._writes_behind:
            self._queue.append(tail)
            self._trim()

    def restored(self, nodes: Sequence[Node], tier: str) -> None:
        """Nothing to do: it came from there."""

    def leaving(self, node: Node, cause: LeaveCause) -> None:
        if cause not in (LeaveCause.CAPACITY, LeaveCause.QUOTA):
            return
        if node.owner is not None or node in self._restorer.loading or node.is_expired(self._clock.now()):
            return
        if node.state is NodeState.READY:
            self._add(self._urgent, block_object(node), StoreReason.EVICTED, node)
            for tail in (node.tails or {}).values():
                if tail not in self._restorer.loading_tails:
                    self._add(self._urgent, logits_object(tail), StoreReason.EVICTED)
        elif node.state is NodeState.OPEN:
            for tail in (node.real_parent().tails or {}).values():
                self._add(self._urgent, partial_object(tail, node), StoreReason.EVICTED)

    def export(self, find: Find, on_saved: OnSaved) -> None:
        """Copy something out with one of the next plans.

        ``find`` is asked then where it lies; ``on_saved`` gets it, or None if it has gone or the step failed.
        """
        self._exports.append((find, on_saved))

    # -- one step -----------------------------------------------------------------------------------

    def collect(self, *, is_computing: bool) -> list[KvSave]:
        """Return the saves of this plan. Call last, when nothing is evicted any more."""
        self._in_plan, self._urgent = [*self._urgent], []
        room = BUSY_BYTES_PER_STEP if is_computing else IDLE_BYTES_PER_STEP
        while self._exports and room > 0:
            find, on_saved = self._exports.popleft()
            wanted = find()
            if wanted is None or not wanted.is_exact:  # what is written for somebody counts as exact
                on_saved(None)
                continue
            self._in_plan.append(_Export(wanted, on_saved))
            room -= self._format.payload_bytes(wanted.key.kind)
        now = self._clock.now()
        num_entries = BUSY_ENTRIES_PER_STEP if is_computing else IDLE_ENTRIES_PER_STEP
        while self._queue and room > 0 and num_entries and now >= self._retry_at:
            num_entries -= 1
            room -= self._write_behind(self._queue[0])
            if self._is_refused and self._is_patient(now):
                break
            self._queue.popleft()
            if not self._is_refused:
                self._refused_since = None
        return [pending.wanted.save for pending in self._in_plan]

    def saved(self, payloads: Sequence[bytes]) -> list[tuple[Node, str]]:
        """The step has run: hand over its bytes. Return the full blocks that went down, and where to."""
        offloaded: list[tuple[Node, str]] = []
        now = self._clock.now()
        for pending, payload in zip(self._in_plan, payloads, strict=True):
            stored = pending.wanted.with_payload(payload, now)
            if isinstance(pending, _Export):
                pending.on_saved(stored)
            else:
                pending.stack.complete(pending.ticket, stored)
                if pending.node is not None:
                    tiers = ",".join(tier.name for tier, _ in pending.ticket.reservations)
                    offloaded.append((pending.node, tiers))
        self._in_plan = []
        return offloaded

    def abandon(self) -> None:
        """The step has failed: nobody knows what its blocks hold."""
        for pending in self._in_plan:
            if isinstance(pending, _Export):
                pending.on_saved(None)
            else:
                pending.stack.abandon(pending.ticket)
        self._in_plan = []

    # -- inside -------------------------------------------------------------------------------------

    def _trim(self) -> None:
        while len(self._queue) > MAX_QUEUED:
            self._queue.popleft()
            self.num_dropped += 1

    def _write_behind(self, entry: Node | Tail) -> int:
        """Add what is to be written of one entry to the plan; return its bytes."""
        before = len(self._in_plan)
        self._is_refused = False
        if isinstance(entry, Node):
            if (
                entry.parent is not None
                and entry.state is NodeState.READY
                and not entry.is_expired(self._clock.now())
                and entry not in self._restorer.loading
            ):
                self._add(self._in_plan, block_object(entry), StoreReason.WRITTEN, entry)
        elif (entry.node.tails or {}).get(entry.key) is entry and entry.is_ready:
            partial = self._find_partial(entry)
            if partial is not None:
                self._add(self._in_plan, partial_object(entry, partial), StoreReason.WRITTEN)
            self._add(self._in_plan, logits_object(entry), StoreReason.WRITTEN)
        return sum(self._format.payload_bytes(pending.wanted.key.kind) for pending in self._in_plan[before:])

    def _find_partial(self, tail: Tail) -> Node | None:
        """Return a node whose leading slots hold the end of a tail's prompt, and whose block is settled."""
        rest = tail.key
        if not isinstance(rest, bytes) or not rest:
            return None
        node, length = self._tree.find_partial(tail.node, rest, None, self._clock.now())
        if node is None or length * TOKEN_BYTES < len(rest) or node in self._restorer.loading:
            return None
        return node

    def _add(
        self,
        pendings: list[_Pending] | list[_Pending | _Export],
        wanted: Wanted | None,
        reason: StoreReason,
        node: Node | None = None,
    ) -> None:
        """Reserve room for an object and list its save."""
        if wanted is None or (wanted.key.kind is ObjectKind.LOGITS and not wanted.is_exact):
            return  # logits have no lossy codec that would mark them
        stack = self._blocks if wanted.key.kind is ObjectKind.BLOCK else self._tails
        num_refused = stack.counters.refused.total()
        ticket = stack.prepare(
            wanted.key,
            start_position=(wanted.depth - 1) * self._tree.block_size,
            reason=reason,
            is_exact=wanted.is_exact,
        )
        if ticket is not None:
            pendings.append(_Pending(wanted, node, stack, ticket))
        elif stack.counters.refused.total() > num_refused:
            self._is_refused = True

    def _is_patient(self, now: float) -> bool:
        """Say whether to try later what was refused: tiers that are busy take it soon, others never."""
        if self._refused_since is None:
            self._refused_since = now
        if now - self._refused_since < PATIENCE_S:
            self._retry_at = now + RETRY_S
            return True
        self.num_dropped += 1
        return False
