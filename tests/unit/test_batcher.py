"""Batches over all callers and all models: budget, turns, deadlines, holding, admission."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from server.predict.batch import Batch
from server.predict.batcher import Batcher
from server.predict.cost import CostModel
from server.predict.errors import OverloadedError
from server.predict.holding import Arrivals


def batcher_of(*, budget: int = 100, max_delay_s: float = 0.0, max_waiting: int = 1 << 20) -> Batcher[str]:
    return Batcher(max_batch_tokens=budget, max_delay_s=max_delay_s, max_waiting_tokens=max_waiting)


def parts(batch: Batch[str] | None) -> dict[str, list[int]]:
    """Return the inputs of each call in a batch."""
    assert batch is not None
    found: dict[str, list[int]] = {}
    for share in batch.shares:
        found.setdefault(share.key, []).extend(share.indices)
    return found


def teach(batcher: Batcher[str], model: str, *, a_s: float, b_s: float) -> None:
    """Let the batcher learn that a model takes ``a + b * tokens``."""
    for num_tokens in (10, 20, 40, 80, 10, 40):
        batcher.done(Batch(model, (), 1, num_tokens, 0), a_s + b_s * num_tokens)


# -- budget ----------------------------------------------------------------------------------------


def test_an_input_that_comes_alone_is_computed_at_once():
    batcher = batcher_of(max_delay_s=1.0)
    batcher.add("m", "a", [5], now_s=0.0)
    batch = batcher.next(0.0).batch
    assert parts(batch) == {"a": [0]}
    assert (batch.model, batch.num_inputs, batch.num_tokens) == ("m", 1, 5)


def test_what_waits_together_is_computed_together():
    batcher = batcher_of()
    for key in "abc":
        batcher.add("m", key, [10, 20], now_s=0.0)
    assert parts(batcher.next(0.0).batch) == {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    assert batcher.next(0.0).batch is None
    assert (batcher.num_waiting_tokens, batcher.num_waiting_inputs, batcher.num_waiting_calls) == (0, 0, 0)


def test_the_budget_counts_tokens_not_calls():
    batcher = batcher_of(budget=100)
    for key in "abcd":
        batcher.add("m", key, [40], now_s=0.0)
    assert parts(batcher.next(0.0).batch) == {"a": [0], "b": [0]}
    assert parts(batcher.next(0.0).batch) == {"c": [0], "d": [0]}


def test_a_short_input_behind_one_that_does_not_fit_fills_the_batch():
    batcher = batcher_of(budget=100)
    for key, length in (("a", 60), ("b", 60), ("c", 40)):
        batcher.add("m", key, [length], now_s=0.0)
    assert parts(batcher.next(0.0).batch) == {"a": [0], "c": [0]}
    assert parts(batcher.next(0.0).batch) == {"b": [0]}


def test_an_input_longer_than_the_budget_goes_alone():
    batcher = batcher_of(budget=100)
    batcher.add("m", "short", [10], now_s=0.0)
    batcher.add("m", "long", [500, 10], now_s=0.0)
    assert parts(batcher.next(0.0).batch) == {"short": [0]}
    assert parts(batcher.next(0.0).batch) == {"long": [0]}
    assert parts(batcher.next(0.0).batch) == {"long": [1]}


def test_a_batch_is_of_one_model_and_models_take_turns():
    batcher = batcher_of(budget=10)
    for model in ("m", "n"):
        for number in range(2):
            batcher.add(model, f"{model}{number}", [10], now_s=0.0)
    assert [batcher.next(0.0).batch.model for _ in range(4)] == ["m", "n", "m", "n"]


# -- turns -----------------------------------------------------------------------------------------


def test_four_thousand_inputs_delay_a_single_one_by_a_batch():
    batcher = batcher_of(budget=100)
    batcher.add("m", "huge", [1] * 4000, now_s=0.0)
    assert parts(batcher.next(0.0).batch) == {"huge": list(range(100))}
    batcher.add("m", "single", [1], now_s=0.0)
    found = parts(batcher.next(0.0).batch)
    assert found["single"] == [0]
    assert len(found["huge"]) == 99, "the rest of the batch goes on with the long call"


def test_calls_get_equal_shares_of_a_batch():
    batcher = batcher_of(budget=90)
    for key in "abc":
        batcher.add("m", key, [1] * 1000, now_s=0.0)
    assert {key: len(found) for key, found in parts(batcher.next(0.0).batch).items()} == {
        "a": 30,
        "b": 30,
        "c": 30,
    }


def test_who_got_something_goes_to_the_end_of_the_ring():
    batcher = batcher_of(budget=10)
    for key in "abc":
        batcher.add("m", key, [10, 10], now_s=0.0)
    order = [next(iter(parts(batcher.next(0.0).batch))) for _ in range(6)]
    assert order == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_call_waits_longer_than_its_place_in_the_ring_times_the_models(is_padded, seed):
    """The bound of the module's text, against callers who keep coming with as much as they can."""
    draw = random.Random(seed)
    batcher = batcher_of(budget=64)
    bound: dict[str, int] = {}
    waiting: dict[str, list[str]] = {"m": [], "n": [], "o": []}
    num_batches = 0
    for number in range(400):
        if number < 300:
            model = draw.choice("mno")
            key = f"{model}{number}"
            lengths = [draw.randint(1, 70) for _ in range(draw.choice([1, 1, 1, 20]))]
            batcher.add(model, key, lengths, now_s=0.0, is_padded=is_padded)
            bound[key] = num_batches + 3 * (len(waiting[model]) + 1)
            waiting[model].append(key)
        if draw.random() < 0.7 and (batch := batcher.next(0.0).batch) is not None:
            num_batches += 1
            served = parts(batch)
            for key in served:
                bound[key] = -1
            ring = waiting[batch.model]
            waiting[batch.model] = [key for key in ring if key not in served] + [
                key for key in served if batcher_has(batcher, key)
            ]
            assert all(limit < 0 or num_batches < limit for limit in bound.values())
    assert num_batches > 100


