"""The risk meter: it fires when something went wrong, and never when nothing did."""

from __future__ import annotations

import math
import random

import pytest

from kvcore.risk import RiskBudget, RiskMeter


def feed(meter, count, *, share, seed, key="a", distance=0.0, spread=0.0):
    """Observe ``count`` comparisons with a planted share of changes and a planted divergence."""
    draw = random.Random(seed)
    for _ in range(count):
        away = max(0.0, draw.gauss(distance, spread))
        meter.observe(key, 1.0 - away, away, draw.random() < share)


def test_planted_drift_fires_once_for_its_key_and_once_for_all():
    alarms = []
    meter = RiskMeter(RiskBudget(max_changed=0.05), on_alarm=alarms.append)
    feed(meter, 1000, share=0.01, seed=1)
    assert alarms == []
    feed(meter, 1000, share=0.3, seed=2)
    assert [(alarm.key, alarm.measure) for alarm in alarms] == [("a", "changed"), (None, "changed")]
    assert alarms[0].interval.lower > alarms[0].limit == 0.05
    assert meter.is_over_budget("a")
    assert meter.is_over_budget()


def test_no_drift_stays_silent_over_many_seeds():
    for seed in range(20):
        alarms = []
        meter = RiskMeter(RiskBudget(max_changed=0.05, max_l2=0.5), on_alarm=alarms.append)
        feed(meter, 3000, share=0.01, seed=seed, distance=0.1, spread=0.05)
        assert alarms == []
        assert not meter.is_over_budget()


def test_no_observation_at_all_is_neither_over_budget_nor_safe():
    meter = RiskMeter(RiskBudget())
    assert not meter.is_over_budget()
    assert not meter.is_over_budget("unknown")
    assert not meter.is_proven_safe("unknown")
    assert meter.estimate("unknown").changed.weight == 0


def test_few_good_comparisons_prove_nothing_and_many_do():
    meter = RiskMeter(RiskBudget(max_changed=0.02), half_life=1e9)
    feed(meter, 20, share=0.0, seed=1)
    assert not meter.is_proven_safe("a")
    assert not meter.is_over_budget("a")
    feed(meter, 400, share=0.0, seed=1)
    assert meter.is_proven_safe("a")


def test_divergence_alone_fires_where_nobody_compares_answers():
    alarms = []
    meter = RiskMeter(
        RiskBudget(max_changed=None, max_l2=0.1, max_cosine_distance=0.1), on_alarm=alarms.append
    )
    draw = random.Random(3)
    for _ in range(2000):
        meter.observe("block", 1.0, abs(draw.gauss(0.02, 0.01)), None)
    assert alarms == []
    for _ in range(2000):
        meter.observe("block", 1.0, abs(draw.gauss(0.4, 0.05)), None)
    assert {(alarm.key, alarm.measure) for alarm in alarms} == {("block", "l2"), (None, "l2")}
    assert meter.estimate("block").changed.weight == 0


def test_an_alarm_fires_again_only_after_things_were_well_in_between():
    alarms = []
    meter = RiskMeter(RiskBudget(max_changed=0.1), half_life=50, on_alarm=alarms.append)
    for seed in range(3):
        feed(meter, 500, share=0.5, seed=seed)
        assert len(alarms) == 2 * (seed + 1)
        feed(meter, 500, share=0.0, seed=seed)
        assert not meter.is_over_budget("a")


def test_old_observations_are_forgotten():
    meter = RiskMeter(RiskBudget(), half_life=100)
    feed(meter, 2000, share=1.0, seed=1)
    feed(meter, 1000, share=0.0, seed=1)
    estimate = meter.estimate("a")
    assert estimate.changed.estimate < 0.002
    assert estimate.num_observed == 3000
    assert estimate.changed.weight < 300  # a half-life of 100 never counts more than 2 * 100 / ln 2


def test_one_bad_key_is_found_among_good_ones():
    meter = RiskMeter(RiskBudget(max_changed=0.05))
    for number in range(20):
        feed(meter, 200, share=0.5 if number == 7 else 0.0, seed=number, key=number)
    assert [key for key in meter.known_keys() if meter.is_over_budget(key)] == [7]


