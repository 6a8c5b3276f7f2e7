"""Quick calls are computed by the thread that brings them, and none is left lying."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

from server.predict.messages import Output
from server.predict.model import Prepared
from tests.predict_kit import Gate, HostKit, RowModel, rows_of, texts_of, values_of


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
    """Let a few calls show what they cost: before that nobody knows that they are quick."""
    for _ in range(20):
        call_id = kit.call("rows", rows_of([1, 0, 0, 0]))
        kit.host.settle()
        kit.answer(call_id)


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
