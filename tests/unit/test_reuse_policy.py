"""One reuse policy by itself: what it tells, what it reports, and what it forgets."""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.clock import ManualClock
from kvcore.risk import RiskBudget
from server.predict.messages import EventKind, ReuseEvent
from server.predict.options import BudgetSpec, CanarySpec
from server.predict.reuse import lifetimes as lifetimes_module
from server.predict.reuse.keys import KeyNames, KeyRule
from server.predict.reuse.lifetimes import Comparison, Ladder, Lifetimes
from server.predict.reuse.policy import Lookup, Outcome, PolicySettings, ReusePolicy
from server.predict.reuse.predictor import Predictor
from server.predict.reuse.store import EncodingStore, Entry
from tests.unit.reuse_world import Half, Turning, World, rows_of

BAD, GOOD = b"bad", b"good"
ENOUGH = 400
ROW = np.zeros(4, np.float32)


class Kit:
    """A policy, the names of its keys, and what it told."""

    def __init__(self, *, start_s: float = 8.0, least_s: float = 1.0, most_s: float = 64.0) -> None:
        self.events: list[ReuseEvent] = []
        self.names = KeyNames()
        settings = PolicySettings(
            name="main",
            traffic_share=0.75,
            rule=KeyRule(3, 0.25),
            ladder=Ladder(start_s, min_s=least_s, max_s=most_s),
            min_lifetime_s=least_s,
            max_lifetime_s=most_s,
            budget=RiskBudget(max_changed=0.05, max_cosine_distance=0.5, max_l2=1.5),
            sample_share=1.0,
            max_error=0.125,
            max_entries=10,
            max_bytes=10_000,
            seed=0,
        )
        self.policy = ReusePolicy(
            settings, bytes_per_entry=100, names=self.names, on_event=self.events.append
        )

    def learn(self, key: bytes, *, age_s: float, changed: bool, count: int = ENOUGH) -> None:
        for _ in range(count):
            lookup = Lookup(Outcome.HIT, None, age_s)
            self.policy.count(lookup)
            self.policy.learn(key, lookup, Comparison(age_s, 1.0, 0.0, changed))
            self.policy.check_integrity()

    def keep(self, key: bytes, now: float) -> None:
        self.policy.keep(key, ROW, ROW, None, now)

    def told(self, kind: EventKind, key: bytes | None = None) -> list[ReuseEvent]:
        name = "" if key is None else self.names.name(key)
        return [event for event in self.events if event.kind is kind and event.key == name]


def test_a_broken_budget_is_told_once_of_the_key_and_once_of_all() -> None:
    kit = Kit()
    kit.learn(BAD, age_s=0.5, changed=True)
    for key in (BAD, None):
        [alarm] = kit.told(EventKind.ALARM, key)
        assert (alarm.measure, alarm.limit) == ("changed", 0.05)
        assert alarm.interval is not None
        assert alarm.interval.lower > 0.05
    assert kit.policy.report(max_keys=0).num_alarms == 2


def test_the_end_of_an_alarm_is_told_when_the_estimate_is_back() -> None:
    kit = Kit()
    kit.learn(BAD, age_s=0.5, changed=True, count=20)
    assert not kit.told(EventKind.RECOVERED, BAD)
    kit.learn(BAD, age_s=0.5, changed=False, count=ENOUGH)
    [recovered] = kit.told(EventKind.RECOVERED, BAD)
    assert recovered.interval is not None
    assert recovered.interval.estimate <= 0.05


def test_reuse_that_stops_and_begins_again_is_told_as_that() -> None:
    kit = Kit()
    kit.learn(BAD, age_s=0.5, changed=True)
    [stopped] = kit.told(EventKind.STOPPED, BAD)
    assert stopped.lifetime_s == 0.0
    assert not kit.told(EventKind.RESUMED, BAD)
    kit.learn(BAD, age_s=0.5, changed=False)
    [resumed] = kit.told(EventKind.RESUMED, BAD)
    assert resumed.lifetime_s == 1.0
    assert not kit.told(EventKind.LIFETIME, BAD)


def test_a_lifetime_that_is_cut_but_not_to_nothing_is_no_stop() -> None:
    kit = Kit()
    kit.learn(BAD, age_s=3.0, changed=True)
    [cut] = kit.told(EventKind.LIFETIME, BAD)
    assert cut.lifetime_s == 2.0
    assert not kit.told(EventKind.STOPPED, BAD)


