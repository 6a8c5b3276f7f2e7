"""Sessions that come back: who is fetched ahead, and what becomes of a fetch nobody uses."""

from __future__ import annotations

import random

import pytest

from kvcore.prefetch import PrefetchOutcome, SessionPredictor, WaitTimes
from kvcore.prefetch_replay import Session, Setting, Turn, replay
from tests.campaigns import cases


def run(predictor, session, waits, *, at=0.0):
    """Let a session end and return with the given waits; return the time of its last end."""
    for wait in waits:
        predictor.ended(session, at)
        at += wait
        predictor.returned(session, at)
        at += 1.0
    predictor.ended(session, at)
    return at


@pytest.fixture
def predictor():
    """One that has seen everybody return after ten seconds."""
    predictor = SessionPredictor(window_s=60.0)
    for number in range(30):
        run(predictor, number, [10.0] * 3)
        predictor.forget(number)
    run(predictor, "regular", [10.0] * 60)
    return predictor


def due(predictor, now, *, room=1000, missing=lambda session: 10):
    return predictor.due(now, room, missing)


def test_nothing_is_due_before_anything_is_known():
    predictor = SessionPredictor()
    predictor.ended("new", 0.0)
    assert due(predictor, 1.0) == []


def test_a_session_that_always_returns_soon_is_due(predictor):
    now = 71.0 * 60
    predictor.ended("regular", now)
    assert due(predictor, now) == [("regular", 10)]
    assert predictor.return_probability("regular", now) > 0.9


def test_a_new_session_is_judged_by_everybodys_waits(predictor):
    predictor.ended("new", 5000.0)
    assert ("new", 10) in due(predictor, 5000.0)


def test_a_session_that_stays_longer_than_it_ever_did_becomes_doubtful(predictor):
    now = 5000.0
    predictor.ended("regular", now)
    assert predictor.return_probability("regular", now) > predictor.return_probability("regular", now + 300)
    due(predictor, now, room=0)
    assert due(predictor, now + 300) == []


def test_its_own_history_outweighs_everybodys(predictor):
    now = run(predictor, "slow", [2000.0] * 20, at=10_000.0)
    assert predictor.return_probability("slow", now) < 0.5
    assert ("slow", 10) not in due(predictor, now)
    assert predictor.return_probability("slow", now + 1980) > 2 * predictor.return_probability(
        "slow", now + 100
    )


def test_room_and_missing_blocks_limit_what_is_chosen(predictor):
    for name in ("a", "b", "c"):
        predictor.ended(name, 5000.0)
    sizes = {"a": 0, "b": 900, "c": 50, "regular": 0}
    assert due(predictor, 5000.0, room=100, missing=sizes.__getitem__) == [("c", 50)]


def test_a_session_with_a_running_request_is_not_fetched(predictor):
    predictor.ended("regular", 5000.0)
    predictor.returned("regular", 5001.0)
    assert due(predictor, 5001.0) == []


def fetch(predictor, session, at):
    predictor.ended(session, at)
    assert session in dict(due(predictor, at))
    return predictor.started(session, at, 10)


def test_a_fetch_is_in_time_late_or_wasted_and_the_counters_add_up(predictor):
    assert fetch(predictor, "a", 5000.0) == 5060.0
    predictor.arrived("a")
    assert predictor.returned("a", 5010.0) is PrefetchOutcome.IN_TIME
    assert predictor.returned("a", 5011.0) is None
    fetch(predictor, "b", 5020.0)
    assert predictor.returned("b", 5021.0) is PrefetchOutcome.LATE
    fetch(predictor, "c", 5030.0)
    predictor.lost("c")
    fetch(predictor, "d", 5040.0)
    assert predictor.expire(5099.0) == []
    assert predictor.expire(5100.0) == ["d"]
    counters = predictor.counters
    assert (counters.fetched, counters.in_time, counters.late, counters.wasted) == (4, 1, 1, 2)
    assert (counters.fetched_blocks, counters.wasted_blocks, counters.waste) == (40, 20, 0.5)


def test_a_session_being_fetched_is_not_due_again(predictor):
    fetch(predictor, "a", 5000.0)
    assert "a" not in dict(due(predictor, 5005.0))


def test_waste_that_was_not_expected_makes_it_careful(predictor):
    for count in range(200):
        at = 10_000.0 + 100.0 * count
        predictor.ended(count, at)
        if count not in dict(due(predictor, at)):
            break
        predictor.started(count, at, 10)
        predictor.expire(at + 61.0)
    else:
        pytest.fail("it never stopped")
    assert predictor.counters.wasted < 30


