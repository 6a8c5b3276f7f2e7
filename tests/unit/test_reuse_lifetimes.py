"""Lifetimes follow the evidence: about ages, for all and for each key, down, up, off and on again."""

from __future__ import annotations

import math
import random

import pytest

from kvcore.risk import RiskBudget
from server.predict.reuse.lifetimes import STOPPED, Comparison, Ladder, Lifetimes
from tests.campaigns import cases

KEY, OTHER = b"key", b"other"
ENOUGH = 145
"""Clean comparisons that prove a share below 5% at 0.999: log(0.001) / log(0.95) is 134.7, some forgotten."""


def make(start=8.0, least=1.0, most=64.0, **budget):
    changes = []
    lifetimes = Lifetimes(
        Ladder(start, min_s=least, max_s=most),
        RiskBudget(**(budget or {"max_changed": 0.05})),
        on_change=changes.append,
    )
    return lifetimes, changes


def feed(lifetimes, age, count, *, key=KEY, share=0.0, seed=1):
    draw = random.Random(seed)
    for _ in range(count):
        lifetimes.observe(key, Comparison(age, 1.0, 0.0, draw.random() < share))
        lifetimes.check_integrity()


def told(changes, key=None):
    return [(change.before_s, change.after_s) for change in changes if change.key == key]


def test_the_ladder_doubles_from_the_start_and_ends_at_the_bounds():
    ladder = Ladder(60.0, min_s=1.0, max_s=300.0)
    assert ladder.edges == (1.0, 1.875, 3.75, 7.5, 15.0, 30.0, 60.0, 120.0, 240.0, 300.0)
    assert ladder.edges[ladder.start] == 60.0
    assert [ladder.rung_of(age) for age in (0.0, 0.99, 1.0, 59.9, 60.0, 299.9, 300.0)] == [
        0,
        0,
        1,
        6,
        7,
        9,
        10,
    ]
    assert Ladder(5.0, min_s=5.0, max_s=5.0).edges == (5.0,)
    assert Ladder(math.inf, min_s=1.0, max_s=4.0).edges == (1.0, 2.0, 4.0, math.inf)
    with pytest.raises(ValueError, match="min_s"):
        Ladder(1.0, min_s=2.0, max_s=1.0)


def test_without_evidence_the_lifetime_is_the_operators():
    lifetimes, changes = make()
    assert lifetimes.lifetime() == lifetimes.lifetime(KEY) == 8.0
    feed(lifetimes, 5.0, 20)
    assert changes == []


