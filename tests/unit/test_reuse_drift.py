"""Planted drift: the alarm fires, reuse shrinks or stops, and comes back. Without drift: silence."""

from __future__ import annotations

import logging

import numpy as np

from server.predict.options import BudgetSpec
from tests.campaigns import cases
from tests.unit.reuse_world import TurningWorld

BUDGET = BudgetSpec(max_changed=0.05)
SPEC = {
    "budget": BUDGET,
    "lifetime_s": 8.0,
    "min_lifetime_s": 1.0,
    "max_lifetime_s": 64.0,
    "sample_share": 0.25,
}


def alarms(world):
    return [event for event in world.events if event.kind.value == "alarm" and not event.key]


def test_without_drift_there_is_no_alarm_and_lifetimes_only_grow():
    for seed in range(cases(3, full=10)):
        world = TurningWorld(**SPEC, seed=seed)
        wrong = world.visit(seed, 300, noise=0.001)
        assert wrong[:, 0].sum() == 0
        assert "alarm" not in {event.kind.value for event in world.events}
        assert world.report().lifetime_s >= 8.0
        assert not world.report().risk.over_budget


def test_drift_of_the_features_behind_the_key_fires_the_alarm(caplog):
    world = TurningWorld(**SPEC)
    world.visit(1, 200, noise=0.001)
    assert alarms(world) == []
    with caplog.at_level(logging.WARNING, logger="kvserve.predict.reuse"):
        world.visit(2, 200, noise=0.2)
    (alarm, *_) = alarms(world)
    assert alarm.measure == "changed"
    assert alarm.interval.lower > alarm.limit == 0.05
    assert (alarm.model, alarm.version, alarm.policy) == ("risk", "1", "main")
    assert "reuse alarm: risk/1 main: changed" in caplog.text
    assert world.report().num_alarms >= 1


def test_drift_of_the_relation_shortens_lifetimes_until_the_budget_holds():
    """The encoder itself turns, by 0.05 a second: after 2 s the steepest predictions are off by 0.05."""
    careless = TurningWorld(speed=0.05, **SPEC | {"budget": BudgetSpec(max_changed=None)})
    wrong, reused = careless.visit(1, 1000).sum(axis=0)
    assert wrong / reused > 0.3
    assert careless.events == []
    world = TurningWorld(speed=0.05, **SPEC)
    wrong, reused = world.visit(1, 1500).sum(axis=0)
    assert wrong / reused < 0.05
    assert reused > 0.7 * 1500 * 20  # and most are still reused
    assert "lifetime" in world.kinds()
    assert 1.0 <= world.report().lifetime_s < 8.0


def test_drift_that_is_too_fast_stops_reuse_and_its_end_starts_it_again():
    world = TurningWorld(speed=2.0, **SPEC)
    world.visit(1, 300)
    assert "stopped" in world.kinds()
    report = world.report()
    assert report.num_stopped > 0
    tail = world.visit(2, 50)
    assert tail[:, 1].sum() == 0
    world.encoder.speed = 0.0
    world.model.clear_reuse()
    quiet = world.visit(3, 400)
    assert {"resumed"} <= set(world.kinds(of_keys=True)) & set(world.kinds())
    assert quiet[-100:, 1].sum() > 0.8 * 100 * 20
    assert quiet[:, 0].sum() == 0


def test_one_key_that_drifts_is_stopped_alone():
    world = TurningWorld(**SPEC)
    draw = np.random.default_rng(5)
    angles = np.linspace(0.0, 6.0, 40)
    hits = []
    for _ in range(500):
        world.clock.advance(0.1)
        rows = np.stack([angles, np.zeros(40)], axis=1)
        rows[11, 1] = draw.uniform(-3, 3)
        hits.append(world.ask(rows)[1])
    late = np.array(hits[-100:])
    assert late[:, 11].sum() == 0
    assert np.delete(late, 11, axis=1).mean() > 0.9
    assert "stopped" not in world.kinds()
    assert "stopped" in world.kinds(of_keys=True)
    report = world.report(max_keys=40)
    assert report.num_stopped_keys == 1
    assert [key.stopped for key in report.keys].count(True) == 1
    stopped = next(key for key in report.keys if key.stopped)
    assert stopped.risk.changed.lower > 0.05
    assert {event.key for event in world.events if event.kind.value == "stopped"} == {stopped.key}


def test_the_false_alarm_rate_at_half_the_budget_is_small():
    """Worlds of some 1,500 comparisons at a true share of 2.5%: nothing is wrong, nothing may be told."""
    told, changed, reused = 0, 0, 0
    num_worlds = cases(8, full=40)
    for seed in range(num_worlds):
        world = TurningWorld(**SPEC, seed=seed)
        draw = np.random.default_rng(seed)
        angles = np.linspace(0.0, 6.0, 300) + 0.01
        world.ask(np.stack([angles, np.zeros(300)], axis=1))
        for _ in range(20):
            world.clock.advance(0.1)
            off = np.where(draw.random(300) < 0.025, 3.0, 0.0)
            rows = np.stack([angles, off], axis=1).astype(np.float32)
            got, hits = world.ask(rows)
            fresh = world.fresh(rows)
            changed += ((abs(got - fresh) > 0.05) & np.array(hits)).sum()
            reused += sum(hits)
        told += len(alarms(world)) > 0
    assert 0.01 < changed / reused < 0.04
    assert told <= num_worlds // 40


def test_a_listener_may_ask_for_a_report():
    world = TurningWorld(speed=2.0, **SPEC)
    seen = []
    world.listener = lambda event: seen.append(world.model.reuse_report(max_keys=1))
    world.visit(1, 50)
    assert seen
