"""Quick calls are computed by the thread that brings them, and none is left lying."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence

import pytest

from server.predict.catalogue import ModelKey
from server.predict.errors import InputError
from server.predict.messages import FailureKind, Inputs, Output
from server.predict.model import Prepared
from server.predict.quick import MAX_MODELS, TRY_EVERY, TRY_RUN, QuickCalls
from tests.predict_kit import PATIENCE_S, Gate, HostKit, RowModel, rows_of, texts_of, values_of

KEY = ModelKey("rows", "1")


class NotingModel(RowModel):
    """Notes which threads compute, and that they never do at once."""

    def __init__(self, *, gate: Gate | None = None) -> None:
        super().__init__(gate=gate)
        self.threads: list[int] = []
        self._is_computing = threading.Lock()

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        assert self._is_computing.acquire(blocking=False), "two batches at once"
        try:
            self.threads.append(threading.get_ident())
            return super().run(batch)
        finally:
            self._is_computing.release()


def kit_with(model: RowModel) -> HostKit:
    kit = HostKit(is_settled=True, max_delay_s=0.0)
    kit.rows = model
    return kit


def learn_cost(kit: HostKit) -> None:
    """Let a few calls show what they cost: before that nobody knows that they are quick.

    What was measured then gives way to what an idle machine would have shown.
    """
    for _ in range(20):
        call_id = kit.call("rows", rows_of([1, 0, 0, 0]))
        kit.host.settle()
        kit.answer(call_id)
    quick = kit.host._desk.quick
    with kit.host._desk.lock:
        assert quick._costs.pop(KEY, None) is not None
        for _ in range(10):
            quick.learn(KEY, 1, 1e-6)


def test_calls_that_came_together_are_one_batch_of_the_reader() -> None:
    model = NotingModel()
    with kit_with(model) as kit:
        learn_cost(kit)
        model.threads.clear()
        model.batches.clear()
        calls = [kit.call("rows", rows_of([number, 0, 0, 0])) for number in range(10)]
        assert model.batches == []
        kit.host.settle()
        assert [values_of(kit.answer(call)) for call in calls] == [[[float(number)]] for number in range(10)]
        assert model.threads == [threading.get_ident()]
        assert model.batches == [10]


def test_first_calls_go_to_the_compute_thread_since_nobody_knows_their_cost() -> None:
    model = NotingModel()
    with kit_with(model) as kit:
        call_id = kit.call("rows", rows_of([1, 0, 0, 0]))
        kit.answer(call_id)  # without settling
        assert threading.get_ident() not in model.threads


def test_quick_call_behind_a_slow_batch_is_left_to_the_compute_thread() -> None:
    model = NotingModel()
    with kit_with(model) as kit:
        learn_cost(kit)
        kit.words.gate = Gate()
        slow = kit.call("words", texts_of("a b c"))
        kit.words.gate.wait_until_reached()
        model.threads.clear()
        quick = kit.call("rows", rows_of([5, 0, 0, 0]))
        kit.host.settle()  # returns although somebody computes
        assert model.threads == []
        kit.words.gate.open()
        assert values_of(kit.answer(quick)) == [[5.0]]
        assert threading.get_ident() not in model.threads
        kit.answer(slow)


def test_nothing_is_left_lying_whatever_comes_together() -> None:
    rng = random.Random(5)
    model = NotingModel()
    with kit_with(model) as kit:
        learn_cost(kit)
        expected: dict[int, float] = {}
        others = []
        for _ in range(400):
            for _ in range(rng.randint(1, 6)):
                number = float(rng.randint(0, 500))
                if rng.random() < 0.1:
                    others.append(kit.call("words", texts_of("x y")))
                elif rng.random() < 0.05:
                    others.append(kit.call("rows", rows_of([RowModel.RAISES, 0, 0, 0])))
                else:
                    expected[kit.call("rows", rows_of([number, 0, 0, 0]))] = number
            kit.host.settle()
        for call_id, number in expected.items():
            assert values_of(kit.answer(call_id)) == [[number]]
        for call_id in others:
            kit.outcome(call_id)
        assert threading.get_ident() in model.threads


def test_call_that_is_cancelled_before_it_is_settled_keeps_nobody_waiting() -> None:
    model = NotingModel()
    with kit_with(model) as kit:
        learn_cost(kit)
        first = kit.call("rows", rows_of([1, 0, 0, 0]))
        second = kit.call("rows", rows_of([2, 0, 0, 0]))
        kit.cancel(first)
        kit.host.settle()
        assert values_of(kit.answer(second)) == [[2.0]]


def test_models_stay_open_until_the_reader_has_computed() -> None:
    """Closing waited for the compute thread alone."""
    model = NotingModel()
    kit = kit_with(model)
    with kit:
        learn_cost(kit)
        gate = model.gate = Gate()
        call_id = kit.call("rows", rows_of([1, 0, 0, 0]))
        reader = threading.Thread(target=kit.host.settle)
        reader.start()
        gate.wait_until_reached()
        closer = threading.Thread(target=kit.host.close)
        closer.start()
        assert kit.failure(call_id).kind is FailureKind.LOST  # it closes
        closer.join(0.2)
        assert closer.is_alive()
        assert not model.is_closed
        gate.open()
        for thread in (reader, closer):
            thread.join(PATIENCE_S)
        assert model.is_closed


def test_a_broken_compute_thread_stays_known_though_the_reader_ends_a_batch_after_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The end of that batch took back what the watchdog was to see: every call was refused for ever."""
    model = NotingModel()
    kit = kit_with(model)
    with kit, caplog.at_level(logging.CRITICAL):
        learn_cost(kit)
        compute = kit.host._compute
        breaking = Gate()

        def break_down(*_: object) -> None:
            breaking.pass_through()
            raise RuntimeError("nobody has foreseen this")

        compute._wait = break_down  # type: ignore[method-assign, assignment]
        with kit.host._desk.lock:
            kit.host._desk.work.notify_all()
        breaking.wait_until_reached()
        gate = model.gate = Gate()
        kit.call("rows", rows_of([1, 0, 0, 0]))
        reader = threading.Thread(target=kit.host.settle)
        reader.start()
        gate.wait_until_reached()
        breaking.open()
        compute._thread.join(0.2)
        gate.open()
        for thread in (reader, compute._thread):
            thread.join(PATIENCE_S)
        assert kit.host.turn_started is not None


