"""The predict host with its real threads, catalogue and model cache, and small numpy models."""

from __future__ import annotations

import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvcore.clock import MonotonicClock
from server.predict.deadlines import Deadlines
from server.predict.housekeeping import MAX_EVENTS, Housekeeper
from server.predict.messages import (
    CallFailed,
    CancelCall,
    ClearReuse,
    DescribeModel,
    EventKind,
    FailureKind,
    FromPredict,
    GetReuse,
    Inputs,
    ListModels,
    LoadModel,
    ModelList,
    ModelPhase,
    ModelStats,
    NumCleared,
    OneModel,
    OpDone,
    OpProgress,
    PredictAnswer,
    PredictCall,
    PredictOp,
    PredictStats,
    ReuseEvent,
    ReuseEvents,
    SetAlias,
    Task,
    TextItem,
    UnloadModel,
)
from server.predict.options import FeatureSpec, ModelSpec
from tests.predict_kit import (
    PATIENCE_S,
    Gate,
    HostKit,
    KitLoader,
    RowModel,
    WordModel,
    rows_of,
    texts_of,
    values_of,
)

ROW = rows_of([1, 1, 1, 1])


def ask(kit: HostKit, op: Any) -> Any:
    """Carry out an operation and return its result."""
    op_id = kit.new_id()
    kit.handle(PredictOp(op_id, op))
    done = kit.op(op_id)
    assert isinstance(done, OpDone), done
    return done.result


def refused(kit: HostKit, op: Any) -> tuple[FailureKind, str]:
    op_id = kit.new_id()
    kit.handle(PredictOp(op_id, op))
    failed = kit.op(op_id)
    return failed.kind, failed.reason


def status_of(kit: HostKit, model: str):
    return ask(kit, DescribeModel(model)).model


def stats_at_the_end(kit: HostKit) -> dict[str, ModelStats]:
    """Close the host and return what it counted, by model."""
    kit.host.close()
    kit.take_all()
    last = [message for message in kit.other if isinstance(message, PredictStats)][-1]
    assert (last.num_calls, last.num_waiting_inputs, last.num_waiting_tokens) == (0, 0, 0)
    return {model.name: model for model in last.models}


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(PATIENCE_S)
    left = {thread for thread in left if thread.is_alive()}
    assert not left, left


# -- answers ---------------------------------------------------------------------------------------


def test_rows_are_answered_in_their_order():
    with HostKit() as kit:
        answer = kit.answer(kit.call("rows", rows_of([1, 0, 0, 0], [0, 0, 0, 1], [2, 2, 2, 2])))
        assert values_of(answer) == [[1.0], [4.0], [20.0]]
        assert answer.version == "1"
        assert (answer.stats.batch_size, answer.stats.batch_tokens) == (3, 3)
        assert answer.stats.load_s > 0.0


@pytest.mark.parametrize("budget", [16, 1000])
def test_texts_are_answered_in_their_order_whatever_their_lengths(budget):
    loader = KitLoader(words=lambda: WordModel(executor="transformers"))
    texts = ["one", "one two three four five six seven", "one two", "", "one two three four five six", "a"]
    with HostKit("words", loader=loader, max_batch_tokens=budget) as kit:
        for asked in (texts, [" ".join(["x"] * count) for count in (9, 8, 10, 8, 11)]):
            answer = kit.answer(kit.call("words", texts_of(*asked)))
            assert [values[0] for values in values_of(answer)] == [len(text.split()) for text in asked]


def test_a_long_call_is_tokenized_in_pieces_and_computed_in_batches():
    texts = [" ".join(["word"] * (1 + number % 7)) for number in range(1000)]
    with HostKit(max_batch_tokens=100) as kit:
        answer = kit.answer(kit.call("words", texts_of(*texts)))
        assert [values[0] for values in values_of(answer)] == [1 + number % 7 for number in range(1000)]
        assert all(sum(batch) <= 100 for batch in kit.words.batches)
        assert [output.num_tokens for output in answer.outputs] == [3 + number % 7 for number in range(1000)]