def batcher_has(batcher: Batcher[str], key: str) -> bool:
    return key in batcher._queue_of


# -- lengths that belong together ------------------------------------------------------------------


def test_padded_inputs_are_batched_with_their_like():
    batcher = batcher_of(budget=1000)
    for key, length in (("a", 100), ("b", 8), ("c", 90), ("d", 9)):
        batcher.add("m", key, [length], now_s=0.0, is_padded=True)
    first, second = batcher.next(0.0).batch, batcher.next(0.0).batch
    assert parts(first) == {"a": [0], "c": [0]}
    assert parts(second) == {"b": [0], "d": [0]}
    assert (first.num_tokens, first.num_padding_tokens) == (190, 10)


def test_a_short_input_whose_turn_it_is_is_not_padded_to_a_long_one():
    batcher = batcher_of(budget=1000)
    for key, length in (("a", 8), ("b", 100), ("c", 9)):
        batcher.add("m", key, [length], now_s=0.0, is_padded=True)
    assert parts(batcher.next(0.0).batch) == {"a": [0], "c": [0]}


def test_padding_counts_against_the_budget():
    batcher = batcher_of(budget=300)
    batcher.add("m", "a", [100, 90, 95, 98], now_s=0.0, is_padded=True)
    first = batcher.next(0.0).batch
    assert parts(first) == {"a": [2, 3, 0]} or sorted(parts(first)["a"]) == [0, 2, 3]
    assert first.num_tokens + first.num_padding_tokens == 300
    assert parts(batcher.next(0.0).batch) == {"a": [1]}


def test_lengths_do_not_matter_where_padding_is_cheaper_than_a_batch():
    batcher = batcher_of(budget=1000)
    batcher.add("m", "x", [1], now_s=0.0, is_padded=True)
    batcher.next(0.0)
    teach(batcher, "m", a_s=1.0, b_s=0.01)
    for key, length in (("a", 100), ("b", 8)):
        batcher.add("m", key, [length], now_s=0.0, is_padded=True)
    assert parts(batcher.next(0.0).batch) == {"a": [0], "b": [0]}


