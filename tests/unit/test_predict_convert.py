"""Answers of the predict process as messages: what they hold, and that large ones leave others their turn."""

from __future__ import annotations

import asyncio
import struct

import pytest

from kvserve.v1 import predict_pb2 as pb
from server.predict.messages import CallStats, ModelInfo, Output, PredictAnswer, Task, TextItem
from server.predict.messages import Inputs as PlainInputs
from server.rpc.errors import ResponseTooLarge
from server.rpc.predict_convert import write_embed_response, write_response
from server.rpc.predict_read import PredictAsk

LABELS = tuple(f"label-{index}" for index in range(20))


def ask(*, top_k: int = 0) -> PredictAsk:
    return PredictAsk(
        model="m",
        version="",
        inputs=PlainInputs(texts=(TextItem("a"),)),
        request_id="r",
        inputs_path="texts",
        item_path="texts.items",
        top_k=top_k,
    )


def answer(*outputs: Output) -> PredictAnswer:
    return PredictAnswer(call_id=1, version="7", outputs=outputs, stats=CallStats(batch_size=3))


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


async def written(
    said: PredictAnswer, info: ModelInfo | None, *, top_k: int = 0, max_bytes: int = 1 << 22
) -> pb.PredictResponse:
    response = pb.PredictResponse()
    await write_response(response, ask(top_k=top_k), said, info, model="m", total_s=0.5, max_bytes=max_bytes)
    return response


async def count_turns(writing: asyncio.Task[object]) -> int:
    """Return how many turns of the event loop others had until it was done."""
    turns = 0
    while not writing.done():
        await asyncio.sleep(0)
        turns += 1
    await writing
    return turns


def outputs_of(count: int, num_values: int) -> list[Output]:
    return [
        Output(floats(*((index + label) % 97 / 97 for label in range(num_values)))) for index in range(count)
    ]


async def test_large_classification_leaves_others_their_turn() -> None:
    info = ModelInfo(task=Task.CLASSIFY, family="bert", labels=LABELS)
    small, large = (answer(*outputs_of(count, len(LABELS))) for count in (2, 500))
    assert await count_turns(asyncio.create_task(written(small, info))) <= 2
    assert await count_turns(asyncio.create_task(written(large, info))) > 30  # 10,000 scores


async def test_large_answers_of_other_tasks_leave_others_their_turn() -> None:
    tokens = Output(floats(*[0.5] * 100), tokens=tuple((0, i, i + 1, 0) for i in range(100)))
    for info, outputs in (
        (None, outputs_of(2000, 1)),
        (ModelInfo(task=Task.EMBED, family="bert"), outputs_of(2000, 4)),
        (ModelInfo(task=Task.REGRESS, family="bert"), outputs_of(2000, 2)),
        (ModelInfo(task=Task.CLASSIFY_TOKENS, family="bert", labels=LABELS), [tokens] * 20),
    ):
        assert await count_turns(asyncio.create_task(written(answer(*outputs), info))) > 5
    vectors = write_embed_response(
        pb.EmbedResponse(), ask(), answer(*outputs_of(2000, 4)), model="m", total_s=0.5
    )
    assert await count_turns(asyncio.create_task(vectors)) > 5


async def test_answer_in_pieces_is_whole_and_in_order() -> None:
    info = ModelInfo(task=Task.CLASSIFY, family="bert", labels=LABELS)
    outputs = outputs_of(500, len(LABELS))
    response = await written(answer(*outputs), info)
    assert len(response.predictions) == 500
    for output, prediction in zip(outputs, response.predictions, strict=True):
        scores = struct.unpack(f"<{len(LABELS)}f", output.values)
        said = prediction.classification
        assert [(score.label, score.score) for score in said.scores] == list(zip(LABELS, scores, strict=True))
        assert (said.label, said.score) == (LABELS[scores.index(max(scores))], max(scores))


async def test_answer_of_nothing_but_zeros_is_still_an_answer() -> None:
    zero = Output(floats(0.0))
    for info, output, kind in (
        (None, zero, "features"),
        (ModelInfo(task=Task.CLASSIFY, family="bert", labels=("",)), zero, "classification"),
        (ModelInfo(task=Task.CLASSIFY_TOKENS, family="bert", labels=("",)), Output(b""), "tokens"),
        (ModelInfo(task=Task.REGRESS, family="bert"), Output(b""), "regression"),
        (ModelInfo(task=Task.EMBED, family="bert"), Output(b""), "embedding"),
    ):
        response = await written(answer(output), info)
        parsed = pb.PredictResponse.FromString(response.SerializeToString())
        assert parsed.predictions[0].WhichOneof("output") == kind


async def test_answer_within_another_message_counts_as_written() -> None:
    outer = pb.StreamPredictResponse(request_id="r")
    said = answer(Output(floats(0.25), cache_hit=True, policy="main"))
    await write_response(outer.response, ask(), said, None, model="m", total_s=0.5, max_bytes=1 << 22)
    parsed = pb.StreamPredictResponse.FromString(outer.SerializeToString())
    assert parsed.WhichOneof("outcome") == "response"
    inner = parsed.response
    assert (inner.request_id, inner.model, inner.version, inner.policy) == ("r", "m", "7", "main")
    assert (inner.timings.total_s, inner.timings.batch_size) == (0.5, 3)
    assert inner.predictions[0].features.prediction == 0.25
    assert inner.predictions[0].cache_hit


async def test_answer_that_would_be_too_large_is_refused_before_it_is_written() -> None:
    info = ModelInfo(task=Task.CLASSIFY, family="bert", labels=LABELS)
    response = pb.PredictResponse()
    with pytest.raises(ResponseTooLarge):
        await write_response(
            response,
            ask(),
            answer(*outputs_of(100, len(LABELS))),
            info,
            model="m",
            total_s=0.5,
            max_bytes=10_000,
        )
    assert not response.predictions


async def test_error_takes_the_place_of_an_answer_that_was_written() -> None:
    outer = pb.StreamPredictResponse(request_id="r")
    said = answer(Output(floats(0.25)))
    await write_response(outer.response, ask(), said, None, model="m", total_s=0.5, max_bytes=1 << 22)
    outer.error.CopyFrom(pb.PredictError(message="too large"))
    parsed = pb.StreamPredictResponse.FromString(outer.SerializeToString())
    assert parsed.WhichOneof("outcome") == "error"
    assert parsed.ByteSize() < 30