def test_answers_do_not_depend_on_what_else_is_asked():
    """Many threads at once, batches as they fall: every answer is that of its own inputs."""
    draw = random.Random(3)
    asked = []
    for _ in range(400):
        if draw.random() < 0.5:
            rows = [[draw.randint(0, 9) for _ in range(4)] for _ in range(draw.choice([1, 1, 2, 70]))]
            asked.append(
                ("rows", rows_of(*rows), [[float(a + 2 * b + 3 * c + 4 * d)] for a, b, c, d in rows])
            )
        else:
            texts = [" ".join(["ab"] * draw.randint(1, 9)) for _ in range(draw.choice([1, 1, 3, 80]))]
            expected = [[float(len(text.split())), float(text.count("ab") * 2)] for text in texts]
            asked.append(("words", texts_of(*texts), expected))
    with HostKit(max_batch_tokens=50) as kit, ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda job: kit.call(job[0], job[1]), asked))
        for call_id, (_, _, expected) in zip(ids, asked, strict=True):
            assert values_of(kit.answer(call_id)) == expected
        assert max(kit.rows.batches) <= 50


def test_a_long_call_is_tokenized_in_turns_with_a_short_one():
    with HostKit(num_tokenizer_threads=1) as kit:
        kit.answer(kit.call("words", texts_of("a")))
        kit.words.tokenizing = Gate()
        long = kit.call("words", texts_of(*["word"] * 200))
        kit.words.tokenizing.wait_until_reached()
        short = kit.call("words", texts_of("word"))
        kit.words.tokenizing.open()
        kit.answer(long), kit.answer(short)
        assert kit.words.pieces == [1, 64, 1, 64, 64, 8]


def test_calls_that_wait_are_computed_together():
    gate = Gate()
    loader = KitLoader(rows=lambda: RowModel(gate=gate))
    with HostKit("rows", loader=loader) as kit:
        first = kit.call("rows", ROW)
        gate.wait_until_reached()
        others = [kit.call("rows", ROW) for _ in range(20)]
        gate.open()
        assert kit.answer(first).stats.batch_size == 1
        assert {kit.answer(call_id).stats.batch_size for call_id in others} == {20}


def test_where_the_time_went_is_told():
    gate = Gate()
    loader = KitLoader(words=lambda: WordModel(gate=gate))
    with HostKit("words", loader=loader) as kit:
        first = kit.call("words", texts_of("a"))
        gate.wait_until_reached()
        second = kit.call("words", texts_of("b"))
        gate.open()
        one, two = kit.answer(first).stats, kit.answer(second).stats
        assert one.load_s > 0.0
        assert two.load_s == 0.0
        assert two.queue_s >= 0.0
        assert one.compute_s > 0.0
        assert two.tokenize_s > 0.0


def test_a_share_of_calls_goes_to_the_canary():
    models = tuple(
        ModelSpec(name="rows", version=version, features=FeatureSpec(), canary=canary)
        for version, canary in (("1", None), ("2", 0.25))
    )
    loader = KitLoader(rows=RowModel)
    with VersionsKit(models, loader) as kit:
        versions = [kit.answer(kit.call("rows", ROW)).version for _ in range(400)]
        assert 60 < versions.count("2") < 140
        assert status_of(kit, "rows").version == "1"


class VersionsKit(HostKit):
    """A host with models given as they are."""

    def __init__(self, models, loader):
        self.models = models
        super().__init__(loader=loader)

    def specs(self, names, *, preload):
        return self.models


# -- what cannot be accepted -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (Inputs(), "at least one"),
        (Inputs(num_rows=-1), "at least one"),
        (Inputs(num_rows=1_000_000), "limit of 4096"),
        (Inputs(texts=(TextItem("a"),) * 5000), "limit of 4096"),
        (Inputs(texts=(TextItem("a"),), rows=b"\0" * 16, num_rows=1), "either"),
    ],
)
def test_a_number_of_inputs_that_makes_no_sense_is_refused(inputs, reason):
    with HostKit() as kit:
        failed = kit.failure(kit.call("rows", inputs))
        assert failed.kind is FailureKind.INPUT
        assert reason in failed.reason