def test_inputs_of_odd_lengths_are_not_starved_by_their_like():
    batcher = batcher_of(budget=200)
    batcher.add("m", "odd", [7], now_s=0.0, is_padded=True)
    for number in range(50):
        batcher.add("m", f"n{number}", [100], now_s=0.0, is_padded=True)
    assert "odd" in parts(batcher.next(0.0).batch)


# -- deadlines and cancellation --------------------------------------------------------------------


def test_expired_inputs_are_not_computed():
    batcher = batcher_of()
    batcher.add("m", "late", [5, 5], now_s=0.0, deadline_s=1.0)
    batcher.add("m", "early", [5], now_s=0.0, deadline_s=9.0)
    turn = batcher.next(1.0)
    assert list(turn.expired) == ["late"]
    assert parts(turn.batch) == {"early": [0]}
    assert batcher.counters.num_expired == 2


def test_the_rest_of_a_call_that_expires_is_dropped():
    batcher = batcher_of(budget=10)
    batcher.add("m", "a", [10, 10, 10], now_s=0.0, deadline_s=1.0)
    assert parts(batcher.next(0.0).batch) == {"a": [0]}
    assert batcher.expire(1.0) == ["a"]
    assert batcher.next(1.0).batch is None


def test_a_cancelled_calls_inputs_vanish_at_once():
    batcher = batcher_of(budget=10)
    batcher.add("m", "a", [10, 10], now_s=0.0, deadline_s=5.0)
    batcher.add("m", "b", [10], now_s=0.0)
    batcher.next(0.0)
    batcher.cancel("a")
    batcher.cancel("a")
    batcher.cancel("nobody")
    assert batcher.num_waiting_tokens == 10
    assert parts(batcher.next(0.0).batch) == {"b": [0]}
    assert batcher.next(9.0).expired == []
    assert batcher.counters.num_cancelled == 1


def test_a_call_near_its_deadline_goes_first():
    batcher = batcher_of(budget=10)
    for model in ("m", "n"):
        batcher.add(model, f"first of {model}", [10], now_s=0.0)
        batcher.next(0.0)
        teach(batcher, model, a_s=0.0, b_s=0.01)
    for number in range(5):
        batcher.add("n", f"n{number}", [10], now_s=0.0)
    batcher.add("m", "far", [10], now_s=0.0, deadline_s=0.9)
    batcher.add("m", "near", [10], now_s=0.0, deadline_s=0.25)
    assert parts(batcher.next(0.0).batch) == {"near": [0]}


def test_a_deadline_that_cannot_be_met_is_nobodys_business():
    batcher = batcher_of(budget=10)
    batcher.add("m", "first", [10], now_s=0.0)
    teach(batcher, "m", a_s=0.0, b_s=0.01)
    batcher.add("m", "hopeless", [10], now_s=0.0, deadline_s=0.05)
    assert parts(batcher.next(0.0).batch) == {"first": [0]}


def test_deadlines_of_others_do_not_starve_who_has_none():
    """A caller whose calls are always near their deadline gets every other batch, not all."""
    batcher = batcher_of(budget=10)
    batcher.add("m", "x", [10], now_s=0.0)
    teach(batcher, "m", a_s=0.0, b_s=0.01)
    batcher.next(0.0)
    for number in range(10):
        batcher.add("m", f"patient{number}", [10], now_s=0.0)
    served = []
    for number in range(20):
        now_s = 0.1 * number
        batcher.add("m", f"urgent{number}", [10], now_s=now_s, deadline_s=now_s + 0.15)
        served += parts(batcher.next(now_s).batch)
    patient = [key for key in served if key.startswith("patient")]
    assert patient == [f"patient{number}" for number in range(10)]
    assert len(served) == 20
    assert served[0].startswith("urgent")


# -- admission -------------------------------------------------------------------------------------


