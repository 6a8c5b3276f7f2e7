"""The risk meter's intervals against what the formulas give for counts that are worked out beside it."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from kvcore.risk import Interval, RiskBudget, RiskMeter

FOR_EVER = 1e12
"""Half-life of what is never forgotten."""


def meter_of(changes: int, count: int, *, away: tuple[float, ...] = (0.0,), **more: object) -> RiskMeter:
    """Return a meter that saw so many changes, and these relative distances in turn."""
    meter = RiskMeter(RiskBudget(), half_life=FOR_EVER, **more)  # type: ignore[arg-type]
    for number in range(count):
        far = away[number % len(away)]
        meter.observe("key", 1.0 - far / 2, far, number < changes)
    return meter


def divergence(share: float, end: float) -> float:
    return sum(p * math.log(p / q) for p, q in ((share, end), (1 - share, 1 - end)) if p > 0)


def test_wilsons_ends_are_where_the_normal_test_just_rejects() -> None:
    for changes, count, confidence in ((30, 100, 0.95), (3, 40, 0.99), (199, 200, 0.9)):
        interval = meter_of(changes, count, confidence=confidence).estimate("key").changed
        share, z = changes / count, NormalDist().inv_cdf(confidence)
        assert interval.estimate == pytest.approx(share)
        assert interval.weight == pytest.approx(count)
        for end in (interval.lower, interval.upper):
            assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count), rel=1e-6)
        assert interval.lower < share < interval.upper


def test_chernoffs_ends_are_where_the_divergence_says() -> None:
    for changes, count, confidence in ((30, 100, 0.95), (3, 40, 0.999), (39, 40, 0.999)):
        meter = meter_of(changes, count, confidence=confidence, share_interval="chernoff")
        interval, share = meter.estimate("key").changed, changes / count
        reach = -math.log(1 - confidence) / count
        for end in (interval.lower, interval.upper):
            inside = end + math.copysign(2e-6, share - end)
            assert divergence(share, inside) < reach <= divergence(share, end)  # rounded outwards
        assert interval.lower < share < interval.upper
    for changes, lower, upper in ((0, 0.0, 1 - 0.001 ** (1 / 50)), (50, 0.001 ** (1 / 50), 1.0)):
        interval = meter_of(changes, 50, confidence=0.999, share_interval="chernoff").estimate("key").changed
        assert [interval.lower, interval.upper] == pytest.approx([lower, upper], abs=1e-5)


def test_bernsteins_ends_are_mean_and_spread_and_what_one_outlier_could_do() -> None:
    count, away, confidence = 600, (0.0, 0.1, 0.8), 0.95
    estimate = meter_of(0, count, away=away, confidence=confidence).estimate("key")
    term = math.log(2 / (1 - confidence))
    for interval, scale in ((estimate.l2, 1.0), (estimate.cosine_distance, 0.5)):
        mean = scale * sum(away) / 3
        variance = sum((scale * each - mean) ** 2 for each in away) / 3 * count / (count - 1)
        half = math.sqrt(2 * variance * term / count) + 7 * 2 * term / (3 * (count - 1))
        assert interval == Interval(
            pytest.approx(mean - half), pytest.approx(mean), pytest.approx(mean + half), pytest.approx(count)
        )


def test_of_one_comparison_nothing_is_known_but_itself() -> None:
    assert meter_of(0, 1, away=(0.4,)).estimate("key").l2 == Interval(0.0, 0.4, 2.0, 1.0)
    of_two = meter_of(0, 2, away=(0.4,)).estimate("key").l2
    assert (of_two.lower, of_two.upper) == (0.0, 2.0)


def test_nothing_lies_beyond_what_can_be() -> None:
    near = meter_of(0, 30, away=(0.001,)).estimate("key").l2
    far = meter_of(0, 30, away=(2.0,)).estimate("key").l2
    assert near.lower == 0.0
    assert far.upper == 2.0
    further = RiskMeter(RiskBudget(), half_life=FOR_EVER)
    further.observe("key", -3.0, 50.0, False)
    further.observe("key", 1.5, -1.0, False)
    estimate = further.estimate("key")
    for interval in (estimate.l2, estimate.cosine_distance):
        assert interval.estimate == pytest.approx(1.0)  # of 2 and 0


def test_an_observation_counts_half_after_a_half_life_and_weights_shrink_as_kish_says() -> None:
    meter = RiskMeter(RiskBudget(), half_life=10.0)
    meter.observe("key", 1.0, 1.0, None)
    for _ in range(10):
        meter.observe("key", 1.0, 0.0, None)
    weights = [0.5 ** (number / 10) for number in range(11)]
    found = meter.estimate("key").l2
    assert found.estimate == pytest.approx(0.5 / sum(weights))
    assert found.weight == pytest.approx(sum(weights) ** 2 / sum(each**2 for each in weights))


@pytest.mark.parametrize("changes", range(0, 31, 3))
@pytest.mark.parametrize("interval", ["wilson", "chernoff"])
def test_what_is_said_without_the_ends_is_what_the_ends_say(changes: int, interval: str) -> None:
    for limit in (0.05, 0.2, 0.5, 0.9):
        meter = RiskMeter(
            RiskBudget(max_changed=limit, max_l2=limit),
            half_life=FOR_EVER,
            confidence=0.9,
            share_interval=interval,  # type: ignore[arg-type]
        )
        for number in range(30):
            meter.observe("key", 1.0, float(number < changes), number < changes)
        estimate = meter.estimate("key")
        assert (
            meter.is_over_budget("key")
            is meter.is_over_budget()
            is any(each.lower > limit for each in (estimate.changed, estimate.l2))
        )
        assert (
            meter.is_proven_safe("key")
            is meter.is_proven_safe()
            is all(each.upper <= limit for each in (estimate.changed, estimate.l2))
        )


def test_a_share_is_allowed_that_its_own_interval_can_prove() -> None:
    """Though Bernstein's, which knows nothing of shares, could not."""
    meter = RiskMeter(RiskBudget(max_changed=0.9), half_life=20)
    for _ in range(200):
        meter.observe("key", 1.0, 0.0, changed=True)
    assert meter.is_over_budget()