def test_a_model_that_is_not_there_is_named_so():
    with HostKit() as kit:
        assert kit.failure(kit.call("nothing", ROW)).kind is FailureKind.UNKNOWN_MODEL
        call = PredictCall(99, "rows", "7", ROW)
        kit.handle(call)
        assert kit.failure(99).kind is FailureKind.UNKNOWN_MODEL


@pytest.mark.parametrize(
    ("model", "inputs", "task"),
    [
        ("rows", texts_of("a"), None),
        ("words", ROW, None),
        ("rows", ROW, Task.EMBED),
        ("words", texts_of("a"), Task.CLASSIFY),
    ],
)
def test_a_model_is_not_asked_for_what_it_does_not_do(model, inputs, task):
    with HostKit() as kit:
        assert kit.failure(kit.call(model, inputs, task=task)).kind is FailureKind.WRONG_TASK
        assert status_of(kit, model).num_running == 0


def test_the_input_at_fault_is_named_wherever_it_stands():
    texts = ["fine"] * 200
    texts[150] = "this is bad"
    with HostKit() as kit:
        failed = kit.failure(kit.call("words", texts_of(*texts)))
        assert (failed.kind, failed.index, failed.part) == (FailureKind.INPUT, 150, "text")
        wrong = Inputs(rows=b"\0" * 20, num_rows=1)
        assert kit.failure(kit.call("rows", wrong)).part == "values"
        assert kit.words.batches == []


# -- poison ----------------------------------------------------------------------------------------


def held_up(kit: HostKit, gate: Gate) -> int:
    """Let the compute thread be in a batch, so that what comes next comes together."""
    call_id = kit.call("rows", ROW)
    gate.wait_until_reached()
    return call_id


@pytest.mark.parametrize(
    ("poison", "kind", "index"),
    [
        (RowModel.RAISES, FailureKind.COMPUTE, 2),
        (RowModel.GIVES_NAN, FailureKind.COMPUTE, 2),
        (RowModel.BREAKS, FailureKind.INTERNAL, 2),
        (RowModel.NO_MEMORY, FailureKind.OVERLOADED, 2),
    ],
)
def test_only_the_call_with_the_poison_fails(poison, kind, index, caplog):
    gate = Gate()
    model = RowModel(gate=gate)
    with HostKit("rows", loader=KitLoader(rows=lambda: model)) as kit:
        first = held_up(kit, gate)
        before = [kit.call("rows", ROW) for _ in range(5)]
        culprit = kit.call("rows", rows_of([1, 1, 1, 1], [2, 1, 1, 1], [poison, 1, 1, 1], [3, 1, 1, 1]))
        after = [kit.call("rows", rows_of([0, 0, 0, 1], [0, 0, 1, 0])) for _ in range(5)]
        with caplog.at_level(logging.CRITICAL if kind is not FailureKind.INTERNAL else logging.ERROR):
            gate.open()
            failed = kit.failure(culprit)
        assert (failed.kind, failed.index) == (kind, index)
        for call_id in [first, *before]:
            assert values_of(kit.answer(call_id)) == [[10.0]]
        for call_id in after:
            assert values_of(kit.answer(call_id)) == [[4.0], [3.0]]
        if poison != RowModel.GIVES_NAN:
            # All together, then call by call, the culprit's also input by input up to the one at fault.
            assert model.batches == [1, 19, *[1] * 5, 4, 1, 1, 1, *[2] * 5]
        if kind is FailureKind.INTERNAL:
            assert "secret" not in failed.reason
            reference = failed.reason.split()[-1]
            assert any(getattr(record, "reference", "") == reference for record in caplog.records)
        if kind is FailureKind.OVERLOADED:
            assert failed.retry_after_s > 0
        counted = stats_at_the_end(kit)["rows"]
        assert (counted.num_calls, counted.num_failed, counted.num_inputs) == (12, 1, 1 + 5 + 10)