def test_waste_stays_below_its_bound_whatever_the_waits_are():
    for seed in range(cases(2, full=5)):
        draw = random.Random(seed)
        predictor = SessionPredictor(window_s=100.0, max_waste=0.2)
        now = 0.0
        returns = {}
        for step in range(20_000):
            now += 1.0
            for session in [s for s, at in returns.items() if at <= now]:
                del returns[session]
                predictor.arrived(session)
                predictor.returned(session, now)
            predictor.expire(now)
            if step % 5 == 0:
                session = draw.randrange(50)
                if session not in returns:
                    predictor.returned(session, now)
                    predictor.ended(session, now)
                    wait = draw.lognormvariate(3.0, 1.0) if draw.random() < 0.96 else 1e9
                    if wait < 1e9:
                        returns[session] = now + wait
            for session, blocks in due(predictor, now):
                predictor.started(session, now, blocks)
        assert predictor.counters.fetched > 100
        assert predictor.counters.waste <= 0.2


def test_tables_are_bounded_whoever_comes():
    predictor = SessionPredictor(max_sessions=100)
    for number in range(5000):
        predictor.ended(number, float(number))
    assert len(predictor) == 100
    assert len(predictor._agenda) <= 10_000
    due(predictor, 10_000.0)
    assert len(predictor._agenda) <= 100


def test_a_session_that_never_returned_is_given_up_and_remembered_as_such(predictor):
    predictor.ended("gone", 5000.0)
    due(predictor, 5000.0, room=0)
    due(predictor, 10_000.0)
    assert len(predictor) == 0
    # It counts among those that outlasted ten minutes, and not among those that ended.
    late = int(WaitTimes.position(600.0))
    population = predictor._populations[0]  # of those that never came back
    assert population.reached[late] > 0.9
    assert population.ended[late] == 0.0


def test_sessions_still_away_count_before_they_are_given_up():
    predictor = SessionPredictor(window_s=60.0)
    run(predictor, "regular", [10.0] * 60)
    before = predictor.return_probability("regular", 660.0)
    for number in range(10):
        predictor.ended(number, 1000.0)
    for away_s in range(600):
        due(predictor, 1000.0 + away_s, room=0)
    assert predictor.return_probability("regular", 660.0) < before


def test_classes_widen_with_the_wait():
    positions = [WaitTimes.position(wait) for wait in (0.0, 0.25, 0.5, 1.0, 64.0, 1e9)]
    assert positions[:5] == [0.0, 0.0, 2.0, 4.0, 16.0]
    assert 31.0 < positions[5] < WaitTimes.NUM_CLASSES


def regular_sessions():
    turns = tuple(Turn(200.0 * n, 200.0 * n + 2.0, tuple(range(50 + n))) for n in range(40))
    return [Session(f"s{n}", turns) for n in range(4)]


def sessions_of(waits_of, *, num_sessions=6):
    """Sessions of growing prefixes with the given waits between requests of two seconds."""
    sessions = []
    for number in range(num_sessions):
        turns, at = [], 0.0
        for count, wait in enumerate(waits_of(number)):
            turns.append(Turn(at, at + 2.0, tuple(range(50 + count))))
            at += 2.0 + wait
        sessions.append(Session(f"s{number}", tuple(turns)))
    return sessions


SMALL = Setting(copies=2, spread_s=600.0, burst_every_s=120.0, restore_s_per_block=0.01, device_share=3.0)


def test_a_replay_of_regular_sessions_brings_them_back_in_time():
    sessions = sessions_of(lambda number: [100.0 + number] * 40)
    figures = [replay(sessions, SMALL, seed=seed) for seed in range(2)]
    assert sum(each.in_time for each in figures) > 30
    for each in figures:
        assert each.restore_s_with < each.restore_s_without
        assert each.wasted <= 0.2 * each.fetched + 1.0
    assert figures[0] == replay(sessions, SMALL, seed=0)


def test_a_replay_of_sessions_that_seldom_return_soon_fetches_next_to_nothing():
    draw = random.Random(5)
    sessions = sessions_of(lambda number: [min(60.0 * draw.paretovariate(0.25), 10_000.0) for _ in range(6)])
    for seed in range(3):
        figures = replay(sessions, SMALL, seed=seed)
        assert figures.restore_s_without > 0.0
        assert figures.fetched <= 3


def test_waste_is_paid_from_a_credit_and_never_goes_beyond_it(predictor):
    at = 10_000.0
    for number in range(500):
        name = f"n{number}"
        at += 100.0
        predictor.returned("regular", at)
        predictor.ended("regular", at)
        predictor.ended(name, at)
        for session, blocks in due(predictor, at):
            predictor.started(session, at, blocks)
            predictor.arrived(session)
        predictor.returned("regular", at + 10.0)  # one is used, the other never
        predictor.expire(at + 61.0)
        counters = predictor.counters
        finished = counters.in_time + counters.late + counters.wasted
        assert counters.wasted <= 0.2 * finished + 2.0 + 0.1 * (at + 61.0) / 3600.0
    assert predictor.counters.fetched > 0
    assert predictor.counters.wasted > 0