class PreparingModel(NotingModel):
    """Notes of what sizes inputs came to be prepared, and for whom."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[tuple[int, str]] = []

    def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
        self.prepared.append((inputs.num_rows, tenant))
        return super().prepare(inputs, truncate=truncate, reuse=reuse, tenant=tenant)


def test_calls_that_came_together_are_prepared_as_one_for_each_tenant() -> None:
    model = PreparingModel()
    with kit_with(model) as kit:
        learn_cost(kit)
        model.prepared.clear()
        tenants = ["a", "b", "a", "", "a"]
        calls = [kit.call("rows", rows_of([n, 0, 0, 0]), tenant=tenant) for n, tenant in enumerate(tenants)]
        assert model.prepared == []
        kit.host.settle()
        assert [values_of(kit.answer(call)) for call in calls] == [[[float(number)]] for number in range(5)]
        assert sorted(model.prepared) == [(1, ""), (1, "b"), (3, "a")]
        assert model.batches[-1] == 5


def test_rows_too_short_and_too_long_do_not_make_up_for_each_other() -> None:
    model = PreparingModel()
    with kit_with(model) as kit:
        learn_cost(kit)
        good = kit.call("rows", rows_of([7, 0, 0, 0]))
        short = kit.call("rows", rows_of([1, 0, 0]))
        long = kit.call("rows", rows_of([1, 0, 0, 0, 0]))
        ragged = [kit.call("rows", Inputs(rows=b"\0" * size, num_rows=2)) for size in (28, 36)]
        kit.host.settle()
        assert values_of(kit.answer(good)) == [[7.0]]
        for call_id in (short, long, *ragged):
            assert kit.failure(call_id).kind is FailureKind.INPUT
    assert model.is_closed  # no lease was left


def test_a_call_that_cannot_be_prepared_fails_alone() -> None:
    class Picky(PreparingModel):
        def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
            prepared = super().prepare(inputs, truncate=truncate, reuse=reuse, tenant=tenant)
            for index, each in enumerate(prepared):
                if each.payload[0] < 0:
                    raise InputError("must not be negative", index=index, part="values[0]")
            return prepared

    model = Picky()
    with kit_with(model) as kit:
        learn_cost(kit)
        model.prepared.clear()
        calls = [kit.call("rows", rows_of([1, 0, 0, 0], [sign * 2, 0, 0, 0])) for sign in (1, -1, 1)]
        kit.host.settle()
        assert [size for size, _ in model.prepared] == [6, 2, 2, 2]
        for call in (calls[0], calls[2]):
            assert values_of(kit.answer(call)) == [[1.0], [2.0]]
        failure = kit.failure(calls[1])
        assert (failure.index, failure.part) == (1, "values[0]")


def test_a_batch_of_quick_calls_keeps_to_the_budget() -> None:
    model = NotingModel()
    kit = HostKit(is_settled=True, max_delay_s=0.0, max_batch_tokens=4)
    kit.rows = model
    with kit:
        learn_cost(kit)
        model.batches.clear()
        calls = [kit.call("rows", rows_of(*[[n, 0, 0, 0]] * n)) for n in (1, 2, 2, 1, 4)]
        kit.host.settle()
        assert [len(kit.answer(call).outputs) for call in calls] == [1, 2, 2, 1, 4]
        assert model.batches == [3, 3, 4]
        larger = kit.call("rows", rows_of(*[[1, 0, 0, 0]] * 5))  # for the batcher, which cuts it
        assert len(kit.answer(larger).outputs) == 5


def test_a_quick_call_whose_deadline_comes_before_it_is_settled_is_not_computed() -> None:
    model = NotingModel()
    with kit_with(model) as kit:
        learn_cost(kit)
        model.batches.clear()
        late = kit.call("rows", rows_of([1, 0, 0, 0]), deadline_s=1e-6)
        kit.host.settle()
        assert kit.failure(late).kind is FailureKind.EXPIRED
        assert model.batches == []


def is_quick(quick: QuickCalls, count: int) -> list[bool]:
    return [quick.is_quick(KEY, 1) for _ in range(count)]


def test_nothing_is_quick_before_anything_is_known_and_processor_time_is_the_first_guess() -> None:
    quick = QuickCalls()
    assert is_quick(quick, 3) == [False] * 3
    quick.learn_elsewhere(KEY, 8, 8 * 50e-6)
    assert is_quick(quick, 3) == [True] * 3
    assert not quick.is_quick(KEY, 64)


def test_a_model_that_waits_is_found_out_by_the_first_try_and_tried_again_now_and_then() -> None:
    quick = QuickCalls()
    quick.learn_elsewhere(KEY, 1, 50e-6)
    quick.learn(KEY, 1, 0.05)
    assert is_quick(quick, TRY_EVERY - TRY_RUN - 1) == [False] * (TRY_EVERY - TRY_RUN - 1)
    assert is_quick(quick, TRY_RUN) == [True] * TRY_RUN
    assert is_quick(quick, 2) == [False] * 2


def test_what_a_stall_made_slow_is_quick_again_after_a_few_tries() -> None:
    quick = QuickCalls()
    quick.learn_elsewhere(KEY, 1, 50e-6)
    for seconds in (50e-6, 3e-3):
        quick.learn(KEY, 1, seconds)
    assert not quick.is_quick(KEY, 1)
    for _ in range(2 * TRY_EVERY):
        if quick.is_quick(KEY, 1):
            quick.learn(KEY, 1, 50e-6)
    assert is_quick(quick, 100) == [True] * 100


def test_a_model_that_takes_long_is_never_tried() -> None:
    quick = QuickCalls()
    quick.learn_elsewhere(KEY, 1, 0.01)
    assert not any(is_quick(quick, 2 * TRY_EVERY))


def test_costs_are_remembered_of_so_many_models_only() -> None:
    quick = QuickCalls()
    for number in range(MAX_MODELS + 1):
        quick.learn_elsewhere(ModelKey("rows", str(number)), 1, 50e-6)
    assert not quick.is_quick(ModelKey("rows", "0"), 1)
    assert quick.is_quick(ModelKey("rows", "1"), 1)
    assert quick.is_quick(ModelKey("rows", str(MAX_MODELS)), 1)