def test_more_than_may_wait_is_refused_with_a_time_to_come_again():
    batcher = batcher_of(budget=100, max_waiting=1000)
    batcher.add("m", "a", [100] * 10, now_s=0.0)
    teach(batcher, "m", a_s=0.0, b_s=0.01)
    with pytest.raises(OverloadedError) as refused:
        batcher.add("m", "b", [100, 100], now_s=0.0)
    # Two of the ten batches that wait have to be computed first, a second each.
    assert refused.value.retry_after_s == pytest.approx(2.0)
    assert batcher.num_waiting_tokens == 1000
    assert batcher.counters.num_refused == 2
    batcher.next(0.0), batcher.next(0.0)
    batcher.add("m", "b", [100, 100], now_s=0.0)


def test_a_call_larger_than_what_may_wait_is_taken_when_nothing_waits():
    batcher = batcher_of(budget=100, max_waiting=50)
    batcher.add("m", "a", [100], now_s=0.0)
    with pytest.raises(OverloadedError):
        batcher.add("m", "b", [1], now_s=0.0)
    assert parts(batcher.next(0.0).batch) == {"a": [0]}


def test_what_was_learned_of_models_without_work_is_bounded():
    batcher = batcher_of()
    for number in range(1000):
        batcher.add(number, f"c{number}", [1], now_s=0.0)
        assert batcher.next(0.0).batch.model == number
    assert len(batcher._queues) <= 256


# -- what a batch takes ----------------------------------------------------------------------------


def test_the_cost_of_a_batch_is_learned():
    cost = CostModel()
    draw = random.Random(1)
    for _ in range(100):
        num_tokens = draw.randint(1, 1000)
        cost.learn(num_tokens, (0.004 + 0.00002 * num_tokens) * draw.uniform(0.95, 1.05))
    assert cost.a_s == pytest.approx(0.004, rel=0.1)
    assert cost.b_s == pytest.approx(0.00002, rel=0.1)


def test_what_was_learned_is_forgotten_when_the_machine_gets_faster():
    cost = CostModel()
    for scale in (5.0, 1.0):
        for number in range(200):
            cost.learn(1 + number % 50, scale * (0.004 + 0.001 * (1 + number % 50)))
    assert cost.expected_s(25) == pytest.approx(0.029, rel=0.02)


def test_a_stall_does_not_count_for_what_it_took():
    cost = CostModel()
    for number in range(100):
        cost.learn(10 + number % 10, 0.01)
    cost.learn(10, 60.0)
    assert cost.expected_s(10) < 0.02


def test_batches_of_one_size_keep_the_split_that_was_learned_before():
    cost = CostModel()
    for number in range(50):
        cost.learn(1 + number % 10, 0.004 + 0.001 * (1 + number % 10))
    for scale in (1.0, 2.0):
        for _ in range(300):
            cost.learn(5, scale * 0.009)
        assert cost.a_s == pytest.approx(scale * 0.004, rel=0.05)
        assert cost.b_s == pytest.approx(scale * 0.001, rel=0.05)


def test_nothing_is_guessed_of_a_model_that_computed_one_size_only():
    cost = CostModel()
    for _ in range(10):
        cost.learn(100, 0.1)
    assert cost.a_s == 0.0
    assert cost.expected_s(50) == pytest.approx(0.05)


# -- holding ---------------------------------------------------------------------------------------