def test_the_report_says_what_the_operator_set() -> None:
    report = Kit(start_s=0.5, least_s=0.25).policy.report(max_keys=0)
    assert (report.name, report.traffic_share, report.num_key_features, report.bin_width) == (
        "main",
        0.75,
        3,
        0.25,
    )
    assert (report.lifetime_s, report.min_lifetime_s, report.max_lifetime_s) == (0.5, 0.25, 64.0)
    assert not report.stopped
    assert (report.max_changed, report.max_cosine_distance, report.max_l2) == (0.05, 0.5, 1.5)
    assert (report.max_error, report.sample_share, report.max_entries) == (0.125, 1.0, 10)


def test_a_stopped_policy_reports_the_lifetime_at_which_it_would_begin_again() -> None:
    kit = Kit()
    for number in range(20):
        kit.learn(b"%d" % number, age_s=0.5, changed=True, count=20)
    report = kit.policy.report(max_keys=0)
    assert (report.stopped, report.lifetime_s) == (True, 1.0)
    assert report.num_stopped_keys > 0


def test_keys_over_budget_are_reported_first_and_then_the_latest() -> None:
    kit = Kit()
    kit.learn(BAD, age_s=0.5, changed=True)
    for key in (b"earlier", GOOD):
        kit.learn(key, age_s=0.5, changed=False, count=5)
    keys = kit.policy.report(max_keys=9).keys
    assert [each.key for each in keys] == [kit.names.name(key) for key in (BAD, GOOD, b"earlier")]
    assert [each.stopped for each in keys] == [True, False, False]
    assert keys[0].lifetime_s == 0.0
    assert keys[1].lifetime_s > 0.0
    assert len(kit.policy.report(max_keys=1).keys) == 1
    assert kit.policy.report(max_keys=0).keys == ()


def test_hits_of_a_key_are_counted_over_its_entries() -> None:
    kit = Kit()
    kit.keep(GOOD, now=0.0)
    for now in (1.0, 2.0):
        found = kit.policy.look_up(GOOD, now)
        kit.policy.count(found)
    kit.policy.learn(GOOD, found, Comparison(found.age_s, 1.0, 0.0, False))
    kit.keep(GOOD, now=20.0)
    kit.policy.count(kit.policy.look_up(GOOD, 21.0))
    [key] = kit.policy.report(max_keys=1).keys
    assert key.num_hits == 3
    kit.policy.store.clear()
    assert kit.policy.report(max_keys=1).keys[0].num_hits == 0


def test_an_entry_may_be_used_up_to_its_lifetime_and_compared_from_then_on() -> None:
    kit = Kit()
    kit.keep(GOOD, now=0.0)
    young, old = kit.policy.look_up(GOOD, 7.99), kit.policy.look_up(GOOD, 8.0)
    assert (young.outcome, young.computes) == (Outcome.HIT, False)
    assert (old.outcome, old.compares, old.keeps_entry) == (Outcome.EXPIRED, True, False)


def test_a_stopped_key_compares_with_its_entry_while_that_is_young() -> None:
    """Or nothing would ever be learned of the lowest rung, and reuse could not begin again."""
    kit = Kit()
    kit.learn(BAD, age_s=0.5, changed=True)
    kit.keep(BAD, now=0.0)
    young, old = kit.policy.look_up(BAD, 0.99), kit.policy.look_up(BAD, 1.0)
    assert (young.outcome, young.compares, young.keeps_entry) == (Outcome.STOPPED, True, True)
    assert (old.outcome, old.compares, old.keeps_entry) == (Outcome.STOPPED, True, False)


