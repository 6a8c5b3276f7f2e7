"""What a batch says of itself, and when who is refused shall come again."""

from __future__ import annotations

import pytest

from server.predict.batch import Batch
from server.predict.batcher import MAX_IDLE_MODELS, MAX_RETRY_S, MIN_RETRY_S, UNKNOWN_RETRY_S, Batcher
from server.predict.errors import OverloadedError


def batcher_of(*, budget: int = 100, max_waiting: int = 1 << 20) -> Batcher[str]:
    return Batcher(max_batch_tokens=budget, max_delay_s=0.0, max_waiting_tokens=max_waiting)


def learn(batcher: Batcher[str], model: str, *, b_s: float) -> None:
    for num_tokens in (10, 20, 40, 80):
        batcher.done(Batch(model, (), 1, num_tokens, 0), b_s * num_tokens)


def test_padding_is_told_where_the_executor_pads_and_nowhere_else() -> None:
    batcher = batcher_of()
    batcher.add("packed", "a", [2, 8, 10], now_s=0.0)
    batcher.add("padded", "b", [8, 9, 10], now_s=0.0, is_padded=True)
    packed, padded = batcher.next(0.0).batch, batcher.next(0.0).batch
    assert packed is not None
    assert padded is not None
    assert (packed.model, packed.num_tokens, packed.num_padding_tokens) == ("packed", 20, 0)
    assert (padded.model, padded.num_tokens, padded.num_padding_tokens) == ("padded", 27, 3)


@pytest.mark.parametrize(
    ("b_s", "retry_s"),
    [(0.0, UNKNOWN_RETRY_S), (1e-6, MIN_RETRY_S), (0.01, 0.5), (10.0, MAX_RETRY_S)],
    ids=["unknown", "at once", "half a backlog", "long"],
)
def test_who_is_refused_shall_come_again_when_there_is_room(b_s: float, retry_s: float) -> None:
    batcher = batcher_of(max_waiting=100)
    batcher.add("m", "a", [100], now_s=0.0)
    if b_s:
        learn(batcher, "m", b_s=b_s)
    with pytest.raises(OverloadedError) as refused:
        batcher.refuse_beyond(50)
    assert refused.value.retry_after_s == pytest.approx(retry_s)


def test_who_asks_for_more_than_all_there_is_shall_come_when_it_is_empty() -> None:
    batcher = batcher_of(max_waiting=100)
    batcher.add("m", "a", [100], now_s=0.0)
    learn(batcher, "m", b_s=0.01)
    with pytest.raises(OverloadedError) as refused:
        batcher.refuse_beyond(1000)
    assert refused.value.retry_after_s == pytest.approx(1.0)  # the backlog, and not nine times that


def test_a_model_that_is_loaded_anew_with_an_executor_that_pads_is_batched_so() -> None:
    batcher = batcher_of()
    for is_padded in (False, True, False):
        batcher.add("m", "a", [2, 8, 10], now_s=0.0, is_padded=is_padded)
        batch = batcher.next(0.0).batch
        while batch is not None:
            assert [share.longest > 0 for share in batch.shares] == [is_padded]
            batch = batcher.next(0.0).batch
    assert batcher.num_waiting_inputs == 0


def test_what_was_learned_is_kept_of_so_many_models_and_of_those_that_have_work() -> None:
    batcher = batcher_of()
    batcher.add("works", "call", [5], now_s=0.0)
    learn(batcher, "works", b_s=1.0)
    for number in range(2 * MAX_IDLE_MODELS):
        batcher.add(number, "other", [5], now_s=0.0)
        batcher.cancel("other")
        assert len(batcher._queues) <= MAX_IDLE_MODELS
    batcher.done(Batch("forgotten", (), 1, 5, 0), 1.0)
    assert batcher.expected_s("works", 5) == pytest.approx(5.0)
    assert batcher.expected_s("forgotten", 5) == 0.0
    batch = batcher.next(0.0).batch
    assert batch is not None
    assert batch.model == "works"