@dataclass
class Simulation:
    """One compute thread that takes ``a + b * tokens``, a virtual clock, and calls of one input each."""

    a_s: float
    b_s: float
    max_delay_s: float
    tokens: int = 10
    budget: int = 10_000
    now_s: float = 0.0
    batcher: Batcher[int] = field(init=False)
    came_s: dict[int, float] = field(default_factory=dict)
    latency_s: dict[int, float] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.batcher = Batcher(
            max_batch_tokens=self.budget, max_delay_s=self.max_delay_s, max_waiting_tokens=1 << 30
        )

    def run(self, arrivals: list[float], *, think_s: float | None = None, end_s: float = float("inf")):
        """Run until all is computed. ``think_s``: who has an answer asks again so much later."""
        coming = [(time_s, number) for number, time_s in enumerate(arrivals)]
        heapq.heapify(coming)
        number = len(coming)
        batch, free_s, look_s = None, 0.0, None
        while coming or batch is not None or self.batcher.num_waiting_calls:
            times = [coming[0][0]] if coming else []
            times += [free_s] if batch is not None else ([] if look_s is None else [look_s])
            self.now_s = max(self.now_s, min(times))
            while coming and coming[0][0] <= self.now_s:
                time_s, key = heapq.heappop(coming)
                self.came_s[key] = time_s
                self.batcher.add("m", key, [self.tokens], now_s=self.now_s)
            if batch is not None and free_s <= self.now_s:
                self.batcher.done(batch, self.a_s + self.b_s * batch.num_tokens)
                for share in batch.shares:
                    self.latency_s[share.key] = self.now_s - self.came_s[share.key]
                    if think_s is not None and self.now_s + think_s < end_s:
                        # Answers are read one after the other.
                        delay_s = think_s + 0.0001 * len(coming)
                        heapq.heappush(coming, (self.now_s + delay_s, number))
                        number += 1
                batch = None
            if batch is None:
                turn = self.batcher.next(self.now_s)
                batch, look_s = turn.batch, turn.look_again_s
                if batch is not None:
                    free_s = self.now_s + self.a_s + self.b_s * batch.num_tokens
                    self.batch_sizes.append(batch.num_inputs)
        return self

    @property
    def mean_latency_s(self) -> float:
        return sum(self.latency_s.values()) / len(self.latency_s)


def bursts(count: int, *, size: int, gap_s: float, every_s: float) -> list[float]:
    """Return arrivals that come in bursts."""
    return [burst * every_s + number * gap_s for burst in range(count) for number in range(size)]


def test_calls_that_come_in_bursts_are_awaited_and_end_sooner_on_the_mean():
    arrivals = bursts(100, size=8, gap_s=0.0002, every_s=0.015)
    at_once = Simulation(0.005, 0.00001, 0.0).run(arrivals)
    held = Simulation(0.005, 0.00001, 0.002).run(arrivals)
    assert held.mean_latency_s < 0.85 * at_once.mean_latency_s
    assert len(held.batch_sizes) < 0.7 * len(at_once.batch_sizes)
    assert held.batcher.counters.num_held_batches > 50


def test_callers_who_wait_for_their_answers_get_more_of_them():
    """Eight callers ask again when they are answered; without holding the first one goes alone each time."""
    arrivals = [0.0001 * number for number in range(8)]
    at_once = Simulation(0.005, 0.00001, 0.0).run(arrivals, think_s=0.0005, end_s=2.0)
    held = Simulation(0.005, 0.00001, 0.002).run(arrivals, think_s=0.0005, end_s=2.0)
    assert len(held.latency_s) > 1.2 * len(at_once.latency_s)
    assert held.mean_latency_s < at_once.mean_latency_s


@pytest.mark.parametrize("every_s", [0.0052, 0.006, 0.02, 1.0])
def test_nothing_is_held_while_computing_one_by_one_keeps_up(every_s):
    arrivals = [number * every_s for number in range(300)]
    held = Simulation(0.005, 0.00001, 0.002).run(arrivals)
    assert held.batcher.counters.num_held_batches == 0
    assert all(latency_s == pytest.approx(0.0051) for latency_s in held.latency_s.values())


def test_a_lone_call_after_a_busy_time_is_not_held():
    busy = bursts(50, size=8, gap_s=0.0002, every_s=0.015)
    lone = [busy[-1] + 10.0 * number for number in range(1, 20)]
    simulation = Simulation(0.005, 0.00001, 0.002).run(busy + lone)
    assert simulation.batcher.counters.num_held_batches > 0
    for key in range(len(busy), len(busy) + len(lone)):
        assert simulation.latency_s[key] == pytest.approx(0.0051)