class Slow(Turning):
    """An encoder that takes two seconds; what the head takes is told by its own clock."""

    def encode(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = super().encode(rows)
        self.clock.advance(2.0)
        return found


class SlowHead(Half):
    """Half a second."""

    def __init__(self, encoder: Turning) -> None:
        self.encoder = encoder

    def predict(self, encodings: np.ndarray, rows: np.ndarray) -> np.ndarray:
        self.encoder.clock.advance(0.5)
        found: np.ndarray = super().predict(encodings, rows)
        return found


def slow_world(**spec: float) -> World:
    encoder = Slow(ManualClock())
    world = World(Predictor(2, 2, encoder, SlowHead(encoder)), prefix=1, **spec)
    encoder.clock = world.clock
    return world


def test_times_of_hits_and_misses_are_means_over_rows() -> None:
    world = slow_world(sample_share=0.0)
    rows = rows_of(2, features=2)
    report = world.report()
    assert (report.hit_s, report.miss_s) == (0.0, 0.0)
    world.ask(rows)
    report = world.report()
    assert (report.hit_s, report.miss_s) == (0.0, 1.25)  # the encoder's two seconds and the head's half
    world.ask(rows[0])
    assert world.report().hit_s == 0.5
    new = rows_of(1, seed=3, features=2)[0]
    world.ask([rows[0], new])
    report = world.report()
    assert (report.hit_s, report.miss_s) == ((0.5 + 0.25) / 2, (1.25 + 1.25 + 2.25) / 3)


def test_a_hit_that_is_compared_takes_as_long_as_a_miss() -> None:
    world = slow_world(sample_share=1.0)
    row = rows_of(1, features=2)[0]
    world.ask(row)
    world.ask(row)
    report = world.report()
    assert (report.hit_s, report.miss_s) == (2.5, 2.5)


def test_exact_keys_tell_the_smallest_difference_apart() -> None:
    world = World(prefix=1)
    row = np.zeros(32, np.float32)
    tiny = np.array([0.0, 1e-45, 1e-30, 1e-9, 2e-9, 1.0, np.nextafter(np.float32(1.0), np.float32(2.0))])
    for value in tiny:
        row[0] = value
        assert world.ask(row)[1] == [False], value


def test_canaries_are_drawn_by_any_seed() -> None:
    rows = rows_of(200)
    shares = []
    for seed in (-1, 0, 2**63 - 1):
        world = World(seed=seed, canaries=(CanarySpec(name="other", share=0.5),))
        world.ask(rows)
        shares.append(world.report(1).num_lookups)
    assert all(70 <= share <= 130 for share in shares)
    assert len(set(shares)) > 1


def test_bytes_are_counted_by_entry_and_one_always_fits() -> None:
    store = EncodingStore(max_entries=10, max_bytes=50, bytes_per_entry=100, owner_of=lambda _: b"")
    assert store.capacity == 1
    for key in (b"a", b"b"):
        store.put(key, Entry(ROW, ROW, None, 0.0))
    assert (store.find(b"a"), store.num_bytes, store.num_evicted) == (None, 100, 1)
    roomy = EncodingStore(max_entries=10, max_bytes=350, bytes_per_entry=100, owner_of=lambda _: b"")
    for key in (b"a", b"b"):
        roomy.put(key, Entry(ROW, ROW, None, 0.0))
    assert (roomy.capacity, roomy.num_bytes) == (3, 200)


def test_the_keys_compared_longest_ago_are_forgotten_with_their_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifetimes_module, "MAX_KEYS", 2)
    lifetimes = Lifetimes(
        Ladder(8.0, min_s=1.0, max_s=64.0), RiskBudget(max_changed=0.05), on_change=lambda change: None
    )

    def feed(key: bytes, *, changed: bool, count: int = 1) -> None:
        for _ in range(count):
            lifetimes.observe(key, Comparison(0.5, 1.0, 0.0, changed))
            lifetimes.check_integrity()

    feed(b"fine", changed=False, count=ENOUGH)
    feed(BAD, changed=True, count=30)
    assert (lifetimes.num_stopped_keys, lifetimes.lifetime(BAD)) == (1, 0.0)
    feed(b"fine", changed=False)
    feed(b"third", changed=False)
    assert (lifetimes.num_stopped_keys, lifetimes.lifetime(BAD)) == (0, 8.0)  # as all others again
    feed(BAD, changed=True, count=30)
    feed(b"third", changed=False)
    feed(b"fourth", changed=False)
    assert lifetimes.num_stopped_keys == 0
    for _ in range(
        30
    ):  # a key that is cut to its lowest rung is not stopped, and does not count when it goes
        lifetimes.observe(BAD, Comparison(1.5, 1.0, 0.0, True))
    assert (lifetimes.lifetime(BAD), lifetimes.num_stopped_keys) == (1.0, 0)
    feed(b"third", changed=False)
    feed(b"fourth", changed=False)
    assert lifetimes.num_stopped_keys == 0


def test_a_key_that_was_proved_good_and_turns_bad_has_no_floor_left() -> None:
    kit = Kit()
    for age_s in (0.5, 1.5, 3.0, 6.0, 12.0):
        kit.learn(GOOD, age_s=age_s, changed=False)
    assert kit.policy.lifetimes.lifetime(GOOD) == 16.0
    kit.learn(GOOD, age_s=1.5, changed=True)
    assert kit.policy.lifetimes.lifetime(GOOD) == 1.0


def test_a_ladder_needs_a_lowest_rung() -> None:
    with pytest.raises(ValueError, match="min_s"):
        Ladder(1.0, min_s=0.0, max_s=1.0)


def test_a_policy_without_limits_reports_none() -> None:
    report = World(budget=BudgetSpec(max_changed=None), lifetime_s=None).report()
    assert (report.max_changed, report.max_cosine_distance, report.max_l2, report.max_error) == (0.0,) * 4
    assert (report.lifetime_s, report.stopped) == (0.0, False)
