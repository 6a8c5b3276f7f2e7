"""The batcher with everything random, against a list of what waits and what was promised about it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.predict.batch import Batch
from server.predict.batcher import Batcher
from server.predict.errors import OverloadedError

MODELS = {"m": False, "n": False, "padded": True}


@dataclass
class Call:
    """What is known of a call that waits."""

    model: str
    lengths: list[int]
    deadline_s: float | None
    left: set[int]
    num_before: int
    """Calls in front of it in its model's ring: they and their models bound its wait."""
    batches_allowed: float = field(default=float("inf"))


class BatcherMachine(RuleBasedStateMachine):
    """Add, cancel, compute, fail, let time pass. Every batch is checked against the promises."""

    @initialize(
        budget=st.integers(1, 60),
        max_delay_s=st.sampled_from([0.0, 0.002, 0.05]),
        max_waiting=st.sampled_from([50, 1000]),
    )
    def start(self, budget, max_delay_s, max_waiting):
        self.budget, self.max_delay_s, self.max_waiting = budget, max_delay_s, max_waiting
        self.batcher: Batcher[int] = Batcher(
            max_batch_tokens=budget, max_delay_s=max_delay_s, max_waiting_tokens=max_waiting
        )
        self.now_s = 0.0
        self.number = 0
        self.waiting: dict[int, Call] = {}
        self.rings: dict[str, list[int]] = {model: [] for model in MODELS}
        self.num_batches = 0
        self.counts = dict.fromkeys(["added", "taken", "expired", "cancelled", "refused"], 0)
        self.held_since_s: float | None = None
        self.running: Batch[int] | None = None

    @rule(
        model=st.sampled_from(sorted(MODELS)),
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12),
        left_s=st.sampled_from([None, None, 0.01, 0.3, 5.0]),
    )
    def add(self, model, lengths, left_s):
        self.number += 1
        key = self.number
        deadline_s = None if left_s is None else self.now_s + left_s
        waited = self.batcher.num_waiting_tokens
        may_wait = not waited or waited + sum(lengths) <= self.max_waiting
        with nullcontext() if may_wait else pytest.raises(OverloadedError):
            self.batcher.add(
                model, key, lengths, now_s=self.now_s, deadline_s=deadline_s, is_padded=MODELS[model]
            )
        if not may_wait:
            self.counts["refused"] += len(lengths)
            return
        self.counts["added"] += len(lengths)
        ring = self.rings[model]
        call = Call(model, lengths, deadline_s, set(range(len(lengths))), len(ring))
        # Every other batch may go to a deadline that is near; the other ones are turns.
        call.batches_allowed = self.num_batches + 2 * len(MODELS) * (call.num_before + 1)
        self.waiting[key] = call
        ring.append(key)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        key = data.draw(st.sampled_from(sorted(self.waiting)))
        self.batcher.cancel(key)
        self._drop(key, "cancelled")

    @rule(seconds=st.sampled_from([0.0, 0.0001, 0.001, 0.2, 2.0]))
    def let_time_pass(self, seconds):
        self.now_s += seconds

    @rule()
    def expire(self):
        for key in self.batcher.expire(self.now_s):
            self._expired(key)

    @precondition(lambda self: self.running is None)
    @rule()
    def take(self):
        turn = self.batcher.next(self.now_s)
        for key in turn.expired:
            self._expired(key)
        if turn.batch is None:
            self._check_hold(turn.look_again_s)
            return
        self.held_since_s = None
        self._check_batch(turn.batch)
        self.running = turn.batch

    @precondition(lambda self: self.running is not None)
    @rule(a_s=st.sampled_from([0.0, 0.005]), b_s=st.sampled_from([0.0, 0.0001, 0.01]), fails=st.booleans())
    def end_of_the_batch(self, a_s, b_s, fails):
        assert self.running is not None
        seconds = a_s + b_s * self.running.num_tokens
        self.now_s += seconds
        if not fails:
            self.batcher.done(self.running, seconds)
        self.running = None

    def teardown(self):
        """Whatever waits in the end is computed, without anything coming: nothing is stuck."""
        if not hasattr(self, "batcher"):
            return
        for _ in range(10_000):
            turn = self.batcher.next(self.now_s)
            for key in turn.expired:
                self._expired(key)
            if turn.batch is not None:
                self.held_since_s = None
                self._check_batch(turn.batch)
            elif turn.look_again_s is None:
                break
            else:
                self._check_hold(turn.look_again_s)
                self.now_s = turn.look_again_s
        assert not self.waiting
        self.counters_add_up()

    @invariant()
    def counters_add_up(self):
        if not hasattr(self, "batcher"):
            return
        counters, waiting = self.batcher.counters, self.waiting.values()
        assert counters.num_added == self.counts["added"]
        assert counters.num_taken == self.counts["taken"]
        assert counters.num_expired == self.counts["expired"]
        assert counters.num_cancelled == self.counts["cancelled"]
        assert counters.num_refused == self.counts["refused"]
        assert self.batcher.num_waiting_calls == len(waiting)
        assert self.batcher.num_waiting_inputs == sum(len(call.left) for call in waiting)
        assert self.batcher.num_waiting_tokens == sum(
            call.lengths[index] for call in waiting for index in call.left
        )
        assert counters.num_added == (
            counters.num_taken
            + counters.num_expired
            + counters.num_cancelled
            + self.batcher.num_waiting_inputs
        )

    def _check_batch(self, batch: Batch[int]) -> None:
        self.num_batches += 1
        assert batch.shares
        lengths = []
        served = []
        for share in batch.shares:
            call = self.waiting[share.key]
            assert call.model == batch.model, "a batch is of one model"
            assert call.deadline_s is None or call.deadline_s > self.now_s, "expired and computed"
            assert set(share.indices) <= call.left, "computed twice"
            assert share.num_tokens == sum(call.lengths[index] for index in share.indices)
            call.left -= set(share.indices)
            lengths += [call.lengths[index] for index in share.indices]
            served.append(share.key)
        assert batch.num_inputs == len(lengths)
        assert batch.num_tokens == sum(lengths)
        cost = sum(lengths)
        if MODELS[batch.model]:
            cost = len(lengths) * max(lengths)
            assert batch.num_tokens + batch.num_padding_tokens == cost
        else:
            assert batch.num_padding_tokens == 0
        assert cost <= self.budget or len(lengths) == 1, (
            "only one input that is longer goes beyond the budget"
        )
        self.counts["taken"] += len(lengths)
        ring = self.rings[batch.model]
        for key in dict.fromkeys(served):
            ring.remove(key)
            call = self.waiting[key]
            assert self.num_batches <= call.batches_allowed, "waited longer than was promised"
            if call.left:
                call.batches_allowed = self.num_batches + 2 * len(MODELS) * (len(ring) + 1)
                ring.append(key)
            else:
                del self.waiting[key]
        for key, call in self.waiting.items():
            assert self.num_batches < call.batches_allowed, f"call {key} is starved"

    def _check_hold(self, look_again_s: float | None) -> None:
        if not self.waiting:
            assert look_again_s is None
            self.held_since_s = None
            return
        assert look_again_s is not None, "work, but neither a batch nor a time"
        assert look_again_s > self.now_s
        if self.held_since_s is None:
            self.held_since_s = self.now_s
        assert look_again_s <= self.held_since_s + self.max_delay_s + 1e-9
        assert len({call.model for call in self.waiting.values()}) == 1
        model = next(iter(self.waiting.values())).model
        num_tokens = self.batcher.num_waiting_tokens
        assert num_tokens < self.budget
        for call in self.waiting.values():
            if call.deadline_s is not None:
                must_start_s = call.deadline_s - self.batcher.expected_s(model, num_tokens)
                assert look_again_s <= must_start_s + 1e-9

    def _expired(self, key: int) -> None:
        deadline_s = self.waiting[key].deadline_s
        assert deadline_s is not None
        assert deadline_s <= self.now_s
        self._drop(key, "expired")

    def _drop(self, key: int, why: str) -> None:
        call = self.waiting.pop(key)
        self.rings[call.model].remove(key)
        self.counts[why] += len(call.left)


BatcherMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
TestBatcher = BatcherMachine.TestCase
