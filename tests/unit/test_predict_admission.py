"""What a call is admitted for is given back once, however it ends: the limit stays what it is."""

from __future__ import annotations

import pytest

from server.predict.messages import CancelCall, FailureKind, PredictAnswer
from tests.predict_kit import Gate, HostKit, RowModel, open_gate, rows_of, texts_of

ROW = [1.0, 1.0, 1.0, 1.0]
TEXT = "x" * 80
"""About 21 tokens before anybody has looked."""


def end_in_every_way(kit: HostKit) -> None:
    kit.answer(kit.call("rows", rows_of(ROW)))
    kit.answer(kit.call("rows", rows_of(ROW, ROW)))
    kit.answer(kit.call("words", texts_of(TEXT, TEXT)))
    for poison in (RowModel.RAISES, RowModel.GIVES_NAN, RowModel.NO_MEMORY, RowModel.BREAKS):
        kit.failure(kit.call("rows", rows_of([poison, 1.0, 1.0, 1.0])))
    kit.failure(kit.call("rows", rows_of([1.0])))
    kit.failure(kit.call("words", texts_of("a bad " + TEXT)))
    kit.failure(kit.call("nobody", texts_of(TEXT)))
    kit.failure(kit.call("words", texts_of(TEXT), deadline_s=0.0))
    late = kit.words.tokenizing = Gate()
    cancelled = kit.call("words", texts_of(TEXT))
    assert late.reached.acquire(timeout=20)
    kit.handle(CancelCall(cancelled))
    kit.failure(cancelled)
    expired = kit.call("words", texts_of(TEXT), deadline_s=0.02)
    assert kit.failure(expired).kind is FailureKind.EXPIRED
    kit.words.tokenizing = open_gate()
    late.open()


@pytest.mark.parametrize("num_rounds", [0, 1, 10])
def test_the_limit_is_what_it_was_however_calls_ended_before(num_rounds: int) -> None:
    with HostKit(max_waiting_tokens=100, num_tokenizer_threads=1) as kit:
        kit.answer(kit.call("words", texts_of("a word")))
        for _ in range(num_rounds):
            end_in_every_way(kit)
        kit.answer(kit.call("words", texts_of("a word")))
        gate = kit.words.tokenizing = Gate()
        ids = [kit.call("words", texts_of(TEXT)) for _ in range(6)]
        for refused in ids[4:]:
            assert kit.failure(refused).kind is FailureKind.OVERLOADED
        gate.open()
        assert [type(kit.outcome(admitted)) for admitted in ids[:4]] == [PredictAnswer] * 4


def test_the_limit_is_what_it_was_after_calls_that_the_reader_thread_has_computed() -> None:
    with HostKit("rows", is_settled=True, max_delay_s=0.0, max_waiting_tokens=10) as kit:
        for _ in range(50):
            computed = kit.call("rows", rows_of(ROW))
            kit.host.settle()
            kit.answer(computed)
        ids = [kit.call("rows", rows_of(ROW)) for _ in range(13)]
        for refused in ids[10:]:
            assert kit.failure(refused).kind is FailureKind.OVERLOADED
        kit.host.settle()
        assert [type(kit.outcome(admitted)) for admitted in ids[:10]] == [PredictAnswer] * 10
