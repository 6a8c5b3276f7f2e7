"""Whether a batch waits for one more call: the rule as its text has it, against gaps that are known."""

from __future__ import annotations

import random

import pytest

from server.predict.cost import CostModel
from server.predict.holding import CLEAR_SHARE, MARGIN, MIN_GAPS, NUM_GAPS, RESOLUTION_S, Arrivals

A_S, B_S, TOKENS = 0.010, 1e-5, 20


def model(a_s: float = A_S, b_s: float = B_S) -> CostModel:
    cost = CostModel()
    cost.a_s, cost.b_s = a_s, b_s
    return cost


def arrived(*gaps: float, tokens: int = TOKENS) -> tuple[Arrivals, float]:
    """Return calls so far apart, and when the last one came."""
    arrivals, now_s = Arrivals(), 100.0
    arrivals.note(now_s, tokens)
    for gap_s in gaps:
        now_s += gap_s
        arrivals.note(now_s, tokens)
    return arrivals, now_s


def best_by_trial(gaps: list[float], gone_s: float, num_calls: int) -> float:
    """Try every limit: what all calls gain and lose, over the gaps that are still possible."""
    left = [gap_s - gone_s for gap_s in gaps if gap_s - gone_s > RESOLUTION_S]
    best_s, best_gain_s = 0.0, 0.0
    for limit_s in sorted(left):
        gain_s = 0.0
        for gap_s in left:
            if gap_s <= limit_s:
                gain_s += (A_S - gap_s) - num_calls * (gap_s + B_S * TOKENS)
            else:
                gain_s -= num_calls * limit_s
        if gain_s > best_gain_s:
            best_s, best_gain_s = limit_s, gain_s
    return MARGIN * best_s if best_gain_s > CLEAR_SHARE * A_S * len(left) else 0.0


@pytest.mark.parametrize("num_calls", [1, 2, 5])
@pytest.mark.parametrize("gone_s", [0.0, 0.0004, 0.002])
def test_the_limit_is_the_best_of_all_that_could_be_tried(num_calls: int, gone_s: float) -> None:
    draw = random.Random(num_calls)
    held = 0
    for _ in range(300):
        scale = draw.choice([0.0005, 0.001, 0.004, 0.008])
        gaps = [scale * draw.choice([0.1, 0.5, 1.0, 3.0]) * (1 + draw.random()) for _ in range(NUM_GAPS)]
        if sum(gaps) / NUM_GAPS >= A_S + B_S * TOKENS:
            continue
        arrivals, now_s = arrived(*gaps)
        found = arrivals.hold_s(now_s + gone_s, num_calls=num_calls, cost=model())
        assert found == pytest.approx(best_by_trial(gaps, gone_s, num_calls), rel=1e-6)
        held += found > 0
    assert held > 0 or num_calls == 5


def test_calls_that_come_regularly_are_awaited_a_little_longer_than_their_gap() -> None:
    arrivals, now_s = arrived(*[0.001] * NUM_GAPS)
    assert arrivals.hold_s(now_s, num_calls=1, cost=model()) == pytest.approx(MARGIN * 0.001)


def test_nothing_is_held_while_computing_call_by_call_keeps_up() -> None:
    alone_s = A_S + B_S * TOKENS
    for gap_s, is_held in ((0.2 * alone_s, True), (1.01 * alone_s, False)):
        arrivals, now_s = arrived(*[gap_s] * NUM_GAPS)
        assert (arrivals.hold_s(now_s, num_calls=1, cost=model()) > 0) is is_held


def test_few_gaps_and_an_unknown_cost_tell_nothing() -> None:
    for num_gaps, is_held in ((MIN_GAPS - 1, False), (MIN_GAPS, True)):
        arrivals, now_s = arrived(*[0.001] * num_gaps)
        assert (arrivals.hold_s(now_s, num_calls=1, cost=model()) > 0) is is_held
        assert arrivals.hold_s(now_s, num_calls=1, cost=CostModel()) == 0.0
    assert Arrivals().hold_s(0.0, num_calls=1, cost=model()) == 0.0


def test_only_the_latest_gaps_count_and_are_kept() -> None:
    """Calls that were rare for long and come quickly now are awaited, and the other way round."""
    quick, now_s = arrived(*[1.0] * 1000, *[0.001] * NUM_GAPS)
    assert quick.hold_s(now_s, num_calls=1, cost=model()) == pytest.approx(MARGIN * 0.001)
    rare, now_s = arrived(*[0.001] * 1000, *[1.0] * NUM_GAPS)
    assert rare.hold_s(now_s, num_calls=1, cost=model()) == 0.0
    assert len(quick._gaps) == NUM_GAPS


def test_the_size_of_a_call_is_a_mean_that_follows() -> None:
    arrivals, now_s = arrived(0.001, tokens=100)
    assert arrivals.mean_tokens == 100
    arrivals.note(now_s + 0.001, 200)
    assert arrivals.mean_tokens == pytest.approx(110)
    for _ in range(100):
        arrivals.note(now_s, 200)
    assert arrivals.mean_tokens == pytest.approx(200, rel=0.01)