def test_numbers_that_are_not_finite_fail_one_of_many_single_calls():
    gate = Gate()
    with HostKit("rows", loader=KitLoader(rows=lambda: RowModel(gate=gate))) as kit:
        held_up(kit, gate)
        ids = [kit.call("rows", rows_of([RowModel.GIVES_NAN if i == 3 else 1, 1, 1, 1])) for i in range(8)]
        gate.open()
        assert kit.failure(ids.pop(3)).kind is FailureKind.COMPUTE
        assert [values_of(kit.answer(call_id)) for call_id in ids] == [[[10.0]]] * 7


class MiscountingModel(RowModel):
    def run(self, batch):
        return super().run(batch)[1:]


def test_a_model_that_loses_outputs_is_not_believed():
    with HostKit("rows", loader=KitLoader(rows=MiscountingModel)) as kit:
        assert kit.failure(kit.call("rows", rows_of([1, 1, 1, 1], [2, 2, 2, 2]))).kind is FailureKind.INTERNAL


class UntidyModel(WordModel):
    def prepare(self, inputs, *, truncate, reuse, tenant):
        if inputs.texts[0].text == "break":
            raise ZeroDivisionError("a secret of the inside")
        return super().prepare(inputs, truncate=truncate, reuse=reuse, tenant=tenant)[1:]


@pytest.mark.parametrize("text", ["break", "lose one"])
def test_a_model_that_fails_to_prepare_fails_the_call_and_nothing_else(text):
    with HostKit(loader=KitLoader(rows=RowModel, words=UntidyModel)) as kit:
        failed = kit.failure(kit.call("words", texts_of(text)))
        assert failed.kind is FailureKind.INTERNAL
        assert "secret" not in failed.reason
        assert status_of(kit, "words").num_running == 0
        kit.answer(kit.call("rows", ROW))


def test_a_host_that_breaks_fails_its_calls_and_looks_stuck_to_the_watchdog(monkeypatch):
    with HostKit("rows") as kit:
        kit.answer(kit.call("rows", ROW))

        def broken(now_s):
            raise RuntimeError("a mistake in the batcher")

        monkeypatch.setattr(kit.host._desk.batcher, "next", broken)
        assert kit.failure(kit.call("rows", ROW)).kind in (FailureKind.INTERNAL, FailureKind.LOST)
        assert kit.host.turn_started is not None
        assert kit.failure(kit.call("rows", ROW)).kind is FailureKind.LOST


# -- cancellation, at every stage ------------------------------------------------------------------


def assert_cancelled(kit: HostKit, call_id: int) -> None:
    failed = kit.failure(call_id)
    assert failed.kind is FailureKind.LOST
    assert "cancelled" in failed.reason


def test_a_call_is_cancelled_while_its_model_is_loaded():
    loader = KitLoader(rows=RowModel)
    gate = loader.gates["rows"] = Gate()
    with HostKit("rows", loader=loader) as kit:
        cancelled, kept = kit.call("rows", ROW), kit.call("rows", ROW)
        gate.wait_until_reached()
        kit.handle(CancelCall(cancelled))
        assert_cancelled(kit, cancelled)
        gate.open()
        kit.answer(kept)
        assert loader.made[0][1].batches == [1]
        assert status_of(kit, "rows").num_running == 0


def test_a_model_is_not_unloaded_under_the_tokenizer_of_a_cancelled_call():
    with HostKit() as kit:
        kit.answer(kit.call("words", texts_of("a")))
        kit.words.tokenizing = Gate()
        cancelled = kit.call("words", texts_of("a"))
        kit.words.tokenizing.wait_until_reached()
        kit.handle(CancelCall(cancelled))
        assert_cancelled(kit, cancelled)
        op_id = kit.new_id()
        kit.handle(PredictOp(op_id, UnloadModel("words")))
        assert kit.op(op_id).kind is FailureKind.MODEL_IN_USE
        kit.handle(PredictOp(kit.new_id(), UnloadModel("words", drain_s=20.0)))
        kit.words.tokenizing.open()
        kit.host.close()
        assert kit.words.is_closed
        assert kit.words.batches == [[3]]


