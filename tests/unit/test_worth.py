"""Fetch or recompute: learned from what was measured, decided where the two lines cross."""

from __future__ import annotations

import math
import random

import pytest

from kvcore.tiers.worth import DecisionReason, Worth

LINEAR_S, ATTENTION_S = 1e-3, 2e-7
BYTES_PER_TOKEN = 20_000


def recompute_s(num_tokens, start=0):
    return LINEAR_S * num_tokens + ATTENTION_S * num_tokens * (start + num_tokens / 2)


@pytest.fixture
def worth():
    """A disk of 5 ms and 1 GB/s, and a model of a millisecond a token."""
    worth = Worth()
    worth.start_tier("disk", latency_s=0.005, read_bytes_per_s=1e9, write_bytes_per_s=5e8)
    for start in (0, 512, 2048):
        for num_tokens in (16, 256, 512):
            for _ in range(5):
                worth.observe_recompute(num_tokens, start, recompute_s(num_tokens, start))
    return worth


def decide(worth, num_tokens, *, start=0, wait=0.0, tier="disk"):
    return worth.decide(
        tier,
        num_bytes=num_tokens * BYTES_PER_TOKEN,
        num_tokens=num_tokens,
        start_position=start,
        queue_wait_s=wait,
    )


def test_recompute_cost_is_learned_with_its_growth_over_positions(worth):
    for num_tokens, start in ((64, 0), (1024, 0), (128, 8000)):
        assert worth.recompute_s(num_tokens, start) == pytest.approx(recompute_s(num_tokens, start), rel=0.02)


def test_noise_does_not_turn_a_cost_negative():
    worth = Worth()
    draw = random.Random(5)
    for _ in range(300):
        num_tokens, start = draw.choice([16, 64, 256]), draw.choice([0, 100, 4000])
        worth.observe_recompute(num_tokens, start, recompute_s(num_tokens, start) * draw.uniform(0.5, 1.5))
    for start in (0, 100, 4000, 30_000):
        assert worth.recompute_s(64, start) > 0
    assert worth.recompute_s(256, 4000) == pytest.approx(recompute_s(256, 4000), rel=0.5)


def test_latency_and_bandwidth_are_learned_from_fetches_of_different_sizes():
    worth = Worth()
    draw = random.Random(1)
    for _ in range(60):
        num_bytes = draw.choice([1 << 16, 1 << 20, 1 << 23])
        worth.observe_fetch("redis", num_bytes, 0.002 + num_bytes / 2e8)
    speed = worth.speed("redis")
    assert speed.latency_s == pytest.approx(0.002, rel=0.1)
    assert speed.read_bytes_per_s == pytest.approx(2e8, rel=0.05)


def test_a_tier_that_becomes_slow_is_noticed_within_a_few_fetches(worth):
    assert decide(worth, 512).fetch
    for _ in range(12):
        worth.observe_fetch("disk", 512 * BYTES_PER_TOKEN, 5.0)
    assert not decide(worth, 512).fetch
    for _ in range(20):
        worth.observe_fetch("disk", 512 * BYTES_PER_TOKEN, 0.015)
    assert decide(worth, 512).fetch


def test_one_hiccup_changes_no_decision(worth):
    worth.observe_fetch("disk", 512 * BYTES_PER_TOKEN, 10.0)
    assert decide(worth, 512).fetch


def test_what_was_never_measured_is_fetched_and_says_so(worth):
    decision = decide(worth, 16, tier="redis")
    assert (decision.fetch, decision.reason, decision.fetch_s) == (True, DecisionReason.UNMEASURED, None)
    assert (
        Worth().decide("disk", num_bytes=1, num_tokens=1, start_position=0).reason
        is DecisionReason.UNMEASURED
    )


def test_the_decision_turns_where_the_crossover_is(worth):
    crossover = worth.crossover_tokens("disk", bytes_per_token=BYTES_PER_TOKEN)
    # 5 ms against 1 ms less 20 us a token.
    assert crossover == pytest.approx(0.005 / (LINEAR_S - BYTES_PER_TOKEN / 1e9), rel=0.05)
    below, above = decide(worth, math.floor(crossover)), decide(worth, math.ceil(crossover))
    assert (below.fetch, below.reason) == (False, DecisionReason.RECOMPUTE_FASTER)
    assert (above.fetch, above.reason) == (True, DecisionReason.FETCH_FASTER)
    assert above.fetch_s < above.recompute_s


def test_a_slow_tier_wins_only_far_into_a_long_prompt(worth):
    worth.start_tier("slow", latency_s=0.01, read_bytes_per_s=BYTES_PER_TOKEN / (1.2 * LINEAR_S))
    crossover = worth.crossover_tokens("slow", bytes_per_token=BYTES_PER_TOKEN)
    assert 1000 < crossover < 4000  # attention has to make up for the rest
    assert not decide(worth, int(crossover) - 50, tier="slow").fetch
    assert decide(worth, int(crossover) + 50, tier="slow").fetch
    late = worth.crossover_tokens("slow", bytes_per_token=BYTES_PER_TOKEN, start_position=10_000)
    assert late < 20


def test_a_tier_that_never_wins_has_no_crossover_without_attention_cost():
    worth = Worth()
    worth.start_tier("slow", latency_s=0.01, read_bytes_per_s=1e6)
    for num_tokens in (16, 64, 256):
        worth.observe_recompute(num_tokens, 0, LINEAR_S * num_tokens)
    assert worth.crossover_tokens("slow", bytes_per_token=BYTES_PER_TOKEN) > 100_000
    assert worth.crossover_tokens("none", bytes_per_token=BYTES_PER_TOKEN) is None


def test_a_fetch_that_hides_behind_the_queue_is_free(worth):
    assert not decide(worth, 2).fetch
    hidden = decide(worth, 2, wait=0.05)
    assert (hidden.fetch, hidden.reason) == (True, DecisionReason.HIDDEN)
    assert decide(worth, 4, wait=0.004).reason is DecisionReason.FETCH_FASTER


def is_worth_storing(worth, *, reuses=1.0, tier="disk", num_bytes=16 * BYTES_PER_TOKEN):
    return worth.is_worth_storing(
        tier, num_bytes=num_bytes, num_tokens=16, start_position=0, expected_reuses=reuses
    )


def test_a_block_goes_down_if_its_reuses_pay_for_the_write(worth):
    assert is_worth_storing(worth)
    assert not is_worth_storing(worth, reuses=0.001)
    assert not is_worth_storing(worth, reuses=0.0)


def test_a_block_that_can_never_win_a_fetch_does_not_go_down_however_often_it_is_wanted(worth):
    assert not is_worth_storing(worth, reuses=1e9, num_bytes=1 << 30)


def test_everything_goes_down_while_nothing_is_known():
    assert is_worth_storing(Worth())


def test_copying_into_the_device_counts():
    worth = Worth(device_bytes_per_s=1e8)
    worth.start_tier("host", latency_s=0.0, read_bytes_per_s=1e12)
    assert worth.fetch_s("host", 10**8) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_cannot_be_a_measurement_is_left_out(worth, seconds):
    before = worth.recompute_s(100), worth.fetch_s("disk", 1 << 20)
    worth.observe_recompute(16, 0, seconds)
    worth.observe_fetch("disk", 1 << 20, seconds)
    worth.observe_recompute(0, 0, 1.0)
    worth.observe_fetch("disk", 0, 1.0)
    assert (worth.recompute_s(100), worth.fetch_s("disk", 1 << 20)) == before
