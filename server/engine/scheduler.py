"""The scheduler: decides, step by step, which tokens of which sequence are computed.

One step::

    submit / cancel ─► plan() ─► [the worker runs it] ─► apply(plan, result) ─► drain_events()
                          │                           └► abort(plan, reason)
                          ├ drop what is past its deadline, sweep what has expired
                          ├ running sequences first, earliest first: one token each, or the next chunk
                          ├ then waiting ones, in the queue's order, while budget and blocks last
                          └ sort depth-first, find the prefix groups

Under memory pressure the latest arrival of the lowest priority is preempted: its blocks go back to the
tree (where they may still be cached when it returns) and it queues again in its old place. The earliest
sequence is never preempted for another, so something always finishes.

The parts: ``RequestBook`` (requests and events), ``WaitingRoom`` (queue and cursors), ``Admission`` (who
joins), ``RunningSet`` (order of service), ``assemble`` (the plan). Pure: no threads, no asyncio, no
tensors; the clock is injected.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import msgspec

from kvcore.clock import Clock
from kvcore.errors import IntegrityError
from kvcore.keys import NamespaceKey
from kvcore.lease import Lease
from kvcore.manager import CacheManager
from kvcore.policies import make_policy
from server.engine.admission import Admission
from server.engine.assembly import assemble
from server.engine.book import Event, RequestBook
from server.engine.counters import EngineCounters
from server.engine.messages import Cancel, EngineStats, FailureKind, Submit
from server.engine.options import EngineOptions
from server.engine.plan import SampledToken, StepPlan, StepResult
from server.engine.request import Request, Sequence, SequenceState
from server.engine.running import RunningSet, lease_of
from server.engine.trial import PolicyTrial
from server.engine.waiting import WaitingRoom

if TYPE_CHECKING:
    from server.engine.cache_ops.interface import TierView
    from server.engine.tiering.tiering import Tiering

__all__ = ["Scheduler"]


class Scheduler:
    """Own the requests of one engine. See the module's text for the order of calls."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        num_blocks: int,
        block_size: int,
        num_logits_slots: int,
        clock: Clock,
        fingerprint: str = "",
    ) -> None:
        self.options = options
        self.cache = CacheManager(
            num_blocks=num_blocks,
            block_size=block_size,
            clock=clock,
            num_logits_slots=num_logits_slots,
            policy=make_policy(options.policy, capacity_blocks=num_blocks, block_tokens=block_size),
            max_share=options.namespace_quota,
            hard_pin_share=options.hard_pin_share,
            soft_pin_share=options.soft_pin_share,
        )
        if options.canary is not None and options.canary[1]:
            name, share = options.canary
            capacity = max(1, round(share * num_blocks))
            policy = make_policy(name, capacity_blocks=capacity, block_tokens=block_size)
            self.cache.control.start_canary(policy, share)
        self.counters = EngineCounters()
        self._clock = clock
        self._fingerprint = fingerprint
        self._book = RequestBook(self.counters)
        self._waiting = WaitingRoom(self.cache, waiting_bound_s=options.waiting_bound_s)
        self._running = RunningSet(block_size)
        self._admission = Admission(
            options,
            cache=self.cache,
            waiting=self._waiting,
            running=self._running,
            clock=clock,
            fingerprint=fingerprint,
        )
        self._planned: dict[int, Sequence] = {}
        """Sequences of the running step by id, in the order of planning; empty between steps."""
        self._late: list[Cancel] = []
        """Cancellations that came while a step was running."""
        self._tiering: Tiering | None = None
        self.tier_view: TierView | None = None
        """What ``stats`` tells of tiers."""
        self.trial = PolicyTrial(self.cache, policies=options.trial)
        """Policies in the shadow of the live one, told of each request that reads and writes the cache."""
        self.cache.cost = self._cost
        self._sequence_ids = itertools.count(1)
        self._step_ids = itertools.count(1)

    def __repr__(self) -> str:
        return f"Scheduler({len(self._running)} running, {len(self._waiting)} waiting, {self.cache!r})"

    def use_tiers(self, tiering: Tiering) -> None:
        """Move blocks between the device and these tiers from now on. Call before the first request."""
        self._tiering = tiering
        self._waiting.restorations = tiering.restorations
        self._admission.restorations = tiering.restorations

    # -- what the front end says --------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Queue a request, or refuse it (``drain_events`` tells)."""
        refusal = self._admission.refusal(message, recent_step_s=self.counters.recent_step_s)
        if refusal is not None:
            self._book.refuse(refusal)
            return
        now, spec = self._clock.now(), message.spec
        deadline = None if message.deadline_s is None else now + message.deadline_s
        namespace = NamespaceKey(self._fingerprint, salt=spec.salt)
        request = Request(message.key, spec, namespace, now=now, deadline=deadline)
        is_private = not spec.write_prefix or len(spec.token_ids) < self.options.min_cached_tokens
        first_id = None
        for index in range(spec.num_samples):
            sequence_id = next(self._sequence_ids)
            first_id = first_id or sequence_id
            owner = (first_id if is_private else None) if spec.use_kv_cache else sequence_id
            request.sequences.append(Sequence(request, index, sequence_id, owner=owner))
        self._book.enter(request)
        self._waiting.receive(request)

    def cancel(self, message: Cancel) -> None:
        """End one sample or all of a request; unknown keys are ignored (it may have just finished).

        While a step is running, this takes effect when the step is applied or aborted.
        """
        if self._planned:
            self._late.append(message)
            return
        request = self._book.requests.get(message.key)
        if request is None:
            return
        for sequence in request.sequences:
            if message.sample_index in (None, sequence.sample_index):
                self._end(sequence)
        self._waiting.let_in(request)
        self._finish_if_done(request)

    def refuse_new(self) -> None:
        """Accept nothing from now on; what is queued or running goes on."""
        self._admission.is_open = False

    # -- steps --------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Decide the next step. None: there is nothing to compute now."""
        if self._planned:
            raise IntegrityError("plan() before the last step was applied or aborted")
        now = self._clock.now()
        for request in self._book.due(now):
            for sequence in request.sequences:
                self._end(sequence)
            self._close_failed(request, FailureKind.DEADLINE, "the deadline passed")
        self.cache.sweep_expired()
        self._waiting.follow_cache(now)
        tiering = self._tiering
        loads = [] if tiering is None else tiering.advance(is_computing=bool(self._running))
        budget, is_cut = self._plan_running(self.options.max_batch_tokens)
        for sequence, lease, count in self._admission.choose(budget, is_cut=is_cut, now=now):
            self._admit(sequence, lease, now)
            self._extend(sequence, lease, count)
        saves = [] if tiering is None else tiering.collect(is_computing=bool(self._planned))
        if not self._planned and not loads and not saves:
            return None
        plan = assemble(
            next(self._step_ids), self._planned.values(), self.cache.block_size, saves=saves, loads=loads
        )
        self.counters.add_groups(plan.groups, [len(part.token_ids) for part in plan.sequences])
        return plan

    def apply(self, plan: StepPlan, result: StepResult) -> None:
        """Take a step's result: settle blocks, append tokens, end what is finished."""
        planned, self._planned = self._planned, {}
        self.cache.commit(
            [lease_of(s) for s in planned.values()],
            spoiled={lease_of(s) for s in planned.values() if s.sequence_id in result.failed},
        )
        if self._tiering is not None:
            self._tiering.applied(plan, result)
        self.trial.step_took(result.forward_s)
        now = self._clock.now()
        self.counters.add_step(plan)
        num_tokens = plan.num_tokens
        if num_tokens and result.forward_s:
            queue = self._waiting.queue
            queue.seconds_per_token += 0.1 * (result.forward_s / num_tokens - queue.seconds_per_token)
        for part, sampled in zip(plan.sequences, result.sampled, strict=True):
            sequence = planned[part.sequence_id]
            if sequence.state is SequenceState.DONE:
                continue  # another sample's failure took it along
            if sequence.reports_progress:
                self._book.progress(sequence.request, sequence.num_computed)
            reason = result.failed.get(part.sequence_id)
            if reason is not None:
                self._fail(sequence.request, FailureKind.NUMERICAL, reason)
            elif sampled is not None:
                self._append(sequence, sampled, now)
        self._cancel_late()

    def abort(self, plan: StepPlan, reason: str, *, kind: FailureKind = FailureKind.INTERNAL) -> None:
        """The worker failed: roll the step back and fail its requests. Nobody else is touched."""
        planned, self._planned = self._planned, {}
        self.cache.roll_back([lease_of(s) for s in planned.values()])
        if self._tiering is not None:
            self._tiering.aborted()
        for sequence in planned.values():
            sequence.lease = None
        for sequence in planned.values():
            self._fail(sequence.request, kind, reason)
        self._cancel_late()

    def drain_events(self) -> list[Event]:
        """Return everything said since the last call, in order."""
        return self._book.drain()

    # -- looking ------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Say whether any request is running or waiting, or blocks are to be moved."""
        return bool(self._book.requests) or (self._tiering is not None and self._tiering.has_work)

    @property
    def idle_wait_s(self) -> float | None:
        """Return how long the engine may sleep without work before it plans again; None: for ever."""
        return None if self._tiering is None else self._tiering.idle_wait_s

    def largest_need(self) -> int:
        """Return the blocks that the largest accepted request needs: hard pins have to leave them."""
        size = self.cache.block_size
        needs = (len(r.prompt) + r.spec.max_new_tokens for r in self._book.requests.values())
        return max((-(-need // size) for need in needs), default=0)

    @property
    def running_keys(self) -> list[int]:
        """Return the keys of requests that take part in steps, for the log of a crash."""
        return sorted({s.request.key for s in self._running})

    def stats(self) -> EngineStats:
        """Return a snapshot for metrics."""
        cache = self.cache
        leased = cache.pool.num_blocks - cache.pool.num_free - cache.tree.num_evictable
        view, pins = self.tier_view, cache.pins
        snapshot = self.counters.snapshot(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=cache.pool.num_blocks,
            num_blocks_leased=leased,
            num_blocks_cached=cache.tree.num_evictable,
            num_blocks_free=cache.pool.num_free,
            evicted_blocks=cache.counters.evicted_blocks,
            expired_blocks=cache.counters.expired_blocks,
        )
        return msgspec.structs.replace(
            snapshot,
            evicted_by_cause=dict(cache.counters.evicted_by_cause),
            pinned_blocks=pins.num_pinned,
            tiers=[] if view is None else view.reports(),
            prefetch=None if view is None else view.prefetch(),
            trial_cost_share=self.trial.cost_share,
        )

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if the cache or the book-keeping of requests is inconsistent."""
        self.cache.check_integrity()
        leases = {lease_of(s) for s in self._running}
        if len(leases) != len(self._running) or leases != set(self.cache.leases):
            raise IntegrityError("leases and running sequences differ")
        requests = self._book.requests.values()
        alive = [s for r in requests for s in r.sequences if s.state is not SequenceState.DONE]
        listed = [*self._running, *self._waiting, *(s for r in requests for s in r.held_back)]
        if len(alive) != len(listed) or set(alive) != set(listed):
            raise IntegrityError("a sequence is neither running nor waiting, or both")
        if len(self._waiting) + len(self._running) != len(alive):
            raise IntegrityError("the number of those waiting is wrong")
        if any(not r.unfinished for r in requests):
            raise IntegrityError("a finished request is still listed")

    # -- running ------------------------------------------------------------------------------------

    def _plan_running(self, budget: int) -> tuple[int, bool]:
        """Plan every running sequence that budget and blocks allow.

        Return the budget left, and whether one got less than it needs.
        """
        order = list(self._running)
        missing = [len(s.tokens) - lease_of(s).num_computed for s in order]
        share = self._admission.share_for_newcomers(budget) if sum(missing) > budget else 0
        is_cut = False
        for index, sequence in enumerate(order):
            lease = sequence.lease
            if lease is None:
                continue  # preempted for an earlier one
            if not budget:
                return 0, True
            # A long prompt leaves a token to each that comes after it: decoding never stalls behind it.
            count = min(missing[index], max(1, budget - (len(order) - index - 1) - share))
            if self._make_room(sequence, lease, count):
                self._extend(sequence, lease, count)
                budget -= count
                is_cut = is_cut or count < missing[index]
        return budget, is_cut

    def _make_room(self, sequence: Sequence, lease: Lease, count: int) -> bool:
        """Preempt from the end until ``count`` positions fit. False: the sequence itself had to go."""
        needed = self.cache.blocks_needed(lease, count)
        while needed and needed > self.cache.num_available:
            victim = self._running.last
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Give a running sequence's blocks back to the tree and queue it again in its old place."""
        lease = lease_of(sequence)
        sequence.num_recompute = max(sequence.num_recompute, lease.num_computed)
        sequence.request.num_preemptions += 1
        self.counters.preemptions += 1
        self._stop_running(sequence)
        sequence.state = SequenceState.WAITING
        self._waiting.enter(sequence)

    def _admit(self, sequence: Sequence, lease: Lease, now: float) -> None:
        if self._tiering is not None and sequence.owner is None and not sequence.request.was_admitted:
            sequence.request.session = self._tiering.session_of(lease, sequence.restoration)
        self._waiting.leave(sequence, admitted=lease)
        sequence.lease = lease
        sequence.state = SequenceState.RUNNING
        self._running.add(sequence)
        request = sequence.request
        if not request.was_admitted:
            if sequence.may_read:
                restore_s = 0.0 if request.restore is None else request.restore.wait_s
                self.cache.count_request(lease, restored_tokens=request.restored_tokens, restore_s=restore_s)
            self._book.admit(request, lease.match, now)

    def _extend(self, sequence: Sequence, lease: Lease, count: int) -> None:
        if count:
            start = lease.num_computed
            if start < sequence.num_recompute:
                self.counters.recomputed_tokens += min(start + count, sequence.num_recompute) - start
            self.cache.extend(lease, count)
            length = len(sequence.tokens)
            if length == sequence.num_prompt_tokens == start + count and sequence.keeps_tail:
                self.cache.add_tail(lease)
        self._planned[sequence.sequence_id] = sequence

    def _cost(self, start: int, stop: int) -> float:
        """Return what computing positions ``[start, stop)`` takes, as measured over recent steps."""
        if self._tiering is not None:
            measured_s = self._tiering.worth.recompute_s(stop - start, start)
            if measured_s is not None:
                return measured_s
        return (stop - start) * self._waiting.queue.seconds_per_token

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        if sequence.lease is not None:  # else its step was rolled back
            self.cache.release(sequence.lease)
            sequence.lease = None

    # -- tokens and ends ----------------------------------------------------------------------------

    def _append(self, sequence: Sequence, sampled: SampledToken, now: float) -> None:
        request = sequence.request
        sequence.append(sampled.token_id)
        finish = sequence.finish_reason(sampled.token_id)
        self._book.token(sequence, sampled, finish, now)
        if finish is not None:
            self._note_end(sequence, now)
            self._end(sequence)
        elif not request.spec.use_kv_cache:
            self._start_over(sequence)
        if request.held_back:
            self._waiting.let_in(request)
        self._finish_if_done(request)

    def _note_end(self, sequence: Sequence, now: float) -> None:
        """Let policies learn from a request that came to its end: once, by its first sample."""
        if sequence.sample_index or sequence.owner is not None:
            return
        request = sequence.request
        self.cache.note_end(lease_of(sequence), num_prompt_tokens=sequence.num_prompt_tokens)
        if request.spec.read_prefix:
            self.trial.observe(request.namespace, request.prompt, sequence.num_generated, now)

    def _start_over(self, sequence: Sequence) -> None:
        """Let the next step compute the whole sequence again: the reference without a cache."""
        sequence.num_recompute = len(sequence.tokens) - 1
        self.cache.release(lease_of(sequence))
        found = self.cache.find(sequence.request.namespace, sequence.tokens, read=False)
        sequence.lease = self.cache.open(found, sequence.tokens, owner=sequence.owner)

    def _end(self, sequence: Sequence) -> None:
        """Free what a sequence holds, wherever it is; its blocks stay cached."""
        if sequence.state is SequenceState.DONE:
            return
        if sequence.state is SequenceState.WAITING:
            self._waiting.leave(sequence)
        else:
            if self._tiering is not None and sequence.lease is not None and not sequence.sample_index:
                request = sequence.request
                self._tiering.session_ended(request.session, sequence.lease, request.namespace)
            self._stop_running(sequence)
        sequence.state = SequenceState.DONE
        sequence.request.unfinished -= 1

    def _finish_if_done(self, request: Request) -> None:
        if not request.unfinished and request.key in self._book.requests:
            self._forget_private(request)
            self._book.finish(request, self._clock.now())

    def _fail(self, request: Request, kind: FailureKind, reason: str) -> None:
        """End a request with an error. What it computed is not left behind."""
        if request.key not in self._book.requests:
            return
        leases = [s.lease for s in request.sequences if s.lease is not None]
        if self._tiering is not None:
            self._tiering.spoiled(leases)
        self.cache.discard(leases)
        for sequence in request.sequences:
            sequence.lease = None
            self._end(sequence)
        self._close_failed(request, kind, reason)

    def _close_failed(self, request: Request, kind: FailureKind, reason: str) -> None:
        self._forget_private(request)
        self._book.fail(request, kind, reason)

    def _forget_private(self, request: Request) -> None:
        owner = request.sequences[0].owner
        if owner is not None:
            self.cache.forget_owner(owner)

    def _cancel_late(self) -> None:
        late, self._late = self._late, []
        for message in late:
            self.cancel(message)