def test_a_call_is_cancelled_while_it_waits_and_is_not_computed():
    gate = Gate()
    model = RowModel(gate=gate)
    with HostKit("rows", loader=KitLoader(rows=lambda: model)) as kit:
        first = held_up(kit, gate)
        cancelled, kept = kit.call("rows", rows_of([1, 1, 1, 1], [1, 1, 1, 1])), kit.call("rows", ROW)
        kit.handle(CancelCall(cancelled))
        kit.handle(CancelCall(cancelled))
        kit.handle(CancelCall(123456))
        assert_cancelled(kit, cancelled)
        gate.open()
        kit.answer(first), kit.answer(kept)
        assert model.batches == [1, 1]


def test_a_model_is_not_unloaded_while_it_computes_a_cancelled_call():
    gate = Gate()
    model = RowModel(gate=gate)
    with HostKit("rows", loader=KitLoader(rows=lambda: model)) as kit:
        cancelled = held_up(kit, gate)
        kit.handle(CancelCall(cancelled))
        assert_cancelled(kit, cancelled)
        assert status_of(kit, "rows").num_running == 1
        assert refused(kit, UnloadModel("rows"))[0] is FailureKind.MODEL_IN_USE
        op_id = kit.new_id()
        kit.handle(PredictOp(op_id, UnloadModel("rows", drain_s=20.0)))
        gate.open()
        assert isinstance(kit.op(op_id), OpDone)
        assert model.is_closed


# -- deadlines -------------------------------------------------------------------------------------


def test_a_deadline_passes_while_the_model_is_loaded():
    loader = KitLoader(rows=RowModel)
    gate = loader.gates["rows"] = Gate()
    with HostKit("rows", loader=loader) as kit:
        call_id = kit.call("rows", ROW, deadline_s=0.05)
        assert kit.failure(call_id).kind is FailureKind.EXPIRED
        gate.open()
        kit.answer(kit.call("rows", ROW))
        assert status_of(kit, "rows").num_running == 0


def test_a_deadline_passes_while_others_are_computed():
    gate = Gate()
    model = RowModel(gate=gate)
    with HostKit("rows", loader=KitLoader(rows=lambda: model)) as kit:
        first = held_up(kit, gate)
        late = kit.call("rows", ROW, deadline_s=0.05)
        assert kit.failure(late).kind is FailureKind.EXPIRED
        gate.open()
        kit.answer(first)
        assert model.batches == [1]


def test_a_deadline_that_has_passed_is_refused_at_once():
    with HostKit() as kit:
        assert kit.failure(kit.call("rows", ROW, deadline_s=0.0)).kind is FailureKind.EXPIRED
        assert kit.loader.made == []


def test_a_nearer_deadline_wakes_the_housekeeper_in_time(monkeypatch):
    monkeypatch.setattr("server.predict.housekeeping.STATS_INTERVAL_S", 1000.0)
    loader = KitLoader(rows=RowModel)
    gate = loader.gates["rows"] = Gate()
    with HostKit("rows", loader=loader) as kit:
        far = kit.call("rows", ROW, deadline_s=1000.0)
        near = kit.call("rows", ROW, deadline_s=0.02)
        assert kit.failure(near).kind is FailureKind.EXPIRED
        gate.open()
        kit.answer(far)


# -- loading ---------------------------------------------------------------------------------------


def test_calls_wait_for_one_load():
    loader = KitLoader(rows=RowModel)
    gate = loader.gates["rows"] = Gate()
    with HostKit("rows", loader=loader) as kit:
        ids = [kit.call("rows", ROW) for _ in range(50)]
        gate.wait_until_reached()
        gate.open()
        assert all(kit.answer(call_id).stats.load_s > 0 for call_id in ids)
        assert len(loader.made) == 1


def test_a_model_that_cannot_be_loaded_fails_its_calls_alone():
    loader = KitLoader(rows=RowModel)
    with HostKit("rows", "rowless", loader=loader) as kit:
        broken, fine = kit.call("rowless", ROW), kit.call("rows", ROW)
        assert kit.failure(broken).kind is FailureKind.MODEL_REFUSED
        kit.answer(fine)
        assert status_of(kit, "rowless").phase is ModelPhase.FAILED


