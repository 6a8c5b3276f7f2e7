"""Up, for all that wait: which prompts are fetched, what lands in this step, and who is held for it.

A waiting sequence's blocks are asked for as soon as it waits, in order of arrival and a bounded number at a
time, so that what tiers have comes up while the sequence is in the queue. One that would be admitted while
its blocks are still on their way is held, for no longer than computing them is expected to take.

Restored blocks are cached blocks like others: nobody holds them until the sequence is admitted (waiting
cursors keep them from being the first to be evicted).
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.keys import NamespaceKey
from kvcore.manager import CacheManager
from kvcore.node import Node
from kvcore.restore import Placed
from kvcore.tiers.interface import ObjectFormat, ObjectKind
from kvcore.tiers.stack import FetchBatch, TierStack
from kvcore.tiers.worth import Decision
from server.engine.messages import RestoreReport
from server.engine.tiering.restoration import Restoration, RestorationState

__all__ = ["RestoreCounters", "Restorations"]

MAX_ACTIVE = 32
"""Sequences that ask or fetch at the same time; others begin when they would be admitted."""
ASK_S = 0.05
"""How long a tier may take to say whether it has something."""
MIN_FETCH_TIMEOUT_S = 0.1
MAX_FETCH_TIMEOUT_S = 30.0
AHEAD_PERCENT = 75
"""Of the blocks that can be had: more of them placed ahead would push each other out."""
ALONE_SHARE = 0.8
"""A restore that held its sequence up for so much of its time tells what a restore takes."""
PATIENCE = 4.0
"""A fetch may take this many times what was expected."""
BUSY_BYTES_PER_STEP = 16 << 20
"""Loaded in a step that others compute in; at least one block."""
IDLE_BYTES_PER_STEP = 128 << 20


@dataclass(slots=True)
class RestoreCounters:
    """What became of blocks that were fetched for waiting sequences. Seconds are sums over sequences."""

    fetched_blocks: int = 0
    used_blocks: int = 0
    """There when their sequence was admitted, and before it had to be held for them."""
    late_blocks: int = 0
    """Used, but their sequence was held for them."""
    wasted_blocks: int = 0
    """Never used: the sequence went away, or they were evicted again before."""
    restore_s: float = 0.0
    hidden_s: float = 0.0
    decided_fetch: int = 0
    decided_recompute: int = 0


class Restorations:
    """Follow waiting sequences. One thread: the engine's."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        blocks: TierStack,
        tails: TierStack,
        object_format: ObjectFormat,
        clock: Clock,
        mode: str = "auto",
    ) -> None:
        """``mode``: auto, always or never (see ``TierOptions.restore``)."""
        self._cache = cache
        self._blocks = blocks
        self._tails = tails
        self._format = object_format
        self._clock = clock
        self._mode = mode
        self._new: deque[Restoration] = deque()
        self._active: dict[Restoration, None] = {}
        self._num_ahead = 0
        """Blocks placed for sequences that are still waiting."""
        self._recent_wait_s = 0.0
        self.counters = RestoreCounters()

    @property
    def is_busy(self) -> bool:
        """Say whether anything is asked for or on its way."""
        return bool(self._active) or bool(self._new)

    # -- waiting sequences --------------------------------------------------------------------------

    def follow(self, namespace: NamespaceKey, tokens: array[int]) -> Restoration:
        """Begin to follow a prompt that has come to wait."""
        restoration = Restoration(namespace, tokens[:], self._cache.block_size)
        self._new.append(restoration)
        return restoration

    def is_holding(self, restoration: Restoration, *, has_place: bool) -> bool:
        """Say whether a sequence whose turn it is should wait for its blocks.

        One whose turn comes before anybody has looked for its blocks is looked up here and now. Without
        ``has_place`` (others are in front of it) it could not be admitted anyway, and waits for nothing.
        """
        now = self._clock.now()
        if restoration.state is RestorationState.NEW:
            if not has_place and len(self._active) >= MAX_ACTIVE:
                return True
            self._begin(restoration, now)
        if restoration.is_over:
            return False
        restoration.count_held(now, is_held=has_place)
        return True

    def admitted(self, restoration: Restoration, nodes: Iterable[Node]) -> tuple[int, RestoreReport | None]:
        """A sequence was admitted with these matched nodes: return its restored blocks, and the report."""
        if restoration.asked_at:
            waited_s = self._clock.now() - restoration.asked_at - restoration.held_s
            self._recent_wait_s += 0.1 * (waited_s - self._recent_wait_s)
        used = restoration.nodes.intersection(nodes)
        num_late = min(len(used), restoration.late_blocks)
        counters = self.counters
        counters.used_blocks += len(used) - num_late
        counters.late_blocks += num_late
        counters.wasted_blocks += len(restoration.nodes) - len(used)
        self._forget_nodes(restoration)
        report = self._report(restoration, len(used))
        self._forget(restoration)
        return len(used), report

    def left(self, restoration: Restoration) -> None:
        """A sequence went away without having been admitted."""
        self.counters.wasted_blocks += len(restoration.nodes)
        self._forget_nodes(restoration)
        self._forget(restoration)

    # -- one step -----------------------------------------------------------------------------------

    def advance(self, *, is_computing: bool) -> list[Placed]:
        """Look at what has come; return what the plan is to load. Call before anything is admitted."""
        now = self._clock.now()
        while self._new and len(self._active) < MAX_ACTIVE and self._num_expected() < self._max_ahead():
            restoration = self._new.popleft()
            if restoration.state is RestorationState.NEW:
                self._begin(restoration, now)
        placed: list[Placed] = []
        room = BUSY_BYTES_PER_STEP if is_computing else IDLE_BYTES_PER_STEP
        for restoration in list(self._active):
            if restoration.state is RestorationState.ASKING:
                self._ask(restoration, now)
            if restoration.state is RestorationState.FETCHING and room > 0:
                landed = self._land(restoration, room, now)
                room -= sum(self._format.payload_bytes(p.stored.key.kind) for p in landed)
                placed.extend(landed)
        return placed

    # -- inside -------------------------------------------------------------------------------------

    def _max_ahead(self) -> int:
        """Return how many blocks may lie on the device for sequences whose turn has not come."""
        return self._cache.num_available * AHEAD_PERCENT // 100

    def _num_expected(self) -> int:
        """Return how many blocks there will be for them, once all has landed that is on its way."""
        return self._num_ahead + sum(r.num_found - r.num_landed for r in self._active)

    def _forget_nodes(self, restoration: Restoration) -> None:
        self._num_ahead -= len(restoration.nodes)
        restoration.nodes.clear()

    def _begin(self, restoration: Restoration, now: float) -> None:
        if self._mode == "never" or not restoration.look_at_device(self._cache.tree, self._cache.tails, now):
            restoration.state = RestorationState.DONE
            return
        self._active[restoration] = None
        self._ask(restoration, now)

    def _ask(self, restoration: Restoration, now: float) -> None:
        is_complete = restoration.ask(self._blocks, self._tails)
        if not is_complete and now - restoration.asked_at < ASK_S:
            return
        if not restoration.num_found and not restoration.tail_keys:
            self._end(restoration, now)
            return
        decision = self._decide(restoration)
        restoration.decided_fetch = decision.fetch
        restoration.expected_fetch_s = decision.fetch_s or 0.0
        restoration.expected_recompute_s = decision.recompute_s or 0.0
        if not decision.fetch:
            self.counters.decided_recompute += 1
            self._end(restoration, now)
            return
        self.counters.decided_fetch += 1
        timeout_s = self._timeout_s(decision)
        restoration.started_at = now
        restoration.state = RestorationState.FETCHING
        if restoration.num_found:
            restoration.batch = self._blocks.fetch(
                restoration.keys, namespace=restoration.seed, timeout_s=timeout_s
            )
        if restoration.tail_keys:
            restoration.tail_batch = self._tails.fetch(
                restoration.tail_keys, namespace=restoration.seed, timeout_s=timeout_s
            )

    def _decide(self, restoration: Restoration) -> Decision:
        queue_wait_s = self._recent_wait_s if len(self._active) > 1 else 0.0
        start = restoration.first_block * restoration.block_size
        if restoration.num_found:
            decision = self._blocks.decide(
                restoration.located, restoration.keys, start_position=start, queue_wait_s=queue_wait_s
            )
        else:
            located = [self._tails.lookup(key) for key in restoration.tail_keys]
            decision = self._tails.decide(
                located, restoration.tail_keys, start_position=start, queue_wait_s=queue_wait_s
            )
        return dataclasses.replace(decision, fetch=True) if self._mode == "always" else decision

    def _timeout_s(self, decision: Decision) -> float:
        """Return how long to wait: some times what is expected, but not longer than computing takes."""
        if self._mode == "always":
            return MAX_FETCH_TIMEOUT_S
        expected = decision.fetch_s
        timeout_s = MAX_FETCH_TIMEOUT_S if expected is None else PATIENCE * expected
        if decision.recompute_s is not None:
            timeout_s = min(timeout_s, decision.recompute_s)
        return min(MAX_FETCH_TIMEOUT_S, max(MIN_FETCH_TIMEOUT_S, timeout_s))

    def _land(self, restoration: Restoration, room: int, now: float) -> list[Placed]:
        """Place what has come of one prompt, in order, as far as ``room`` bytes go (one block at least)."""
        placed: list[Placed] = []
        batch = restoration.batch
        if batch is not None:
            count = min(batch.num_ready - batch.num_taken, max(1, room // self._format.bytes_per_block))
            if restoration.held_since is None:  # its turn has not come: not at the cost of those before it
                count = max(0, min(count, self._max_ahead() - self._num_ahead))
            if count:
                placed = self._place_blocks(restoration, batch, count)
            if restoration.batch is not None and (not batch.is_done or batch.num_taken < batch.num_ready):
                return placed
        if restoration.tail_batch is not None:
            if not restoration.tail_batch.is_done:
                return placed
            placed += self._place_tail(restoration)
        self._end(restoration, now)
        return placed

    def _place_blocks(self, restoration: Restoration, batch: FetchBatch, count: int) -> list[Placed]:
        objects = batch.take(count)
        first = restoration.first_block + restoration.num_landed
        placed, num_there = self._cache.restorer.place(
            restoration.namespace,
            restoration.tokens,
            first,
            objects,
            tier=restoration.tiers[restoration.num_landed],
        )
        restoration.num_landed += num_there
        restoration.nodes.update(entry.node for entry in placed)
        self._num_ahead += len(placed)
        self.counters.fetched_blocks += len(objects)
        self.counters.wasted_blocks += len(objects) - len(placed)
        if restoration.held_since is not None:
            restoration.late_blocks += len(placed)
        if num_there < len(objects):  # no room, or what they follow has gone
            self._cancel_batches(restoration)
        return placed

    def _place_tail(self, restoration: Restoration) -> list[Placed]:
        batch = restoration.tail_batch
        if batch is None or restoration.num_landed < restoration.num_found:
            return []
        found = {stored.key.kind: stored for stored in batch.take(batch.num_ready)}
        logits = found.get(ObjectKind.LOGITS)
        if logits is None:
            return []
        return self._cache.restorer.place_tail(
            restoration.namespace, restoration.tokens, found.get(ObjectKind.PARTIAL), logits
        )

    def _end(self, restoration: Restoration, now: float) -> None:
        """Nothing more comes: the sequence may be admitted with what there is."""
        if restoration.state is RestorationState.FETCHING:
            restoration.done_at = now
            took_s = now - restoration.started_at
            restoration.count_held(now, is_held=False)
            held_s = min(restoration.held_s, took_s)
            self.counters.restore_s += took_s
            self.counters.hidden_s += took_s - held_s
            if restoration.num_landed == restoration.num_found and held_s > ALONE_SHARE * took_s:
                self._blocks.worth.observe_restore(restoration.expected_fetch_s, took_s)
        self._forget(restoration)

    def _forget(self, restoration: Restoration) -> None:
        self._cancel_batches(restoration)
        restoration.state = RestorationState.DONE
        self._active.pop(restoration, None)

    def _cancel_batches(self, restoration: Restoration) -> None:
        for batch in (restoration.batch, restoration.tail_batch):
            if batch is not None:
                batch.cancel()
        restoration.batch = restoration.tail_batch = None

    def _report(self, restoration: Restoration, num_used: int) -> RestoreReport | None:
        if not restoration.num_found and not restoration.tail_keys:
            return None
        done_at = restoration.done_at
        fetch_s = 0.0 if done_at is None else done_at - restoration.started_at
        return RestoreReport(
            decision="fetch" if restoration.decided_fetch else "recompute",
            tier=restoration.main_tier,
            found_tokens=restoration.num_found_tokens,
            restored_tokens=num_used * restoration.block_size,
            expected_fetch_s=restoration.expected_fetch_s,
            expected_recompute_s=restoration.expected_recompute_s,
            fetch_s=fetch_s,
            wait_s=min(fetch_s, restoration.held_s),
        )
