"""What the front end reads and writes of Predict by itself: limits, names of fields, sizes of answers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from kvserve.v1 import predict_pb2 as pb
from server.predict.errors import ComputeError, InputError, OverloadedError
from server.predict.messages import CallStats, ModelInfo, Output, PredictAnswer, Task, TextItem
from server.rpc import predict_read
from server.rpc.errors import InternalError, InvalidArgument, ResponseTooLarge
from server.rpc.predict_convert import write_embed_response, write_response
from server.rpc.predict_errors import error_from_predict, error_message, internal_error
from server.rpc.predict_read import MAX_TEXT_CHARS, read_embed, read_model_request, read_predict

LABELS = ("low", "high")


def fields_at_fault(read: Callable[[], object]) -> list[str]:
    with pytest.raises(InvalidArgument) as refused:
        read()
    return [violation.field for violation in refused.value.violations]


def texts(*items: dict[str, str], **fields: Any) -> pb.PredictRequest:
    return pb.PredictRequest(model="m", texts={"items": items}, **fields)


def rows(*values: list[float]) -> pb.PredictRequest:
    return pb.PredictRequest(model="m", features={"rows": [{"values": row} for row in values]})


async def answered(
    request: pb.PredictRequest, *outputs: Output, info: ModelInfo, max_bytes: int = 1 << 20
) -> pb.PredictResponse:
    response = pb.PredictResponse()
    await write_response(
        response,
        read_predict(request, max_inputs=1000),
        PredictAnswer(1, "1", outputs, CallStats()),
        info,
        model="m",
        total_s=0.0,
        max_bytes=max_bytes,
    )
    return response


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_a_text_of_a_mebichar_is_read_and_one_more_is_too_much() -> None:
    assert MAX_TEXT_CHARS == 1 << 20
    full, more = "x" * MAX_TEXT_CHARS, "x" * (MAX_TEXT_CHARS + 1)
    ask = read_predict(texts({"text": full, "pair": full}), max_inputs=1)
    assert len(ask.inputs.texts) == 1
    bad = texts({"text": "x"}, {"text": more}, {"text": "x", "pair": more})
    assert fields_at_fault(lambda: read_predict(bad, max_inputs=3)) == [
        "texts.items[1].text",
        "texts.items[2].pair",
    ]
    embed = pb.EmbedRequest(model="m", inputs=[{"text": more}])
    assert fields_at_fault(lambda: read_embed(embed, max_inputs=1)) == ["inputs[0].text"]


def test_what_was_not_asked_for_has_its_default() -> None:
    plain = read_predict(texts({"text": "x"}), max_inputs=1)
    assert (plain.truncate, plain.reuse, plain.top_k, plain.task) == (False, True, 1, None)
    said = read_predict(texts({"text": "x"}, options={"truncate": True}), max_inputs=1)
    assert (said.truncate, said.reuse, said.top_k) == (True, True, 1)
    other = read_predict(texts({"text": "x"}, options={"top_k": 2}), max_inputs=1)
    assert (other.truncate, other.reuse, other.top_k) == (False, True, 2)
    embed = read_embed(pb.EmbedRequest(model="m", inputs=[{"text": "x"}]), max_inputs=1)
    assert (embed.truncate, embed.reuse, embed.task) == (False, True, Task.EMBED)


def test_an_empty_second_text_is_a_pair_and_none_is_not() -> None:
    ask = read_predict(texts({"text": "x"}, {"text": "x", "pair": ""}), max_inputs=2)
    assert ask.inputs.texts == (TextItem("x", None), TextItem("x", ""))


def test_who_gives_no_request_id_gets_one_of_his_own() -> None:
    embed = pb.EmbedRequest(model="m", inputs=[{"text": "x"}])
    for read in (
        lambda: read_predict(texts({"text": "x"}), max_inputs=1),
        lambda: read_embed(embed, max_inputs=1),
    ):
        first, second = read().request_id, read().request_id
        assert first.startswith("req-")
        assert first != second
    embed.request_id = "mine"
    assert read_embed(embed, max_inputs=1).request_id == "mine"


def test_a_question_for_a_model_is_checked_before_anybody_is_asked() -> None:
    bad = pb.GetPredictModelRequest(model="../x", version="..")
    assert fields_at_fault(lambda: read_model_request(bad)) == ["model", "version"]
    read_model_request(pb.GetPredictModelRequest(model="m"))
    read_model_request(pb.GetPredictModelRequest(model="m", version="2"))


@pytest.mark.parametrize("width", [1, 31, 32, 33, 4096])
@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_rows_that_are_alike_are_cut_from_the_wire_and_not_read_one_by_one(width: int, num_rows: int) -> None:
    """The header that is looked for was never seen to be the right one: without it rows are read slowly."""
    features = rows(*[[float(row)] * width for row in range(num_rows)]).features
    found = predict_read._rows_of_wire(features, num_rows, width)
    assert found == b"".join(floats(*[float(row)] * width) for row in range(num_rows))


def test_rows_of_other_lengths_that_add_up_are_not_taken_for_rows_alike() -> None:
    uneven = rows([1.0, 2.0], [3.0], [4.0, 5.0, 6.0])
    assert fields_at_fault(lambda: read_predict(uneven, max_inputs=3)) == ["features.rows[1].values"]


def test_a_bad_input_is_named_by_its_place_and_what_of_it() -> None:
    def field(error: InputError, **paths: str) -> str:
        found = error_from_predict(error, **paths)
        assert isinstance(found, InvalidArgument)
        return found.violations[0].field

    paths = {"inputs": "texts", "item": "texts.items"}
    assert field(InputError("no", index=3, part="text"), **paths) == "texts.items[3].text"
    assert field(InputError("no", index=3), **paths) == "texts.items[3]"
    assert field(InputError("no", part="text"), **paths) == "texts"
    assert field(InputError("no", part="traffic_share")) == "traffic_share"


def test_an_error_in_a_stream_says_what_the_call_would_have() -> None:
    late = error_message(error_from_predict(OverloadedError("full", retry_after_s=2.5)))
    assert (late.reason, late.message, late.retry_after_s, late.field) == ("QUEUE_FULL", "full", 2.5, "")
    bad = error_message(error_from_predict(InputError("no", index=0), inputs="texts", item="texts.items"))
    assert (bad.field, bad.retry_after_s) == ("texts.items[0]", 0.0)
    broken = error_message(error_from_predict(ComputeError("not a number")))
    assert (broken.reason, broken.message) == ("NUMERICAL", "not a number")


def test_an_unexpected_error_is_found_in_the_log_by_the_request(caplog: pytest.LogCaptureFixture) -> None:
    known = internal_error(ValueError("of the inside"), request_id="r-7")
    assert isinstance(known, InternalError)
    assert known.message == "internal error; reference r-7"
    drawn = [internal_error(ValueError("of the inside")).message for _ in range(2)]
    assert drawn[0] != drawn[1]
    told = [message.removeprefix("internal error; reference ") for message in (known.message, *drawn)]
    assert [getattr(record, "request_id", None) for record in caplog.records] == told


async def test_labels_of_at_least_a_half_are_likely() -> None:
    info = ModelInfo(task=Task.CLASSIFY, family="f", labels=("a", "b", "c", "d"), multi_label=True)
    output = Output(floats(0.5, 0.4999, 0.75, 0.0))
    [prediction] = (await answered(texts({"text": "x"}), output, info=info)).predictions
    assert prediction.classification.label == "c"
    assert list(prediction.classification.labels) == ["a", "c"]


async def test_an_answer_that_is_too_large_is_refused_before_it_is_built() -> None:
    info = ModelInfo(task=Task.CLASSIFY, family="f", labels=LABELS * 500)
    output = Output(floats(*[0.5] * 1000))
    everything = texts({"text": "x"}, options={"top_k": 0})
    with pytest.raises(ResponseTooLarge, match="top_k"):
        await answered(everything, output, info=info, max_bytes=9_000)
    for top_k in (0, 1000):
        whole = await answered(texts({"text": "x"}, options={"top_k": top_k}), output, info=info)
        assert len(whole.predictions[0].classification.scores) == 1000
    [best] = (await answered(texts({"text": "x"}), output, info=info, max_bytes=9_000)).predictions
    assert len(best.classification.scores) == 1


async def test_an_answer_without_numbers_still_says_of_what_kind_it_is() -> None:
    for task, kind in ((Task.REGRESS, "regression"), (Task.EMBED, "embedding")):
        info = ModelInfo(task=task, family="f")
        [prediction] = (await answered(texts({"text": "x"}), Output(b""), info=info)).predictions
        assert prediction.WhichOneof("output") == kind


async def test_tokens_and_cuts_of_all_inputs_are_summed_up() -> None:
    ask = read_embed(pb.EmbedRequest(model="m", inputs=[{"text": "x"}] * 3), max_inputs=3)
    outputs = (
        Output(floats(1.0), 3),
        Output(floats(2.0), 5, truncated=True),
        Output(floats(3.0), 5, truncated=True),
    )
    answer = PredictAnswer(1, "7", outputs, CallStats())
    response = pb.EmbedResponse()
    await write_embed_response(response, ask, answer, model="m", total_s=0.0)
    assert (response.num_tokens, response.num_truncated, response.version) == (13, 2, "7")
    assert [list(vector.values) for vector in response.vectors] == [[1.0], [2.0], [3.0]]