def test_models_are_preloaded_and_one_that_fails_stops_nobody():
    with HostKit("rows", "broken", preload=True) as kit:
        phases = {status.name: status.phase for status in kit.ready.preloaded}
        assert phases == {"rows": ModelPhase.READY, "broken": ModelPhase.FAILED}
        assert kit.ready.num_models == 2
        assert kit.ready.num_threads >= 1
        assert kit.answer(kit.call("rows", ROW)).stats.load_s == 0.0


# -- overload --------------------------------------------------------------------------------------


def test_more_than_may_wait_is_refused_and_the_rest_is_answered():
    gate = Gate()
    with HostKit("rows", loader=KitLoader(rows=lambda: RowModel(gate=gate)), max_waiting_tokens=10) as kit:
        first = held_up(kit, gate)
        ids = [kit.call("rows", ROW) for _ in range(15)]
        failed = [kit.failure(call_id) for call_id in ids[10:]]
        assert {failure.kind for failure in failed} == {FailureKind.OVERLOADED}
        assert all(failure.retry_after_s > 0 for failure in failed)
        gate.open()
        kit.answer(first)
        assert [values_of(kit.answer(call_id)) for call_id in ids[:10]] == [[[10.0]]] * 10


def test_what_waits_for_a_model_counts_as_waiting():
    loader = KitLoader(words=WordModel)
    gate = loader.gates["words"] = Gate()
    with HostKit("words", loader=loader, max_waiting_tokens=100) as kit:
        ids = [kit.call("words", texts_of("x" * 80)) for _ in range(20)]
        assert kit.failure(ids[-1]).kind is FailureKind.OVERLOADED
        kit.handle(CancelCall(ids[0]))
        again = kit.call("words", texts_of("x" * 80))
        gate.open()
        kit.answer(again), kit.answer(ids[1])


# -- operations ------------------------------------------------------------------------------------


def test_models_are_listed_described_loaded_and_unloaded():
    with HostKit() as kit:
        listed = ask(kit, ListModels())
        assert isinstance(listed, ModelList)
        assert [(model.name, model.phase) for model in listed.models] == [
            ("rows", ModelPhase.UNLOADED),
            ("words", ModelPhase.UNLOADED),
        ]
        loaded = ask(kit, LoadModel("rows"))
        assert isinstance(loaded, OneModel)
        assert (loaded.model.phase, loaded.model.aliases) == (ModelPhase.READY, ("latest",))
        kit.answer(kit.call("rows", rows_of([1, 1, 1, 1], [1, 1, 1, 1])))
        assert (status_of(kit, "rows").num_inputs, status_of(kit, "rows").num_requests) == (2, 1)
        unloaded = ask(kit, UnloadModel("rows"))
        assert [model.phase for model in unloaded.models] == [ModelPhase.UNLOADED]
        assert kit.rows.is_closed
        assert kit.failure(kit.call("rows", ROW)).kind is FailureKind.MODEL_UNLOADED


def test_a_load_is_told_of_now_and_then_not_a_thousand_times():
    with HostKit() as kit:
        op_id = kit.new_id()
        kit.handle(PredictOp(op_id, LoadModel("rows")))
        assert isinstance(kit.op(op_id), OpDone)
        told = [message for message in kit.other if isinstance(message, OpProgress)]
        assert 1 <= len(told) < 50
        assert {message.op_id for message in told} == {op_id}
        assert {message.phase for message in told} <= {"", "reading"}
        assert told[0].status.phase is ModelPhase.LOADING


def test_a_lazy_load_is_answered_and_loads_nothing():
    with HostKit() as kit:
        assert ask(kit, LoadModel("rows", lazy=True)).model.phase is ModelPhase.UNLOADED
        assert kit.loader.made == []


