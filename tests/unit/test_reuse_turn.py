"""How one batch of rows is answered: rows of every kind beside each other, faults, and what is reserved."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from kvcore.clock import ManualClock
from server.predict.errors import ComputeError, InputError
from server.predict.messages import Inputs
from server.predict.model import Prepared
from server.predict.options import BudgetSpec, CanarySpec
from server.predict.reuse.features import MODEL_BYTES
from server.predict.reuse.predictor import Predictor
from tests.unit.reuse_world import BUILTIN, Half, Turning, World, rows_of

FREE = BudgetSpec(max_changed=None)


def inputs_of(rows: np.ndarray) -> Inputs:
    rows = np.atleast_2d(rows)
    return Inputs(rows=rows.tobytes(), num_rows=len(rows))


def prepare(world: World, row: np.ndarray, *, reuse: bool = True, tenant: str = "") -> list[Prepared]:
    return world.model.prepare(inputs_of(row), truncate=False, reuse=reuse, tenant=tenant)


def run(world: World, *prepared: list[Prepared]) -> tuple[list[bytes], list[bool]]:
    outputs = world.model.run([each for some in prepared for each in some])
    world.model.check_integrity()
    return [output.values for output in outputs], [output.cache_hit for output in outputs]


def moved(row: np.ndarray, by: float) -> np.ndarray:
    """Return a row with the same key."""
    other = row.copy()
    other[24:] += np.float32(by)
    return other


def test_rows_that_reuse_nothing_keep_their_answers_beside_rows_that_wait_for_each_other() -> None:
    world, (first, second) = World(sample_share=0.0, budget=FREE), rows_of(2)
    again = moved(first, 0.25)
    values, hits = run(
        world,
        prepare(world, first),
        prepare(world, second, reuse=False),
        prepare(world, again),
        prepare(world, again, reuse=False),
        prepare(world, second),
    )
    assert hits == [False, False, True, False, False]
    fresh = [world.fresh(row)[0].tobytes() for row in (first, second, again)]
    kept = BUILTIN.head.predict(BUILTIN.encoder.encode(first[None]), again[None])[0].tobytes()
    assert values == [fresh[0], fresh[1], kept, fresh[2], fresh[1]]
    assert world.report().num_lookups == 3


def test_a_row_without_reuse_neither_finds_nor_leaves_an_entry_in_a_shared_batch() -> None:
    world, row = World(), rows_of(1)[0]
    _, hits = run(world, prepare(world, row, reuse=False), prepare(world, row))
    assert hits == [False, False]
    assert world.report().num_entries == 1


def test_tenants_in_one_batch_do_not_wait_for_each_other() -> None:
    world, row = World(), rows_of(1)[0]
    _, hits = run(world, prepare(world, row, tenant="a"), prepare(world, row, tenant="b"))
    assert hits == [False, False]
    assert world.report().num_entries == 2


class Bounds:
    """A certificate that says what it was told, by the second feature of the row."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def anchors(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, 1:].astype(np.float64)

    def bounds(
        self, anchors: np.ndarray, cached: np.ndarray, encodings: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        assert anchors.tolist() == cached[:, 1:].tolist(), "an anchor is not its row's"
        assert encodings.tolist() == Turning(ManualClock()).encode(cached).tolist()
        self.asked.append(rows[:, 1].tolist())
        return rows[:, 1].astype(np.float64)


def certified_world(**spec: object) -> tuple[World, Bounds]:
    certificate = Bounds()
    predictor = Predictor(2, 2, Turning(ManualClock()), Half(), certificate)
    spec = {"prefix": 1, "max_error": 0.25, "sample_share": 0.0, "budget": FREE, **spec}
    return World(predictor, **spec), certificate


def test_a_hit_is_certified_up_to_the_error_itself_and_not_by_what_is_no_number() -> None:
    world, certificate = certified_world()
    world.ask([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    # One key is new, so that the certificate is asked of some rows only.
    certificate.bounds = lambda *_args: np.array([0.25, 0.2500001, np.nan])  # type: ignore[method-assign]
    _, hits = world.ask([[1.0, 0.5], [9.0, 0.5], [2.0, 0.5], [3.0, 0.5]])
    assert hits == [True, False, False, False]
    report = world.report()
    assert (report.num_hits, report.num_uncertified, report.num_absent) == (1, 2, 5)


def test_the_certificate_is_asked_of_hits_alone_with_the_rows_at_hand() -> None:
    world, certificate = certified_world()
    world.ask([[1.0, 0.0], [2.0, 0.0]])
    assert certificate.asked == []
    _, hits = world.ask([[5.0, 0.125], [2.0, 0.25], [6.0, 0.375], [1.0, 0.5]])
    assert certificate.asked == [[0.25, 0.5]]
    assert hits == [False, True, False, False]
    world.model.check_integrity()
    _, hits = world.ask([[1.0, 0.0625]])  # what was not certified has become the anchor
    assert (certificate.asked[-1], hits) == ([0.0625], [True])


def test_only_the_policy_that_asks_for_it_is_certified() -> None:
    world, certificate = certified_world(
        max_error=None, canaries=(CanarySpec(name="bounded", share=0.5, max_error=0.25),)
    )
    keys = np.arange(40, dtype=np.float32)
    world.ask(np.stack([keys, np.zeros(40, np.float32)], axis=1))
    _, hits = world.ask(np.stack([keys, np.ones(40, np.float32)], axis=1))
    main, bounded = world.report(0), world.report(1)
    assert (main.num_uncertified, bounded.num_hits) == (0, 0)
    assert main.num_hits == sum(hits) > 0
    assert bounded.num_uncertified == len(certificate.asked[0]) == 40 - sum(hits) > 0


class Stretching(Turning):
    """An encoder whose encodings are twice as long after a while."""

    def encode(self, rows: np.ndarray) -> np.ndarray:
        longer: np.ndarray = super().encode(rows) * np.float32(2.0 if self.clock.now() >= 1.0 else 1.0)
        return longer


@pytest.mark.parametrize(("wait_s", "hit"), [(2.0, True), (100.0, False)])
def test_the_distance_is_measured_by_the_fresh_encoding(wait_s: float, *, hit: bool) -> None:
    """Of a hit that is compared, and of an entry that was too old: reused 1, fresh 2, so half of it."""
    encoder = Stretching(ManualClock())
    world = World(Predictor(2, 2, encoder, Half()), prefix=1, sample_share=1.0)
    encoder.clock = world.clock
    learned = []
    policy = world.model._policies[0]
    policy.lifetimes.observe = lambda key, comparison: learned.append(comparison)  # type: ignore[method-assign]
    world.ask([[0.5, 0.0]])
    world.clock.advance(wait_s)
    assert world.ask([[0.5, 0.0]])[1] == [hit]
    [comparison] = learned
    assert comparison.age_s == wait_s
    assert comparison.l2 == pytest.approx(0.5)
    assert comparison.cosine == pytest.approx(1.0)
    assert world.report().risk.num_compared == int(hit)


class Faulty(Turning):
    """An encoder that gives, or raises, what it is told."""

    answer: object = None

    def encode(self, rows: np.ndarray) -> np.ndarray:
        if isinstance(self.answer, Exception):
            raise self.answer
        return super().encode(rows) if self.answer is None else np.asarray(self.answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (np.zeros((1, 3), np.float32), "shape or type"),
        (np.zeros((2, 2), np.float32), "shape or type"),
        (np.zeros((1, 2), np.float64), "shape or type"),
        (np.array([[0.0, np.nan]], np.float32), "not a number"),
        (np.array([[np.inf, 0.0]], np.float32), "not a number"),
        (ValueError("/srv/secret"), "could not compute"),
        (ComputeError("the row is beyond what it knows"), "beyond what it knows"),
    ],
)
def test_an_encoder_that_fails_is_a_compute_error_and_nothing_is_kept(answer: object, said: str) -> None:
    encoder = Faulty(ManualClock())
    world = World(Predictor(2, 2, encoder, Half()), prefix=1)
    encoder.answer = answer
    with pytest.raises(ComputeError, match=said):
        world.ask([[1.0, 2.0]])
    assert world.report().num_entries == 0
    encoder.answer = None
    assert world.ask([[1.0, 2.0]])[1] == [False]


@pytest.mark.parametrize("answer", [np.zeros(2, np.float32), np.zeros(1), np.zeros((1, 1), np.float32)])
def test_a_head_that_answers_in_another_shape_or_type_is_a_compute_error(answer: np.ndarray) -> None:
    class Odd(Half):
        def predict(self, encodings: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return answer

    world = World(Predictor(2, 2, Turning(ManualClock()), Odd()), prefix=1)
    with pytest.raises(ComputeError, match="shape or type"):
        world.ask([[1.0, 2.0]])
    assert world.report().num_entries == 0


def test_each_of_several_canaries_gets_its_share() -> None:
    world = World(canaries=tuple(CanarySpec(name=name, share=0.2) for name in ("a", "b", "c")))
    world.ask(rows_of(2000))
    assert [report.name for report in (world.report(number) for number in range(4))] == [
        "main",
        "a",
        "b",
        "c",
    ]
    assert all(320 < world.report(number).num_lookups < 480 for number in (1, 2, 3))
    assert 700 < world.report(0).num_lookups < 900


def test_a_row_counts_as_one_token_whatever_becomes_of_it() -> None:
    rows = rows_of(20)
    for canaries in ((), (CanarySpec(name="other", share=0.5),)):
        world = World(canaries=canaries)
        for reuse in (True, False):
            prepared = world.model.prepare(inputs_of(rows), truncate=False, reuse=reuse, tenant="t")
            assert [(each.num_tokens, each.reuse, each.tenant) for each in prepared] == [(1, reuse, "t")] * 20


def test_a_row_of_another_length_is_refused_with_both_numbers() -> None:
    for rows, found in ((rows_of(2, features=3), "3 features"), (rows_of(1, features=33), "33 features")):
        with pytest.raises(InputError, match=f"rows of 32 features, not {found}"):
            World().model.prepare(inputs_of(rows), truncate=False, reuse=True, tenant="")
    uneven = Inputs(rows=b"\0" * 20, num_rows=2)
    with pytest.raises(InputError, match="not another number of features"):
        World().model.prepare(uneven, truncate=False, reuse=True, tenant="")


def test_closing_forgets_what_was_kept() -> None:
    world = World()
    world.ask(rows_of(3))
    world.model.close()
    assert world.report().num_entries == 0


@pytest.mark.parametrize(
    "spec",
    [{}, {"bin_width": 0.5}, {"max_error": 0.02}, {"prefix": 1}],
    ids=["exact", "bins", "certified", "short"],
)
def test_what_is_kept_takes_no_more_memory_than_was_reserved(spec: dict[str, object]) -> None:
    world = World(budget=FREE, sample_share=0.0, max_entries=500, **spec)
    rows = rows_of(500, seed=7)
    rows[:, 0] = np.arange(500)
    world.ask(rows[:1])
    tracemalloc.start()
    try:
        for start in range(1, 500, 50):
            world.ask(rows[start : start + 50])
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    report = world.report()
    assert report.num_entries >= 490
    assert taken <= report.num_bytes < 3 * taken
    info = world.model.info
    assert (
        info.num_bytes == 8 * info.num_parameters + report.num_bytes // report.num_entries * 500 + MODEL_BYTES
    )


def test_the_memory_of_all_policies_is_reserved() -> None:
    one = World().model.info.num_bytes
    two = World(canaries=(CanarySpec(name="other", share=0.5),)).model.info.num_bytes
    assert two - one == pytest.approx(one - MODEL_BYTES - 8 * BUILTIN.num_parameters)


def test_an_entry_is_reserved_with_its_key_and_what_certifies_it() -> None:
    def per_entry(**spec: object) -> float:
        return World(max_entries=1000, **spec).model.info.num_bytes / 1000

    exact = per_entry(prefix=24)
    assert per_entry(prefix=4) - exact == pytest.approx(-20 * 4)
    assert per_entry(prefix=24, bin_width=0.5) - exact == pytest.approx(24 * 4)  # bins are twice as wide
    assert per_entry(prefix=24, max_error=0.02) - exact == pytest.approx((32 + 2) * 8)