@pytest.mark.parametrize("load", [0.3, 0.9, 2.0, 5.0, 20.0])
def test_holding_does_no_harm_to_calls_that_come_at_random(load):
    """Poisson arrivals: there is nothing to gain, and nothing may be lost."""
    draw = random.Random(7)
    arrivals, time_s = [], 0.0
    for _ in range(4000):
        time_s += draw.expovariate(load / 0.0051)
        arrivals.append(time_s)
    at_once = Simulation(0.005, 0.00001, 0.0).run(arrivals)
    held = Simulation(0.005, 0.00001, 0.002).run(arrivals)
    assert held.mean_latency_s < 1.005 * at_once.mean_latency_s


def test_a_batch_is_never_held_longer_than_the_limit():
    arrivals = bursts(100, size=30, gap_s=0.0009, every_s=0.05)
    simulation = Simulation(0.02, 0.00001, 0.002).run(arrivals)
    counters = simulation.batcher.counters
    assert counters.num_held_batches > 0
    assert counters.held_s / counters.num_held_batches <= 0.002 + 1e-9


def ready_to_hold() -> Batcher[str]:
    """Return a batcher that has seen calls 0.2 ms apart of a model that takes 5 ms, and computes nothing."""
    batcher = batcher_of(budget=1000, max_delay_s=0.002)
    for number in range(20):
        batcher.add("m", f"c{number}", [10], now_s=0.0002 * number)
    batcher.next(0.0038)
    teach(batcher, "m", a_s=0.005, b_s=0.00001)
    return batcher


def test_a_batch_is_held_for_the_next_call_and_starts_when_that_does_not_come():
    batcher = ready_to_hold()
    batcher.add("m", "a", [10], now_s=0.004)
    turn = batcher.next(0.004)
    assert turn.batch is None
    assert turn.look_again_s == pytest.approx(0.004 + 1.25 * 0.0002)
    assert parts(batcher.next(turn.look_again_s).batch) == {"a": [0]}
    assert batcher.counters.held_s == pytest.approx(1.25 * 0.0002)


def test_a_batch_is_not_held_past_the_time_that_a_deadline_leaves():
    batcher = ready_to_hold()
    batcher.add("m", "a", [10], now_s=0.004, deadline_s=0.004 + 0.0051 + 0.0001)
    turn = batcher.next(0.004)
    assert turn.look_again_s is None or turn.look_again_s <= 0.0041 + 1e-9
    batcher = ready_to_hold()
    batcher.add("m", "a", [10], now_s=0.004, deadline_s=0.004 + 0.005)
    assert batcher.next(0.004).batch is not None


def test_a_batch_is_not_held_while_another_model_has_work():
    batcher = ready_to_hold()
    batcher.add("m", "a", [10], now_s=0.004)
    batcher.add("n", "b", [10], now_s=0.004)
    assert batcher.next(0.004).batch is not None


def test_a_full_batch_is_not_held():
    batcher = ready_to_hold()
    batcher.add("m", "a", [1000], now_s=0.004)
    assert batcher.next(0.004).batch is not None


def test_a_call_that_was_held_can_be_cancelled():
    batcher = ready_to_hold()
    batcher.add("m", "a", [10], now_s=0.004)
    assert batcher.next(0.004).batch is None
    batcher.cancel("a")
    turn = batcher.next(0.005)
    assert (turn.batch, turn.look_again_s) == (None, None)


def test_too_few_arrivals_tell_nothing():
    arrivals, cost = Arrivals(), CostModel()
    for num_tokens in (10, 20, 30, 40):
        cost.learn(num_tokens, 0.005 + 0.00001 * num_tokens)
    for number in range(8):
        arrivals.note(0.0002 * number, 10)
    assert arrivals.hold_s(0.0014, num_calls=1, cost=cost) == 0.0
    arrivals.note(0.0016, 10)
    assert arrivals.hold_s(0.0016, num_calls=1, cost=cost) > 0.0