def test_old_ages_that_are_bad_are_cut_off_and_young_ones_stay():
    lifetimes, changes = make()
    for number in range(10):
        feed(lifetimes, 1.5, ENOUGH // 10, key=b"%d" % number)
        feed(lifetimes, 6.0, 5, key=b"%d" % number, share=0.5, seed=number)
    assert lifetimes.lifetime(b"new") == 4.0
    assert told(changes) == [(8.0, 4.0)]


def test_the_same_evidence_does_not_shorten_twice():
    lifetimes, _ = make()
    for number in range(50):
        feed(lifetimes, 6.0, 10, key=b"%d" % number, share=1.0)
    assert lifetimes.lifetime() == 4.0
    assert lifetimes.lifetime(b"7") == 4.0


def test_one_bad_comparison_shortens_nothing():
    lifetimes, changes = make()
    feed(lifetimes, 6.0, 1, share=1.0)
    assert changes == []


def test_a_longer_lifetime_needs_proof_at_its_own_ages():
    lifetimes, changes = make()
    feed(lifetimes, 5.0, 5000)  # however well it goes below the lifetime
    assert lifetimes.lifetime(OTHER) == 8.0
    feed(lifetimes, 12.0, 130)
    assert lifetimes.lifetime(OTHER) == 8.0
    feed(lifetimes, 12.0, 15)
    assert lifetimes.lifetime(OTHER) == 16.0
    assert told(changes) == [(8.0, 16.0)]


def test_a_rung_that_is_not_proved_blocks_those_above():
    lifetimes, _ = make()
    feed(lifetimes, 12.0, 20)
    feed(lifetimes, 24.0, 1000)
    assert lifetimes.lifetime(OTHER) == 8.0


def test_rungs_in_which_nobody_asks_are_passed_over():
    lifetimes, _ = make()
    feed(lifetimes, 40.0, ENOUGH)
    assert lifetimes.lifetime(OTHER) == 64.0


def test_ages_beyond_the_longest_lifetime_say_nothing():
    lifetimes, _ = make(most=8.0)
    feed(lifetimes, 9.0, 500, share=1.0)
    assert lifetimes.lifetime(KEY) == 8.0
    assert lifetimes.lifetime() == 8.0


def test_at_the_limit_reuse_stops_and_begins_again_when_it_is_proved_safe():
    lifetimes, changes = make()
    for number in range(4):
        feed(lifetimes, 0.5, 10, key=b"%d" % number, share=1.0)
    assert lifetimes.lifetime(b"0") == lifetimes.lifetime(OTHER) == STOPPED
    assert lifetimes.num_stopped_keys == 4
    for number in range(4):
        feed(lifetimes, 0.5, 300, key=b"%d" % number)
        assert lifetimes.lifetime(b"%d" % number) == 1.0
    assert lifetimes.lifetime(OTHER) == 1.0
    assert lifetimes.num_stopped_keys == 0
    assert told(changes) == [(8.0, STOPPED), (STOPPED, 1.0)]
    assert told(changes, b"0") == [(8.0, STOPPED), (STOPPED, 1.0)]


def test_one_bad_key_is_stopped_and_the_others_go_on():
    lifetimes, changes = make()
    for number in range(40):
        feed(lifetimes, 0.5, 40, key=b"%d" % number, share=1.0 if number == 7 else 0.0)
    assert lifetimes.lifetime(b"7") == STOPPED
    assert lifetimes.lifetime(b"8") == 8.0
    assert told(changes, b"7") == [(8.0, STOPPED)]
    assert told(changes) == []


def test_a_key_that_is_proved_good_lives_longer_than_the_others():
    lifetimes, changes = make()
    feed(lifetimes, 12.0, ENOUGH, key=KEY)
    assert lifetimes.lifetime(KEY) == 16.0
    for number in range(5):
        feed(lifetimes, 6.0, 10, key=b"%d" % number, share=1.0)
    assert lifetimes.lifetime(OTHER) == 4.0
    assert lifetimes.lifetime(KEY) == 16.0
    assert told(changes, KEY) == [(8.0, 16.0)]


def test_a_shortened_key_comes_back_only_by_proof_of_its_own():
    lifetimes, _ = make()
    feed(lifetimes, 6.0, 10, share=1.0)
    assert lifetimes.lifetime(KEY) == 4.0
    for number in range(20):
        feed(lifetimes, 6.0, 50, key=b"%d" % number)
    assert lifetimes.lifetime(OTHER) == 8.0
    assert lifetimes.lifetime(KEY) == 4.0
    feed(lifetimes, 6.0, 300)
    assert lifetimes.lifetime(KEY) == 8.0


def test_divergence_alone_shortens_too():
    lifetimes, _ = make(max_changed=None, max_l2=0.1)
    for _ in range(400):
        lifetimes.observe(KEY, Comparison(6.0, 0.9, 0.5, changed=False))
    assert lifetimes.lifetime(KEY) == 4.0


def test_without_a_limit_nothing_adapts():
    lifetimes, changes = make(max_changed=None)
    feed(lifetimes, 6.0, 500, share=1.0)
    feed(lifetimes, 12.0, 500)
    assert changes == []


@pytest.mark.parametrize("share", [0.005, 0.025])
def test_risk_below_the_budget_shortens_next_to_never(share):
    """Half the budget, and a tenth: over many seeds of 1,000 comparisons of all ages."""
    shortened = 0
    num_seeds = cases(12, full=60)
    for seed in range(num_seeds):
        lifetimes, changes = make()
        draw = random.Random(seed)
        for number in range(1000):
            age = 8.0 * draw.random()
            lifetimes.observe(b"%d" % number, Comparison(age, 1.0, 0.0, draw.random() < share))
        shortened += any(change.after_s < change.before_s for change in changes)
    assert shortened <= num_seeds // 60


@pytest.mark.parametrize(("start", "settled"), [(1.0, (2.0, 4.0)), (8.0, (8.0,)), (64.0, (4.0, 8.0))])
def test_lifetimes_settle_where_the_risk_crosses_the_budget(start, settled):
    """Risk grows with age, 1% a second: 5% at 5 s. From below, the lifetime grows as far as can be proved;
    from above, it shrinks until nothing is proved against it; either way the mean stays within the budget.
    """
    lifetimes, _ = make(start=start)
    draw = random.Random(start)
    late, risks = [], []
    for number in range(12_000):
        age = draw.expovariate(1 / 6.0)
        if number > 8_000:
            late.append(lifetimes.lifetime(OTHER))
            risks += [0.01 * age] * (age < late[-1])
        lifetimes.observe(b"%d" % number, Comparison(age, 1.0, 0.0, draw.random() < 0.01 * age))
    assert sorted(late)[len(late) // 2] in settled
    assert sum(risks) / len(risks) < 0.05
