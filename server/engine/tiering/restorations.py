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
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable

from kvcore.clock import Clock
from kvcore.keys import NamespaceKey, PrefixDigest
from kvcore.manager import CacheManager
from kvcore.node import Node
from kvcore.restore import Placed
from kvcore.tiers.interface import CacheObject, ObjectFormat, ObjectKind
from kvcore.tiers.stack import FetchBatch, TierStack
from kvcore.tiers.worth import Decision
from server.engine.messages import RestoreReport
from server.engine.tiering.restoration import Answer, LookupBudget, Restoration, RestorationState
from server.engine.tiering.restore_counters import RestoreCounters

__all__ = ["Restorations"]

MAX_ACTIVE = 32
"""Sequences that ask or fetch at the same time; others begin when they would be admitted."""
ASK_S = 0.05
"""How long a tier may take to say whether it has something."""
MIN_FETCH_TIMEOUT_S = 0.1
MAX_FETCH_TIMEOUT_S = 30.0
MAX_HELD = 256
"""Sequences that ask or fetch at the same time, those included whose turn has come: who comes beyond them is
not held."""
MAX_ASK_HOLD_S = 0.2
"""How long a sequence is held while nobody knows what tiers have: the lookups of a step are few."""
LOOKUPS_PER_STEP = 256
"""For those in the queue, and as many again for those whose turn has come: a millisecond or two each."""
BUSY_BLOCKS_PER_STEP = 128
IDLE_BLOCKS_PER_STEP = 1024
AHEAD_PERCENT = 75
"""Of the blocks that can be had: more of them placed ahead would push each other out."""
ALONE_SHARE = 0.8
"""A restore that held its sequence up for so much of its time tells what a restore takes."""
PATIENCE = 4.0
"""A fetch may take this many times what was expected."""
BUSY_BYTES_PER_STEP = 16 << 20
"""Loaded in a step that others compute in; at least one block."""
IDLE_BYTES_PER_STEP = 128 << 20


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
        self._new: OrderedDict[Restoration, None] = OrderedDict()
        self._active: dict[Restoration, None] = {}
        self._num_ahead = 0
        """Blocks placed for sequences that are still waiting."""
        self._recent_wait_s = 0.0
        """Between looking for a prompt's blocks ahead and its turn."""
        self._turn_lookups = LookupBudget(LOOKUPS_PER_STEP)
        self.counters = RestoreCounters()
        self.found_blocks: Counter[str] = Counter()
        """Blocks that prompts looked for beyond the device, by the tier that had them."""
        self.missed_requests: Counter[str] = Counter()
        """Times that a prompt's next block was in no tier, for each tier."""

    @property
    def is_busy(self) -> bool:
        """Say whether anything is asked for or on its way."""
        return bool(self._active) or bool(self._new)

    # -- waiting sequences --------------------------------------------------------------------------

    def follow(self, namespace: NamespaceKey, tokens: array[int]) -> Restoration:
        """Begin to follow a prompt that has come to wait."""
        restoration = Restoration(namespace, tokens, self._cache.block_size)
        self._new[restoration] = None
        return restoration

    def is_holding(self, restoration: Restoration, *, has_place: bool) -> bool:
        """Say whether a sequence whose turn it is should wait for its blocks.

        One whose turn comes before anybody has looked for its blocks is looked up here and now. Without
        ``has_place`` (others are in front of it) it could not be admitted anyway, and waits for nothing.

        However long a tier takes, a sequence is held for ``MAX_ASK_HOLD_S`` and the time that computing is
        expected to take (or the shortest timeout) at most, and behind ``MAX_HELD`` others not at all.
        """
        now, state = self._clock.now(), restoration.state
        if state is RestorationState.NEW and len(self._active) >= (MAX_HELD if has_place else MAX_ACTIVE):
            return not has_place
        self._look(restoration, now, is_its_turn=has_place)
        if restoration.is_over:
            return False
        restoration.count_held(now, is_held=has_place)
        if has_place and restoration.total_held_s(now) >= max(restoration.hold_s, MAX_ASK_HOLD_S):
            self._end(restoration, now)
        return not restoration.is_over

    def forget(
        self, *, namespace: PrefixDigest | None = None, digests: Collection[PrefixDigest] | None = None
    ) -> None:
        """Do not bring up what is on its way and tiers were told to remove: these, or all of them."""
        now = self._clock.now()
        for restoration in list(self._active):
            if namespace is not None and restoration.seed != namespace:
                continue
            if digests is not None and not any(digest in digests for digest in restoration.digests):
                continue
            self._end(restoration, now)

    def admitted(self, restoration: Restoration, nodes: Iterable[Node]) -> tuple[int, RestoreReport | None]:
        """A sequence was admitted with these matched nodes: return its restored blocks, and the report."""
        if restoration.asked_at is not None and restoration.is_ahead:
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
        self._turn_lookups.left = LOOKUPS_PER_STEP
        lookups = LookupBudget(LOOKUPS_PER_STEP)
        placed: list[Placed] = []
        room = BUSY_BYTES_PER_STEP if is_computing else IDLE_BYTES_PER_STEP
        num_blocks = BUSY_BLOCKS_PER_STEP if is_computing else IDLE_BLOCKS_PER_STEP
        for restoration in list(self._active):
            if restoration.state is RestorationState.ASKING and lookups.left > 0:
                self._ask(restoration, now, lookups)
            if restoration.state is RestorationState.FETCHING and room > 0 and num_blocks > 0:
                num_taken = self.counters.fetched_blocks
                landed = self._land(restoration, min(room, num_blocks * self._format.bytes_per_block), now)
                num_blocks -= self.counters.fetched_blocks - num_taken
                room -= sum(self._format.payload_bytes(p.stored.key.kind) for p in landed)
                placed.extend(landed)
        num_expected, max_ahead = self._num_expected(), self._max_ahead()
        while self._new and len(self._active) < MAX_ACTIVE and lookups.left > 0 and num_expected < max_ahead:
            restoration, _ = self._new.popitem(last=False)
            self._begin(restoration, now, lookups)
            num_expected += restoration.num_found
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

    def _look(self, restoration: Restoration, now: float, *, is_its_turn: bool) -> None:
        """Go on looking for a prompt's blocks out of its turn in the queue, if there are lookups left."""
        lookups = self._turn_lookups
        if lookups.left <= 0:
            return
        if restoration.state is RestorationState.NEW:
            self._begin(restoration, now, lookups, is_its_turn=is_its_turn)
        elif restoration.state is RestorationState.ASKING:
            self._ask(restoration, now, lookups)

    def _begin(
        self, restoration: Restoration, now: float, lookups: LookupBudget, *, is_its_turn: bool = False
    ) -> None:
        restoration.is_ahead = not is_its_turn
        self._new.pop(restoration, None)
        cache = self._cache
        if self._mode == "never" or not restoration.look_at_device(cache.tree, cache.tails, now, lookups):
            restoration.state = RestorationState.DONE
            return
        self._active[restoration] = None
        self._ask(restoration, now, lookups)

    def _ask(self, restoration: Restoration, now: float, lookups: LookupBudget) -> None:
        answer = restoration.ask(self._blocks, self._tails, lookups)
        if answer is Answer.POSTPONED:
            return
        asked_at = now if restoration.asked_at is None else restoration.asked_at
        if answer is Answer.COMING and now - asked_at < ASK_S:
            return
        self._count_found(restoration)
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
        restoration.hold_s = self._hold_s(decision)
        if restoration.is_ahead:
            timeout_s += self._queue_wait_s(restoration)
        else:
            restoration.hold_s += restoration.total_held_s(now)
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

    def _count_found(self, restoration: Restoration) -> None:
        self.found_blocks.update(restoration.tiers)
        if restoration.first_block + restoration.num_found < restoration.num_full_blocks:
            self.missed_requests.update(tier.name for tier in self._blocks.tiers)

    def _decide(self, restoration: Restoration) -> Decision:
        queue_wait_s = self._queue_wait_s(restoration)
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

    def _queue_wait_s(self, restoration: Restoration) -> float:
        """Return how long a prompt is expected to wait for its turn from now on."""
        if not restoration.is_ahead or len(self._active) <= 1:
            return 0.0
        return self._recent_wait_s

    def _timeout_s(self, decision: Decision) -> float:
        """Return how long a fetch may take: some times what is expected, but not longer than computing.

        What a prompt waits for its turn comes on top.
        """
        expected = decision.fetch_s
        timeout_s = MAX_FETCH_TIMEOUT_S if expected is None else PATIENCE * expected
        return min(self._hold_s(decision), max(MIN_FETCH_TIMEOUT_S, timeout_s))

    def _hold_s(self, decision: Decision) -> float:
        """Return how long a sequence may be held for a fetch: not longer than computing takes."""
        if self._mode == "always" or decision.recompute_s is None:
            return MAX_FETCH_TIMEOUT_S
        return min(MAX_FETCH_TIMEOUT_S, max(MIN_FETCH_TIMEOUT_S, decision.recompute_s))

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
        objects = self._aged(batch.take(count), restoration)
        first = restoration.first_block + restoration.num_landed
        placed, num_there = self._cache.restorer.place(
            restoration.namespace,
            restoration.tokens,
            first,
            objects,
            tier=restoration.tiers[restoration.num_landed],
            is_lossy=batch.is_lossy,
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
        objects = self._aged(batch.take(batch.num_ready), restoration)
        found = {stored.key.kind: stored for stored in objects}
        logits = found.get(ObjectKind.LOGITS)
        if logits is None:
            return []
        return self._cache.restorer.place_tail(
            restoration.namespace,
            restoration.tokens,
            found.get(ObjectKind.PARTIAL),
            logits,
            is_lossy=batch.is_lossy,
        )

    def _aged(self, objects: list[CacheObject], restoration: Restoration) -> list[CacheObject]:
        """Take off what has passed of their lifetimes at most since a tier was asked for them."""
        passed_s = self._clock.now() - restoration.started_at
        return [
            stored
            if stored.expires_in_s is None
            else dataclasses.replace(stored, expires_in_s=max(0.0, stored.expires_in_s - passed_s))
            for stored in objects
        ]

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
        self._new.pop(restoration, None)

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