def test_unloading_all_versions_of_a_model_ends_once_with_all_of_them():
    models = tuple(ModelSpec(name="rows", version=number, features=FeatureSpec()) for number in "123")
    with VersionsKit(models, KitLoader(rows=RowModel)) as kit:
        for number in "13":
            ask(kit, LoadModel("rows", number))
        unloaded = ask(kit, UnloadModel("rows")).models
        assert [(model.version, model.phase) for model in unloaded] == [
            (number, ModelPhase.UNLOADED) for number in "123"
        ]
        assert [model.is_closed for _, model in kit.loader.made] == [True, True]


def test_operations_that_cannot_be_done_say_why():
    with HostKit("rows", "words", "broken") as kit:
        assert refused(kit, DescribeModel("nothing"))[0] is FailureKind.UNKNOWN_MODEL
        assert refused(kit, UnloadModel("nothing"))[0] is FailureKind.UNKNOWN_MODEL
        assert refused(kit, LoadModel("broken"))[0] is FailureKind.MODEL_REFUSED
        assert refused(kit, SetAlias("rows", "canary", "9"))[0] is FailureKind.UNKNOWN_MODEL
        assert refused(kit, SetAlias("rows", "a/b", "1"))[0] is FailureKind.INPUT
        assert refused(kit, GetReuse("words"))[0] is FailureKind.WRONG_TASK
        assert refused(kit, ClearReuse("words"))[0] is FailureKind.WRONG_TASK


def test_an_alias_names_a_version():
    with HostKit() as kit:
        listed = ask(kit, SetAlias("rows", "stable", "1"))
        assert listed.models[0].aliases == ("latest", "stable")
        kit.handle(PredictCall(50, "rows", "stable", ROW))
        assert kit.answer(50).version == "1"


def test_a_model_that_is_not_loaded_reuses_nothing_yet():
    with HostKit() as kit:
        report = ask(kit, GetReuse("rows"))
        assert (report.model, report.version, report.kind, report.policies) == ("rows", "1", "features", ())
        assert ask(kit, ClearReuse("rows")) == NumCleared(0)


def test_events_of_reuse_are_passed_on_together():
    with HostKit() as kit:
        kit.answer(kit.call("rows", ROW))
        for number in range(100):
            kit.loader.on_reuse_event(ReuseEvent(kind=EventKind.ALARM, key=str(number)))
        seen: list[ReuseEvent] = []
        while len(seen) < 100:
            seen = [
                event for message in kit.other if isinstance(message, ReuseEvents) for event in message.events
            ]
            if len(seen) < 100:
                kit._take()
        assert [event.key for event in seen] == [str(number) for number in range(100)]
        assert {event.model for event in seen} == {"rows"}


def test_more_events_than_can_wait_are_counted_as_lost():
    said: list[FromPredict] = []
    housekeeper = Housekeeper(
        threading.Lock(),
        MonotonicClock(),
        deadlines=Deadlines(),
        expire=lambda calls: None,
        send=said.append,
        stats=PredictStats,
    )
    for number in range(MAX_EVENTS + 7):
        housekeeper.note_event(ReuseEvent(kind=EventKind.ALARM, key=str(number)))
    housekeeper.start()
    housekeeper.close()
    events = next(message for message in said if isinstance(message, ReuseEvents)).events
    assert len(events) == MAX_EVENTS + 1
    assert (events[-1].kind, events[-1].num_lost) == (EventKind.LOST, 7)


# -- counters and the end --------------------------------------------------------------------------


def test_counters_add_up():
    draw = random.Random(5)
    with HostKit(max_batch_tokens=40) as kit:
        kinds = []
        for _ in range(300):
            rows = [[1.0, 1.0, 1.0, 1.0]] * draw.randint(1, 5)
            if draw.random() < 0.1:
                rows[0] = [RowModel.RAISES, 0, 0, 0]
            call_id = kit.call("rows", rows_of(*rows))
            if draw.random() < 0.1:
                kit.handle(CancelCall(call_id))
            kinds.append((call_id, len(rows)))
        outcomes = [(kit.outcome(call_id), count) for call_id, count in kinds]
        answered = [count for outcome, count in outcomes if isinstance(outcome, PredictAnswer)]
        failed = [outcome for outcome, _ in outcomes if isinstance(outcome, CallFailed)]
        poisoned = [outcome for outcome in failed if outcome.kind is FailureKind.COMPUTE]
        counters = kit.host._desk.batcher.counters
        assert counters.num_added == counters.num_taken + counters.num_expired + counters.num_cancelled
        counted = stats_at_the_end(kit)["rows"]
        assert counted.num_calls == 300
        assert counted.num_failed == len(poisoned)
        assert counted.num_inputs == sum(answered)
        assert counted.num_tokens == counters.num_taken
        assert counted.num_batches == counters.num_batches
        assert counted.compute_s > 0


