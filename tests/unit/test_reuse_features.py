"""A stateful encoder: what is reused for whom, how long, and what is counted."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvcore.clock import ManualClock
from server.predict.errors import ComputeError, InputError, WrongTaskError
from server.predict.messages import Inputs, Task, TextItem
from server.predict.options import BudgetSpec, CanarySpec
from server.predict.reuse.predictor import Predictor
from tests.unit.reuse_world import BUILTIN, Half, Turning, TurningWorld, World, rows_of

FREE = BudgetSpec(max_changed=None)


def near(row, seed=1, spread=0.05):
    """Return a row with the same first 24 features."""
    other = row.copy()
    other[24:] += (spread * np.random.default_rng(seed).standard_normal(8)).astype(np.float32)
    return other


def test_a_first_row_is_computed_and_its_repeat_is_a_hit_with_the_same_bits():
    world, row = World(), rows_of(1)[0]
    first, hits = world.ask(row)
    assert hits == [False]
    assert first.tobytes() == world.fresh(row).tobytes()
    again, hits = world.ask(row)
    assert hits == [True]
    assert again.tobytes() == first.tobytes()


def test_a_row_with_the_same_prefix_gets_the_kept_encoding_and_its_own_head():
    world, row = World(), rows_of(1)[0]
    world.ask(row)
    other = near(row)
    got, hits = world.ask(other)
    expected = BUILTIN.head.predict(BUILTIN.encoder.encode(row[None]), other[None])
    assert hits == [True]
    assert got.tobytes() == expected.tobytes()
    assert got.tobytes() != world.fresh(other).tobytes()


def test_another_prefix_is_another_key():
    world, row = World(), rows_of(1)[0]
    world.ask(row)
    other = row.copy()
    other[23] += 1e-3
    assert world.ask(other)[1] == [False]


def test_bins_join_what_rounds_to_the_same_and_zero_has_no_sign():
    world = World(prefix=2, bin_width=0.5)
    row = np.zeros(32, np.float32)
    world.ask(row)
    row[:2] = (-0.2, 0.24)
    assert world.ask(row)[1] == [True]
    row[:2] = (-0.3, 0.24)
    assert world.ask(row)[1] == [False]
    exact = World(prefix=2)
    row[:2] = (0.0, 0.0)
    exact.ask(row)
    row[:2] = (-0.0, 0.0)
    assert exact.ask(row)[1] == [True]


def test_bins_hold_for_the_largest_floats():
    world = World(prefix=1, bin_width=1e-3)
    row = np.zeros(32, np.float32)
    row[0] = np.finfo(np.float32).max
    world.ask(row)
    assert world.ask(row)[1] == [True]


def test_tenants_share_nothing():
    world, row = World(), rows_of(1)[0]
    world.ask(row, tenant="a")
    assert world.ask(row, tenant="b")[1] == [False]
    assert world.ask(row, tenant="a")[1] == [True]


def test_without_reuse_nothing_is_used_and_nothing_is_left():
    world, row = World(), rows_of(1)[0]
    assert world.ask(row, reuse=False)[1] == [False]
    assert world.report().num_lookups == world.report().num_entries == 0
    world.ask(row)
    got, hits = world.ask(near(row), reuse=False)
    assert hits == [False]
    assert got.tobytes() == world.fresh(near(row)).tobytes()
    assert world.report().num_lookups == 1


def test_rows_of_one_batch_with_one_key_are_encoded_once_the_first_of_them():
    world = TurningWorld(sample_share=0.0)
    rows = np.array([[1, 0], [2, 0], [1, 0.1], [1, 0.2], [2, 0.3]], np.float32)
    got, hits = world.ask(rows)
    assert world.encoder.num_calls == 1
    assert world.encoder.num_rows == 2
    assert hits == [False, False, True, True, True]
    encodings = world.encoder.encode(rows[[0, 1, 0, 0, 1]])
    assert got.tobytes() == world.predictor.head.predict(encodings, rows).tobytes()


def test_a_batch_gives_what_its_rows_give_one_by_one():
    draw = np.random.default_rng(7)
    keys = rows_of(30)
    rows = np.stack([near(keys[draw.integers(30)], seed) for seed in range(200)])
    together, apart = World(sample_share=0.3), World(sample_share=0.3)
    got, hits = together.ask(rows)
    single = [apart.ask(row) for row in rows]
    assert got.tobytes() == np.concatenate([each for each, _ in single]).tobytes()
    assert hits == [each for _, (each,) in single]
    assert together.report().num_hits == apart.report().num_hits == 200 - 30


def test_an_entry_lives_until_its_lifetime_is_over_however_often_it_is_used():
    world, row = World(lifetime_s=10.0, sample_share=0.0), rows_of(1)[0]
    world.ask(row)
    for _ in range(3):
        world.clock.advance(3.0)
        assert world.ask(row)[1] == [True]
    world.clock.advance(1.0)
    assert world.ask(row)[1] == [False]
    assert world.report().num_expired == 1
    assert world.ask(row)[1] == [True]


def test_without_a_lifetime_nothing_grows_too_old():
    world, row = World(lifetime_s=None), rows_of(1)[0]
    world.ask(row)
    world.clock.advance(1e9)
    assert world.ask(row)[1] == [True]
    assert world.report().lifetime_s == 0.0


def test_the_least_recently_used_entry_leaves():
    world, rows = World(max_entries=2), rows_of(3)
    world.ask(rows[0])
    world.ask(rows[1])
    world.ask(rows[0])
    world.ask(rows[2])
    assert world.ask(rows[0])[1] == [True]
    assert world.ask(rows[1])[1] == [False]
    assert world.report().num_entries == 2
    assert world.report().num_evicted == 2


def test_bytes_bound_what_is_kept():
    world = World(max_bytes=20_000)
    world.ask(rows_of(500))
    report = world.report()
    assert 5 < report.max_entries < 30
    assert report.num_entries == report.max_entries
    assert report.num_bytes <= 20_000
    assert world.model.info.num_bytes > report.num_bytes


def test_a_batch_with_more_keys_than_fit_is_answered_all_the_same():
    world, rows = World(max_entries=2), np.concatenate([rows_of(5), rows_of(5)])
    got, _ = world.ask(rows)
    assert got.tobytes() == world.fresh(rows).tobytes()


def test_clearing_forgets_encodings():
    world, rows = World(), rows_of(3)
    world.ask(rows)
    assert world.model.clear_reuse() == 3
    assert world.ask(rows[0])[1] == [False]
    assert world.model.clear_reuse() == 1


@pytest.mark.parametrize(
    ("rows", "num_rows", "index", "part"),
    [
        (np.zeros((1, 31)), 1, 0, "values"),
        (np.zeros((1, 33)), 1, 0, "values"),
        (np.zeros((2, 32)), 3, 0, "values"),
        (np.zeros((0, 32)), 0, None, ""),
        (np.where(np.arange(96).reshape(3, 32) == 32 + 3, np.nan, 1.0), 3, 1, "values[3]"),
        (np.where(np.arange(96).reshape(3, 32) == 95, -np.inf, 1.0), 3, 2, "values[31]"),
    ],
)
def test_bad_rows_are_refused_by_name(rows, num_rows, index, part):
    world = World()
    inputs = Inputs(rows=rows.astype(np.float32).tobytes(), num_rows=num_rows)
    with pytest.raises(InputError) as caught:
        world.model.prepare(inputs, truncate=False, reuse=True, tenant="")
    assert (caught.value.index, caught.value.part) == (index, part)


def test_rows_whose_squares_overflow_are_welcome():
    world = World()
    got, _ = world.ask(np.full((2, 32), 3e38, np.float32))
    assert np.isfinite(got).all()


def test_texts_are_for_other_models():
    with pytest.raises(WrongTaskError):
        World().model.prepare(Inputs(texts=(TextItem("hello"),)), truncate=False, reuse=True, tenant="")


def test_the_model_says_what_it_is():
    info = World().model.info
    assert (info.task, info.num_features, info.executor) == (Task.FEATURES, 32, "features")
    assert info.fingerprint == BUILTIN.fingerprint


class Broken(Half):
    """A head that answers, or raises, what it is told."""

    def __init__(self, answer):
        self.answer = answer

    def predict(self, encodings, rows):
        if isinstance(self.answer, Exception):
            raise self.answer
        return np.full(len(rows), self.answer, np.float32)


@pytest.mark.parametrize("answer", [np.nan, 1.5, -0.1, RuntimeError("secret path")])
def test_a_head_that_fails_is_a_compute_error_and_nothing_is_kept(answer):
    head = Broken(answer)
    world = World(Predictor(2, 2, Turning(ManualClock()), head), prefix=1)
    with pytest.raises(ComputeError) as caught:
        world.ask([[1.0, 2.0]])
    assert "secret" not in caught.value.reason
    assert world.report().num_entries == 0
    head.answer = 0.25
    assert world.ask([[1.0, 2.0]])[0] == [0.25]


def test_certified_hits_are_within_the_error_and_others_are_computed():
    world = World(max_error=0.02, sample_share=0.0, budget=FREE)
    draw = np.random.default_rng(3)
    keys = rows_of(20)
    outcomes = []
    for seed in range(600):
        row = near(keys[draw.integers(20)], seed, spread=float(draw.choice([0.01, 0.03, 0.3])))
        (got,), (hit,) = world.ask(row)
        assert abs(float(got) - float(world.fresh(row)[0])) <= (0.02 if hit else 0.0)
        outcomes.append(hit)
    report = world.report()
    assert report.num_hits == sum(outcomes) > 100
    assert report.num_uncertified > 100
    assert report.num_uncertified + report.num_hits + report.num_absent == 600


def test_what_was_not_certified_becomes_the_new_anchor():
    world, row = World(max_error=0.01, sample_share=0.0), rows_of(1)[0]
    world.ask(row)
    far = near(row, spread=1.0)
    assert world.ask(far)[1] == [False]
    assert world.report().num_uncertified == 1
    assert world.ask(far)[1] == [True]
    assert world.ask(row)[1] == [False]


def test_a_canary_gets_its_share_of_the_keys_and_always_the_same():
    world = World(
        prefix=24,
        sample_share=0.0,
        canaries=(CanarySpec(name="short", share=0.25, prefix=8, lifetime_s=5.0),),
    )
    rows = rows_of(2000)
    world.ask(rows)
    main, canary = world.report(0), world.report(1)
    assert (main.name, canary.name) == ("main", "short")
    assert (main.num_key_features, canary.num_key_features) == (24, 8)
    assert (main.lifetime_s, canary.lifetime_s) == (60.0, 5.0)
    assert main.traffic_share == pytest.approx(0.75)
    assert main.num_lookups + canary.num_lookups == 2000
    assert 420 < canary.num_lookups < 580
    world.ask(rows)
    assert world.report(0).num_hits == main.num_lookups
    assert world.report(1).num_hits == canary.num_lookups
    world.clock.advance(6.0)
    world.ask(rows)
    assert world.report(0).num_expired == 0
    assert world.report(1).num_expired == canary.num_lookups


def test_rows_with_one_canary_key_go_to_one_policy():
    world = World(prefix=24, canaries=(CanarySpec(name="short", share=0.5, prefix=8),))
    rows = np.repeat(rows_of(1), 100, axis=0)
    rows[:, 8:] = rows_of(100, seed=2)[:, 8:]
    world.ask(rows)
    assert {world.report(0).num_lookups, world.report(1).num_lookups} == {0, 100}


def test_outputs_say_which_policy_answered():
    world = World(canaries=(CanarySpec(name="other", share=0.5),))
    inputs = Inputs(rows=rows_of(50).tobytes(), num_rows=50)
    prepared = world.model.prepare(inputs, truncate=False, reuse=True, tenant="")
    assert {each.policy for each in world.model.run(prepared)} == {"main", "other"}
    prepared = world.model.prepare(inputs, truncate=False, reuse=False, tenant="")
    assert {each.policy for each in world.model.run(prepared)} == {""}


def test_reports_name_keys_by_digests_that_do_not_tell_them():
    world, rows = World(sample_share=1.0), rows_of(5)
    world.ask(rows)
    world.ask(rows)
    keys = world.report(max_keys=3).keys
    assert len({each.key for each in keys}) == 3
    assert all(each.num_hits == 1 and each.risk.num_compared == 1 for each in keys)
    other = World(sample_share=1.0)
    other.ask(rows)
    other.ask(rows)
    assert not {each.key for each in keys} & {each.key for each in other.report(max_keys=5).keys}


def test_every_hit_that_is_compared_is_counted_and_misses_are_not():
    world, rows = World(sample_share=1.0), rows_of(10)
    world.ask(rows)
    assert world.report().risk.num_compared == 0
    world.ask(np.stack([near(row) for row in rows]))
    risk = world.report().risk
    assert risk.num_compared == 10
    assert 0 < risk.l2.estimate < 0.2
    assert 0 < risk.cosine_distance.estimate < 0.02


def test_a_sampled_share_is_about_the_share_and_seeded():
    def compared(seed):
        world, rows = World(sample_share=0.1, seed=seed), rows_of(100)
        for _ in range(21):
            world.ask(rows)
        return world.report().risk.num_compared

    assert 150 < compared(1) < 250
    assert compared(1) == compared(1)
    assert len({compared(seed) for seed in range(4)}) > 1


def test_reports_and_clearing_from_another_thread_disturb_nothing():
    world, rows = World(sample_share=0.5), rows_of(20)
    stop, faults = threading.Event(), []

    def watch():
        try:
            while not stop.is_set():
                world.model.reuse_report(max_keys=5)
                world.model.clear_reuse()
        except Exception as fault:  # noqa: BLE001 - whatever it is, the test fails
            faults.append(fault)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(100):
            assert world.ask(rows)[0].tobytes() == world.fresh(rows).tobytes()
    finally:
        stop.set()
        watcher.join()
    assert faults == []
    assert world.report().num_lookups == 2000