def test_only_measures_with_a_limit_are_judged() -> None:
    alarms: list[str] = []
    meter = RiskMeter(
        RiskBudget(max_changed=None, max_cosine_distance=0.1),
        half_life=FOR_EVER,
        on_alarm=lambda alarm: alarms.append(alarm.measure),
    )
    for _ in range(1000):
        meter.observe("key", 1.0, 2.0, changed=True)
    assert alarms == []
    assert (meter.is_over_budget(), meter.is_proven_safe()) == (False, True)
    for _ in range(1000):
        meter.observe("key", 0.0, 0.0, changed=False)
    assert alarms == ["cosine_distance"] * 2
    assert meter.num_alarms == 2


def test_the_key_observed_longest_ago_is_forgotten_first_and_one_can_be_forgotten_by_hand() -> None:
    meter = RiskMeter(RiskBudget(), max_keys=2)
    for key in ("a", "b", "a", "c"):
        meter.observe(key, 1.0, 0.0, changed=False)
    assert (meter.known_keys(), len(meter)) == (["a", "c"], 2)
    meter.forget("a")
    meter.forget("a")
    assert meter.known_keys() == ["c"]
    assert meter.estimate("a").num_observed == 0
    assert meter.estimate().num_observed == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"confidence": 0.5},
        {"confidence": 1.0},
        {"half_life": 0.0},
        {"half_life": -1.0},
        {"max_keys": 0},
    ],
)
def test_a_meter_that_could_not_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RiskMeter(RiskBudget(), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_changed", "max_cosine_distance", "max_l2"])
def test_a_limit_of_nothing_or_of_everything_is_none(name: str) -> None:
    for limit in (0.0, -0.1, 1.0 if name == "max_changed" else 2.0):
        with pytest.raises(ValueError, match=name):
            RiskBudget(**{name: limit})
    assert RiskBudget(**{name: 0.99}).limit(name.removeprefix("max_")) == 0.99
