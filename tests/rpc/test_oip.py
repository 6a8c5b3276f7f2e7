"""The Open Inference Protocol over the wire: hostile requests, streams that end early, models that change."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import grpc
import msgspec
import pytest
from grpc import aio

from server.predict.errors import PredictLostError, UnknownModelError
from server.predict.messages import ModelStats, ModelStatus, PredictStats
from server.rpc.listener import ListenOptions
from server.rpc.oip import open_inference_pb2 as pb
from server.rpc.oip.service import MAX_IN_FLIGHT
from server.rpc.wire import varint
from tests.rpc.harness import ScriptedEngine, Server, refused, serving
from tests.rpc.scripted_predict import Asked, ScriptedPredict
from tests.rpc.test_predict_stream import Gates, until

Code = grpc.StatusCode
SERVICE = "/inference.GRPCInferenceService/"
Wanted = pb.ModelInferRequest.InferRequestedOutputTensor


def text_tensor(*texts: str) -> tuple[Any, bytes]:
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    return pb.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[len(texts)]), data


def infer(*texts: str, model: str = "sizes", request_id: str = "", **fields: Any) -> pb.ModelInferRequest:
    tensor, data = text_tensor(*texts)
    return pb.ModelInferRequest(
        model_name=model, id=request_id, inputs=[tensor], raw_input_contents=[data], **fields
    )


def method(server: Server, name: str) -> Any:
    response = {"ModelInfer": pb.ModelInferResponse}.get(name) or getattr(pb, f"{name}Response")
    return server.channel.unary_unary(
        SERVICE + name,
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=response.FromString,
    )


def stream(server: Server) -> Any:
    return server.channel.stream_stream(
        f"{SERVICE}ModelStreamInfer",
        request_serializer=lambda request: (
            request if isinstance(request, bytes) else request.SerializeToString()
        ),
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )()


async def rest_of(call: Any) -> list[pb.ModelStreamInferResponse]:
    answers = []
    while (answer := await call.read()) is not aio.EOF:
        answers.append(answer)
    return answers


async def test_output_that_is_asked_for_again_and_again_is_refused() -> None:
    """Each time used to be another copy of the tensor: a request of kilobytes made gigabytes."""
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        request = infer("x", outputs=[Wanted(name="scores")] * 1000)
        refusal = await refused(method(server, "ModelInfer")(request))
    assert refusal.code is Code.INVALID_ARGUMENT
    assert "outputs" in refusal.fields


async def test_answer_beyond_the_message_limit_says_so() -> None:
    listen = ListenOptions(port=0, max_message_bytes=20_000)
    async with serving(ScriptedEngine(), predict=ScriptedPredict(), listen=listen) as server:
        request = infer(*["x"] * 500, model="letters", request_id="large")
        refusal = await refused(method(server, "ModelInfer")(request))
        call = stream(server)
        await call.write(request)
        await call.write(infer("x", request_id="small"))
        await call.done_writing()
        large, small = await rest_of(call)
    assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE")
    assert "fewer" in large.error_message
    assert (small.error_message, small.infer_response.id) == ("", "small")


class Forgetful(ScriptedPredict):
    """Describes models as they were before they were loaded, as an answer that was kept does."""

    is_lost = False

    async def describe(self, model: str, version: str = "") -> ModelStatus:
        if self.is_lost:
            raise PredictLostError("the server is shutting down")
        return msgspec.structs.replace(await super().describe(model, version), info=None)


async def test_answer_is_told_though_the_description_is_from_before_the_load() -> None:
    """Asking whether a model is ready, then calling it at once, used to fail."""
    predict = Forgetful()
    async with serving(ScriptedEngine(), predict=predict) as server:
        answer = await method(server, "ModelInfer")(infer("x"))
        assert [output.name for output in answer.outputs] == ["label", "score", "scores"]
        predict.is_lost = True  # it drains: no more questions, and this answer is there
        again = await method(server, "ModelInfer")(infer("x"))
    assert again == answer


async def break_down(asked: Asked) -> None:
    if asked.inputs.texts[0].text == "poison":
        raise ZeroDivisionError("a secret of the inside")


async def test_request_that_breaks_something_is_answered_and_the_stream_goes_on() -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict(before=break_down)) as server:
        call = stream(server)
        for text in ("good", "poison", "fine"):
            await call.write(infer(text, request_id=text))
        await call.done_writing()
        good, poison, fine = await rest_of(call)
    assert [good.infer_response.id, poison.infer_response.id, fine.infer_response.id] == [
        "good",
        "poison",
        "fine",
    ]
    assert "internal error" in poison.error_message
    assert "secret" not in poison.error_message
    assert good.error_message == fine.error_message == ""


async def test_number_that_was_cut_is_refused_in_a_stream_too() -> None:
    contents = bytes([2 << 3 | 2]) + bytes([len(varint(2**40))]) + varint(2**40)  # packed int_contents
    tensor = (
        b"\x0a\x04text" + b"\x12\x05BYTES" + b"\x1a\x01\x01" + bytes([5 << 3 | 2, len(contents)]) + contents
    )
    raw = b"\x0a\x05sizes" + bytes([5 << 3 | 2, len(tensor)]) + tensor
    raw += pb.ModelInferRequest(raw_input_contents=[text_tensor("x")[1]]).SerializeToString()
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        call = stream(server)
        await call.write(raw)
        await call.write(infer("x", request_id="next"))
        await call.done_writing()
        cut, after = await rest_of(call)
    assert "32 bits" in cut.error_message
    assert (after.error_message, after.infer_response.id) == ("", "next")


async def test_stream_that_is_cancelled_leaves_nothing_running() -> None:
    predict = ScriptedPredict(before=Gates())
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = stream(server)
        for number in range(MAX_IN_FLIGHT // 2):
            await call.write(infer(str(number)))
        await until(lambda: predict.num_open_calls == MAX_IN_FLIGHT // 2)
        call.cancel()
        await until(lambda: predict.num_open_calls == 0)
        await until(lambda: server.front_end.num_active_calls == 0)
        assert predict.num_cancelled == MAX_IN_FLIGHT // 2


async def test_stream_answers_what_it_has_read_and_ends_when_the_server_drains() -> None:
    """It used to stay open for as long as the client liked, and was cut off in the end."""
    gates = Gates()
    predict = ScriptedPredict(before=gates)
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = stream(server)
        await call.write(infer("x", request_id="1"))
        await until(lambda: predict.num_open_calls == 1)
        stopping = asyncio.create_task(server.front_end.shut_down(grace_s=10))
        await until(lambda: predict.stopped_with is not None)
        gates["x"].set()
        answer = await call.read()
        assert answer.infer_response.id == "1"
        refusal = await refused(call)
        await stopping
    assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "DRAINING")


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("ModelInfer", infer("x", model="x" * 1_000_000)),
        ("ModelReady", pb.ModelReadyRequest(name="x" * 1_000_000)),
        ("ModelReady", pb.ModelReadyRequest(name="sizes", version="x" * 1_000_000)),
        ("ModelMetadata", pb.ModelMetadataRequest(name="../sizes")),
        ("ModelConfig", pb.ModelConfigRequest(name="../sizes")),
        ("ModelStatistics", pb.ModelStatisticsRequest(name="x" * 1_000_000)),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="x" * 1_000_000)),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="x" * 1_000_000)),
    ],
)
async def test_name_that_is_none_never_reaches_the_predict_process(name: str, request_: Any) -> None:
    predict = ScriptedPredict(fails=UnknownModelError("no such model is served here"))
    async with serving(ScriptedEngine(), predict=predict) as server:
        refusal = await refused(method(server, name)(request_))
    assert refusal.code is Code.INVALID_ARGUMENT
    assert refusal.fields.keys() <= {"name", "model_name", "version", "model_version"}
    assert (predict.asked, predict.ops) == ([], [])


async def test_statistics_of_an_alias_are_those_of_its_version() -> None:
    predict = ScriptedPredict()
    predict.catalogue[0] = msgspec.structs.replace(predict.catalogue[0], aliases=("stable",))
    counted = ModelStats(name="sizes", version="1", num_calls=10, num_failed=2, num_cancelled=3)
    predict.stats = PredictStats(models=(counted,))
    async with serving(ScriptedEngine(), predict=predict) as server:
        request = pb.ModelStatisticsRequest(name="sizes", version="stable")
        statistics = await method(server, "ModelStatistics")(request)
    [one] = statistics.model_stats
    assert (one.version, one.inference_stats.success.count, one.inference_stats.fail.count) == ("1", 5, 2)