def test_the_number_of_keys_is_bounded_and_the_sum_keeps_all():
    meter = RiskMeter(RiskBudget(), max_keys=10)
    for number in range(1000):
        meter.observe(number, 1.0, 0.0, False)
    assert meter.known_keys() == list(range(990, 1000))
    assert meter.estimate().num_observed == 1000


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(share):
    inside = 0
    for seed in range(200):
        meter = RiskMeter(RiskBudget(), half_life=1e9, confidence=0.95)
        feed(meter, 150, share=share, seed=seed)
        interval = meter.estimate("a").changed
        assert 0 <= interval.lower <= interval.estimate <= interval.upper <= 1
        inside += interval.lower <= share <= interval.upper
    assert inside >= 0.85 * 200  # each end has 95% for itself


def test_the_mean_divergence_is_covered_too():
    for seed in range(50):
        meter = RiskMeter(RiskBudget(), half_life=1e9)
        draw = random.Random(seed)
        for _ in range(500):
            meter.observe("a", 1.0, draw.choice([0.0, 0.0, 0.0, 0.8]), None)
        interval = meter.estimate("a").l2
        assert interval.lower <= 0.2 <= interval.upper


def test_what_is_no_number_counts_as_the_worst():
    meter = RiskMeter(RiskBudget(max_changed=None, max_l2=1.0))
    for _ in range(200):
        meter.observe("a", math.nan, math.inf, None)
    assert meter.num_invalid == 200
    assert meter.is_over_budget("a")


def test_a_limit_that_no_measurement_can_reach_is_refused():
    with pytest.raises(ValueError, match="max_l2"):
        RiskBudget(max_l2=2.0)
    with pytest.raises(ValueError, match="max_changed"):
        RiskBudget(max_changed=1.0)


def test_a_limit_that_the_remembered_observations_could_never_prove_exceeded_is_refused():
    with pytest.raises(ValueError, match="cosine_distance could never"):
        RiskMeter(RiskBudget(max_cosine_distance=1.9), half_life=10)
    with pytest.raises(ValueError, match="changed could never"):
        RiskMeter(RiskBudget(max_changed=0.9), half_life=5)


def test_every_limit_that_is_allowed_can_fire():
    for limit in (0.001, 0.5, 1.9):
        alarms = []
        meter = RiskMeter(
            RiskBudget(max_changed=None, max_l2=limit), on_alarm=alarms.append, half_life=10_000
        )
        for _ in range(1000):
            meter.observe("a", 1.0, 2.0, None)
        assert [alarm.key for alarm in alarms] == ["a", None]


def chernoff(limit=0.01, **more):
    return RiskMeter(
        RiskBudget(max_changed=limit), confidence=0.999, share_interval="chernoff", half_life=1e9, **more
    )


def test_with_chernoffs_interval_one_change_in_one_comparison_proves_nothing():
    meter, hasty = chernoff(), RiskMeter(RiskBudget(max_changed=0.01), confidence=0.999)
    for each in (meter, hasty):
        each.observe("a", 1.0, 0.0, True)
    assert hasty.is_over_budget("a")
    assert not meter.is_over_budget("a")
    meter.observe("a", 1.0, 0.0, True)
    assert meter.is_over_budget("a")  # two of two: one chance in ten thousand


def test_with_chernoffs_interval_what_is_safe_takes_as_many_clean_comparisons_as_the_power_says():
    meter = chernoff(0.05)
    needed = math.ceil(math.log(0.001) / math.log(0.95))
    feed(meter, needed - 1, share=0.0, seed=1)
    assert not meter.is_proven_safe("a")
    feed(meter, 1, share=0.0, seed=1)
    assert meter.is_proven_safe("a")


@pytest.mark.parametrize("share", [0.002, 0.02, 0.5, 0.99])
def test_chernoffs_interval_covers_the_truth_for_every_number_of_comparisons(share):
    outside = 0
    for seed in range(200):
        meter = chernoff()
        feed(meter, 1 + seed, share=share, seed=seed)
        interval = meter.estimate("a").changed
        assert 0 <= interval.lower <= interval.estimate <= interval.upper <= 1
        outside += not interval.lower <= share <= interval.upper
    assert outside <= 2  # of 200, at one in a thousand for each end


def test_a_recovery_is_told_once_for_each_alarm():
    alarms, recoveries = [], []
    meter = RiskMeter(
        RiskBudget(max_changed=0.1), half_life=50, on_alarm=alarms.append, on_recovery=recoveries.append
    )
    feed(meter, 500, share=0.5, seed=1)
    assert recoveries == []
    feed(meter, 500, share=0.0, seed=1)
    assert [each.key for each in recoveries] == [each.key for each in alarms] == ["a", None]
    assert all(each.interval.estimate <= each.limit for each in recoveries)
