"""What pins, quotas and counters mean to the scheduler."""

from __future__ import annotations

import pytest

from kvcore.clock import ManualClock
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.pins import PinKind
from server.engine.book import Event
from server.engine.messages import Cancel, Finished, GenerateSpec, Refused, Submit
from server.engine.options import EngineOptions
from server.engine.plan import SampledToken, StepResult
from server.engine.scheduler import Scheduler
from server.engine.trial import PolicyTrial


class Engine:
    """A scheduler whose steps always draw token 7."""

    def __init__(self, num_blocks: int = 16, **options) -> None:
        self.clock = ManualClock()
        self.scheduler = Scheduler(
            EngineOptions(model="none", **options),
            num_blocks=num_blocks,
            block_size=4,
            num_logits_slots=4,
            clock=self.clock,
            fingerprint="model",
        )
        self.key = 0

    def submit(self, tokens: list[int], max_new_tokens: int = 1, **spec) -> int:
        self.key += 1
        self.scheduler.submit(
            Submit(self.key, GenerateSpec(token_ids=tokens, max_new_tokens=max_new_tokens, **spec))
        )
        return self.key

    def finish(self) -> list[Event]:
        """Compute until nothing is left; return all that was said."""
        said = self.scheduler.drain_events()
        while self.scheduler.has_work:
            plan = self.scheduler.plan()
            assert plan is not None
            sampled = [None if part.sampling is None else SampledToken(7) for part in plan.sequences]
            self.scheduler.apply(plan, StepResult(plan.step_id, sampled, forward_s=0.01))
            said += self.scheduler.drain_events()
        self.scheduler.check_integrity()
        return said

    def pin(self, tokens: list[int]) -> None:
        control = self.scheduler.cache.control
        node = control.locate(NamespaceKey("model"), pack_tokens(tokens)).node
        assert node is not None
        control.pin(node, PinKind.HARD)


def test_a_request_that_pins_leave_no_room_for_is_refused_at_once():
    engine = Engine(8)
    engine.submit([1] * 12)
    engine.finish()
    engine.pin([1] * 12)
    engine.submit([2] * 23)
    (refused,) = engine.finish()
    assert isinstance(refused, Refused)
    assert "5 of the pool are not pinned" in refused.reason
    engine.submit([2] * 19)
    assert any(isinstance(event, Finished) for event in engine.finish())


def test_a_request_that_shares_what_is_pinned_is_not_refused():
    engine = Engine(8)
    engine.submit([1] * 12)
    engine.finish()
    engine.pin([1] * 12)
    engine.submit([*[1] * 12, *[2] * 18])
    assert any(isinstance(event, Finished) for event in engine.finish())


def test_the_largest_accepted_request_is_known_to_those_who_pin():
    engine = Engine(16)
    assert engine.scheduler.largest_need() == 0
    engine.submit([1] * 5)
    engine.submit([1] * 20, max_new_tokens=9)
    assert engine.scheduler.largest_need() == 8
    engine.finish()
    assert engine.scheduler.largest_need() == 0


def test_every_request_that_looks_is_counted_once_even_if_preempted():
    engine = Engine(12, max_running=8)
    for number in range(6):
        engine.submit([number] * 9, max_new_tokens=12)
    engine.submit([0] * 9, read_prefix=False)
    engine.finish()
    stats = engine.scheduler.stats()
    totals = engine.scheduler.cache.tree.spaces.totals()
    assert stats.preemptions > 0
    assert (totals.requests, totals.prompt_tokens) == (6, 54)
    assert totals.evicted_blocks == stats.evicted_by_cause
    assert sum(stats.evicted_by_cause.values()) == stats.evicted_blocks > 0


def test_options_decide_policy_canary_quota_and_pin_budgets():
    engine = Engine(
        20,
        policy="s3fifo",
        canary=("fifo", 0.25),
        namespace_quota=0.5,
        hard_pin_share=0.1,
        soft_pin_share=0.2,
    )
    cache = engine.scheduler.cache
    assert (cache.control.policy.name, cache.control.canary.queue.policy.name) == ("s3fifo", "fifo")
    assert cache.quotas.limit_of(NamespaceKey("model")) == 10
    assert (cache.pins.budgets[PinKind.HARD], cache.pins.budgets[PinKind.SOFT]) == (2, 4)


def test_a_trial_sees_each_shared_request_once_and_reports_beside_the_live_policy():
    engine = Engine(64)
    trial = engine.scheduler.trial = PolicyTrial(engine.scheduler.cache, policies=["fifo"], timer=lambda: 0.0)
    for _ in range(3):
        engine.submit([1] * 150, max_new_tokens=2)
        engine.submit([2] * 5, write_prefix=False)
        engine.finish()
    engine.submit([2] * 5, write_prefix=False)  # a request is worked off with a step after its last
    engine.finish()
    live, other = trial.reports()
    assert (live.policy, other.policy) == ("lru", "fifo")
    assert (live.requests, live.tokens) == (3, 450)
    assert live.request_hit_rate == pytest.approx(2 / 3)
    trial.choose([])
    assert (trial.reports(), trial.cost_share) == ([], 0.0)


def test_the_policy_hears_the_end_of_requests_that_were_not_cut_short(monkeypatch):
    engine = Engine()
    ends = []
    monkeypatch.setattr(
        engine.scheduler.cache.control.policy,
        "closed",
        lambda path, prompt, output, now: ends.append((len(path), prompt, output)),
    )
    engine.submit([1] * 9, max_new_tokens=4)
    cancelled = engine.submit([2] * 9, max_new_tokens=4)
    plan = engine.scheduler.plan()
    sampled = [SampledToken(7) for _ in plan.sequences]
    engine.scheduler.apply(plan, StepResult(plan.step_id, sampled, forward_s=0.01))
    engine.scheduler.cancel(Cancel(cancelled))
    engine.finish()
    assert ends == [(3, 9, 4)]
