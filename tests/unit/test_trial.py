"""Policies on trial: fair, cheap by measurement, and honest about what was left out."""

from __future__ import annotations

import random
from array import array

import pytest

from kvcore.trial import MAX_WAITING, Trial


class Stopwatch:
    """A timer that goes on by ``tick_s`` whenever it is read."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.now = 0.0
        self.tick_s = tick_s

    def __call__(self) -> float:
        self.now += self.tick_s
        return self.now


def prompt(document: int, length: int = 128) -> array[int]:
    return array("i", [document * 1000 + place for place in range(length)])


def make(policies=("fifo",), *, live="lru", capacity_blocks=256, tick_s=0.0, **options) -> Trial:
    return Trial(
        policies,
        live_policy=live,
        capacity_blocks=capacity_blocks,
        block_size=16,
        timer=Stopwatch(tick_s),
        **options,
    )


def test_the_live_policy_has_a_ghost_too_and_comes_first():
    trial = make(("best", "lru", "fifo"))
    assert [(one.policy, one.is_live) for one in trial.report()] == [
        ("lru", True),
        ("foresight", False),
        ("fifo", False),
    ]


def test_a_trial_counts_what_its_ghosts_hit():
    trial = make()
    for now in range(4):
        trial.observe(1, prompt(7), 5, float(now))
        trial.step_took(1.0)
    for one in trial.report():
        assert (one.num_requests, one.num_tokens, one.num_skipped) == (4, 512, 0)
        assert one.token_hit_rate == one.request_hit_rate == 75.0
        assert one.sampled_share == 1.0


def test_namespaces_do_not_share_in_a_trial():
    trial = make()
    for namespace in (1, 2):
        trial.observe(namespace, prompt(7), 5, 0.0)
        trial.step_took(1.0)
    assert [one.request_hit_rate for one in trial.report()] == [0.0, 0.0]


def test_policies_differ_where_they_should():
    chance, trial = random.Random(3), make(("fifo",), capacity_blocks=64)
    for now in range(400):
        document = 1 if now % 2 else chance.randrange(2, 40)
        trial.observe(0, prompt(document), 5, float(now))
        trial.step_took(1.0)
    lru, fifo = trial.report()
    assert lru.token_hit_rate > fifo.token_hit_rate


def test_without_steps_there_is_no_budget_and_nothing_runs():
    trial = make(tick_s=0.001)
    trial.observe(0, prompt(1), 5, 0.0)
    trial.step_took(0.0)
    assert trial.num_requests == 0
    trial.step_took(10.0)
    assert trial.num_requests == 1


def test_a_trial_that_falls_behind_lowers_its_share_and_stays_in_its_budget():
    trial = make(tick_s=0.0001, capacity_blocks=4096, max_share=0.02)
    for now in range(3000):  # looking at a request costs 0.1 ms, replaying it as much; a step earns 0.1 ms
        trial.observe(0, prompt(now), 5, float(now))
        trial.step_took(0.005)
    (live, _) = trial.report()
    assert live.sampled_share < 1.0
    assert live.num_requests > 0
    assert live.cost_share <= 0.0201


def test_replaying_stops_where_the_budget_ends():
    trial = make(max_share=0.02)
    stopwatch = trial._timer
    for now in range(50):
        trial.observe(0, prompt(now), 5, float(now))  # free of charge: the stopwatch stands
    assert isinstance(stopwatch, Stopwatch)
    stopwatch.tick_s = 0.01
    for _ in range(20):
        trial.step_took(1.0)
    assert trial.spent_s <= 0.02 * trial.steps_s + 0.01  # one request at most beyond
    assert 0 < trial.num_requests < 50


def test_what_nobody_had_time_for_is_counted():
    trial = make()
    for now in range(MAX_WAITING + 5):
        trial.observe(0, prompt(now), 5, float(now))
    assert trial.num_skipped == 5


def test_a_large_cache_is_sampled_by_family():
    trial = make(("fifo",), capacity_blocks=131_072)
    share = trial.report()[0].sampled_share
    assert share == 0.25
    for now in range(2000):
        trial.observe(0, prompt(now % 1000), 5, float(now))
        trial.step_took(1.0)
    live = trial.report()[0]
    assert 0.2 < live.num_requests / 2000 < 0.3
    assert live.token_hit_rate == 50.0  # a family is in with all of its requests, or out


@pytest.mark.parametrize(
    "wrong", [{"capacity_blocks": 0}, {"max_share": 0.0}, {"max_share": 1.5}, {"policies": ("mru",)}]
)
def test_a_trial_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"at least 1|max_share|mru"):
        make(**wrong)