def test_statistics_are_sent_while_something_happens():
    with HostKit() as kit:
        kit.answer(kit.call("rows", ROW))
        stats = kit.wait_for(lambda message: isinstance(message, PredictStats) and bool(message.models))
        assert stats.models[0].is_loaded
        assert stats.models[0].num_bytes == 100
        assert (stats.num_loads, stats.num_bytes) == (1, 100)


def test_a_model_that_was_loaded_and_not_called_is_in_the_statistics():
    with HostKit("rows", preload=True) as kit:
        assert stats_at_the_end(kit)["rows"].is_loaded


def test_the_watchdog_sees_since_when_a_batch_runs():
    gate = Gate()
    with HostKit("rows", loader=KitLoader(rows=lambda: RowModel(gate=gate))) as kit:
        seen = [kit.host.turn_started]
        call_id = held_up(kit, gate)
        seen.append(kit.host.turn_started)
        gate.open()
        kit.answer(call_id)
        seen.append(kit.host.turn_started)
        assert [started is None for started in seen] == [True, False, True]


def test_open_calls_finish_when_the_host_drains():
    gate = Gate()
    with HostKit("rows", loader=KitLoader(rows=lambda: RowModel(gate=gate))) as kit:
        first, second = held_up(kit, gate), kit.call("rows", ROW)
        closing = threading.Thread(target=kit.host.close, kwargs={"drain_s": 20.0})
        closing.start()
        reason = ""
        while "shutting down" not in reason:
            late = kit.call("rows", ROW)
            kit.handle(CancelCall(late))
            reason = kit.failure(late).reason
        gate.open()
        closing.join()
        kit.answer(first), kit.answer(second)


def test_calls_that_do_not_finish_are_lost_when_the_host_closes():
    loader = KitLoader(rows=RowModel)
    gate = loader.gates["rows"] = Gate()
    with HostKit("rows", loader=loader) as kit:
        call_id = kit.call("rows", ROW)
        gate.wait_until_reached()
        closing = threading.Thread(target=kit.host.close)
        closing.start()
        assert kit.failure(call_id).kind is FailureKind.LOST
        gate.open()
        closing.join()
        assert kit.failure(kit.call("rows", ROW)).kind is FailureKind.LOST
        assert loader.made[0][1].is_closed


def test_no_lease_is_left_whatever_happened():
    draw = random.Random(11)
    with HostKit(max_batch_tokens=30, max_waiting_tokens=400) as kit, ThreadPoolExecutor(4) as pool:

        def one(number: int) -> int:
            model = "rows" if number % 2 else "words"
            inputs = rows_of([number, 1, 1, 1]) if number % 2 else texts_of("some words", "and more")
            if number % 17 == 0:
                inputs = rows_of([RowModel.BREAKS, 0, 0, 0]) if number % 2 else texts_of("bad")
            call_id = kit.call(model, inputs, deadline_s=draw.choice([None, 0.001, 5.0]))
            if number % 5 == 0:
                kit.handle(CancelCall(call_id))
            return call_id

        ids = list(pool.map(one, range(600)))
        for call_id in ids:
            kit.outcome(call_id)
        models = ask(kit, UnloadModel("rows", drain_s=20.0)).models
        models += ask(kit, UnloadModel("words", drain_s=20.0)).models
        assert [(model.phase, model.num_running) for model in models] == [(ModelPhase.UNLOADED, 0)] * 2
        kit.take_all()
        assert len(kit._ended) == 600
