"""What the predict host counts, and what it lets go of."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

from server.predict.messages import (
    CallFailed,
    CancelCall,
    Inputs,
    LoadModel,
    ModelStats,
    OpFailed,
    Output,
    PredictOp,
    PredictStats,
    TextItem,
    UnloadModel,
)
from server.predict.model import Prepared
from tests.predict_kit import Gate, HostKit, KitLoader, RowModel, WordModel, rows_of, texts_of

ROW = rows_of([1, 1, 1, 1])


class PaddingModel(WordModel):
    """Pads in pairs, however large a batch it is given, and counts it."""

    def __init__(self) -> None:
        super().__init__(executor="transformers")
        self.num_padding_tokens = 0

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        lengths = sorted(item.num_tokens for item in batch)
        for start in range(0, len(lengths), 2):
            pair = lengths[start : start + 2]
            self.num_padding_tokens += max(pair) * len(pair) - sum(pair)
        return super().run(batch)


def stats_of(kit: HostKit, name: str) -> ModelStats:
    """Return a model's figures, as they are at the end."""
    kit.host.close()
    kit.take_all()
    last = [message for message in kit.other if isinstance(message, PredictStats)][-1]
    return next(model for model in last.models if model.name == name)


def test_padding_is_what_the_model_says_that_it_padded_also_after_it_was_loaded_again():
    models: list[PaddingModel] = []

    def make() -> PaddingModel:
        models.append(PaddingModel())
        return models[-1]

    texts = texts_of("a", "a b", "a b c d", "a b c d e f g")
    with HostKit("words", loader=KitLoader(words=make)) as kit:
        kit.answer(kit.call("words", texts))
        for op in (UnloadModel("words"), LoadModel("words")):
            op_id = kit.new_id()
            kit.handle(PredictOp(op_id, op))
            kit.op(op_id)
        kit.answer(kit.call("words", texts))
        counted = stats_of(kit, "words")
    assert len(models) == 2
    assert counted.num_padding_tokens == sum(model.num_padding_tokens for model in models) > 0


def test_padding_of_a_model_that_does_not_count_it_is_that_of_its_batches():
    with HostKit(
        "words", loader=KitLoader(words=lambda: WordModel(executor="transformers")), max_delay_s=0.0
    ) as kit:
        kit.answer(kit.call("words", texts_of("a b c d", "a b c d")))
        assert stats_of(kit, "words").num_padding_tokens == 0


def test_cancelled_calls_are_told_apart_from_answered_ones():
    gate = Gate()
    with HostKit("rows", loader=KitLoader(rows=lambda: RowModel(gate=gate)), max_delay_s=0.0) as kit:
        first = kit.call("rows", ROW)
        gate.wait_until_reached()
        cancelled = kit.call("rows", ROW)
        kit.handle(CancelCall(cancelled))
        gate.open()
        kit.answer(first)
        counted = stats_of(kit, "rows")
    assert (counted.num_calls, counted.num_failed, counted.num_cancelled) == (2, 0, 1)


class Text(str):
    """A text that can be watched."""

    __slots__ = ("__weakref__",)


def test_call_that_ended_while_its_model_is_loaded_keeps_nothing():
    """A load takes minutes; calls that were given up meanwhile used to keep their inputs until its end."""
    loader = KitLoader(words=WordModel)
    gate = loader.gates["words"] = Gate()
    with HostKit("words", loader=loader) as kit:
        text = Text("some megabytes")
        gone = weakref.ref(text)
        call_id = kit.call("words", Inputs(texts=(TextItem(text),)))
        del text
        gate.wait_until_reached()
        assert gone() is not None
        kit.handle(CancelCall(call_id))
        assert isinstance(kit.outcome(call_id), CallFailed)
        gc.collect()
        assert gone() is None
        gate.open()


def test_versions_that_could_not_be_loaded_leave_nothing_behind():
    with HostKit("words") as kit:
        for number in range(5):
            op_id = kit.new_id()
            kit.handle(PredictOp(op_id, LoadModel(f"bad-{number}", source="nowhere")))
            assert isinstance(kit.op(op_id), OpFailed)
        assert [key.name for key in kit.host._cache._shelf.slots] == []
        assert [entry.key.name for entry in kit.host._catalogue.entries()] == ["words"]
