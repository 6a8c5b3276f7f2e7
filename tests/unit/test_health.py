"""Back-off of a failing tier: left alone, tried once, left alone for longer."""

from __future__ import annotations

import logging

import pytest

from kvcore.clock import ManualClock
from kvcore.tiers.health import Health, HealthState
from kvcore.tiers.outages import OutageLog


@pytest.fixture
def clock():
    return ManualClock()


def make(clock, **options):
    return Health(clock, **{"first_backoff_s": 1.0, "max_backoff_s": 8.0, "jitter": 0.0, **options})


def test_one_failure_closes_the_way_until_the_backoff_is_over(clock):
    health = make(clock)
    assert health.may_try()
    health.failed("gone")
    assert (health.state, health.is_available, health.last_fault) == (HealthState.OPEN, False, "gone")
    assert not health.may_try()
    assert health.retry_in_s() == 1.0
    clock.advance(1.0)
    assert health.may_try()
    assert not health.may_try()  # one try at a time
    assert not health.is_available
    health.succeeded()
    assert health.is_available
    assert health.retry_in_s() is None


def test_every_failed_retry_doubles_the_backoff_up_to_its_limit(clock):
    health = make(clock)
    health.failed("gone")
    waits = []
    for _ in range(5):
        waits.append(health.retry_in_s())
        clock.advance(waits[-1])
        assert health.may_try()
        health.failed("gone")
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert (health.times_opened, health.retries, health.failures) == (1, 5, 6)
    clock.advance(8.0)
    assert health.may_try()
    health.succeeded()
    health.failed("again")
    assert health.retry_in_s() == 1.0


def test_stragglers_change_nothing_while_it_is_left_alone(clock):
    health = make(clock)
    health.failed("gone")
    clock.advance(0.5)
    health.succeeded()
    assert not health.is_available
    health.failed("gone")
    assert health.retry_in_s() == 0.5


def test_only_failures_in_a_row_count_where_several_are_needed(clock):
    health = make(clock, failures_to_open=3)
    for _ in range(5):
        health.failed("slow")
        health.failed("slow")
        health.succeeded()
    assert health.is_available
    for _ in range(3):
        health.failed("slow")
    assert not health.is_available


def test_jitter_spreads_retries_and_is_the_same_for_the_same_seed(clock):
    waits = []
    for seed in (1, 2, 1):
        health = make(clock, jitter=0.2, seed=seed)
        health.failed("gone")
        waits.append(health.retry_in_s())
    assert waits[0] == waits[2] != waits[1]
    assert all(0.8 <= wait <= 1.2 for wait in waits)


def test_settings_that_make_no_sense_are_refused(clock):
    for options in (
        {"failures_to_open": 0},
        {"first_backoff_s": 0.0},
        {"max_backoff_s": 0.5},
        {"jitter": 1.0},
    ):
        with pytest.raises(ValueError, match="failures_to_open >= 1"):
            make(clock, **options)


def outage_lines(caplog):
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_an_outage_is_logged_once_and_its_end_once(clock, caplog):
    caplog.set_level(logging.INFO)
    outages, blocks, tails = OutageLog("redis"), make(clock), make(clock)
    outages.watch(blocks)
    outages.watch(tails)
    for _ in range(3):
        blocks.failed("unreachable")
        tails.failed("unreachable")
    clock.advance(1.0)
    assert blocks.may_try()
    blocks.failed("unreachable")  # a retry in vain is the same outage
    assert outage_lines(caplog) == [("WARNING", "tier redis is left alone for a while: unreachable")]
    clock.advance(2.0)
    for health in (blocks, tails):
        assert health.may_try()
        health.succeeded()
        health.succeeded()
    assert outage_lines(caplog)[1:] == [("INFO", "tier redis is back")]


def test_reading_goes_on_while_writing_is_left_alone(clock, caplog):
    caplog.set_level(logging.INFO)
    outages, reading, writing = OutageLog("disk"), make(clock), make(clock)
    outages.watch(reading, "reading")
    outages.watch(writing, "writing")
    writing.failed("no space left")
    reading.failed("read error")
    clock.advance(1.0)
    assert writing.may_try()
    writing.succeeded()
    assert outage_lines(caplog) == [
        ("WARNING", "tier disk is left alone for a while (writing): no space left"),
        ("WARNING", "tier disk is left alone for a while (reading): read error"),
        ("INFO", "tier disk is back (writing)"),
    ]
