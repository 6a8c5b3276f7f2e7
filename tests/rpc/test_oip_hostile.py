"""What a hostile or careless client may send to the Open Inference Protocol: errors that name the field."""

from __future__ import annotations

import math
import struct
from typing import Any

import grpc
import pytest

from server.predict.errors import PredictLostError
from server.rpc.oip import open_inference_pb2 as pb
from tests.rpc.harness import ScriptedEngine, refused, serving
from tests.rpc.scripted_predict import ScriptedPredict
from tests.rpc.test_oip import SERVICE, infer, method, rest_of, stream

Code = grpc.StatusCode
Tensor = pb.ModelInferRequest.InferInputTensor
Wanted = pb.ModelInferRequest.InferRequestedOutputTensor
Parameter = pb.InferParameter
NAN, INF = math.nan, math.inf
ROW = struct.pack("<4f", 0, 1, 2, 3)


def joined(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def tensor(*shape: int, name: str = "text", datatype: str = "BYTES", **fields: Any) -> Any:
    return Tensor(name=name, datatype=datatype, shape=shape, **fields)


def texts(*shape: int, raw: bytes | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "inputs": [tensor(*shape, **fields)],
        "raw_input_contents": [joined(b"x") if raw is None else raw],
    }


def rows(*shape: int, raw: bytes = ROW, datatype: str = "FP32", **fields: Any) -> dict[str, Any]:
    one = tensor(*shape, name="features", datatype=datatype, **fields)
    return {"model_name": "risk", "inputs": [one], "raw_input_contents": [raw]}


def typed(*shape: int, name: str = "features", datatype: str = "FP32", **contents: Any) -> dict[str, Any]:
    model = "risk" if name == "features" else "sizes"
    one = tensor(*shape, name=name, datatype=datatype, contents=contents)
    return {"model_name": model, "inputs": [one]}


def parameters(**values: Any) -> dict[str, Any]:
    return texts(1) | {"parameters": {name: Parameter(**value) for name, value in values.items()}}


def outputs(*wanted: Any) -> dict[str, Any]:
    return texts(1) | {"outputs": wanted}


def classes(name: str = "scores", **value: Any) -> Any:
    return Wanted(name=name, parameters={"classification": Parameter(**value)})


# Each row: what differs from a good request, and the field that is at fault.
INFER: list[tuple[dict[str, Any], str]] = [
    *[
        (texts(*shape), "inputs[0].shape")
        for shape in (
            (), (0,), (-1,), (-1, -1), (2**63 - 1,), (-(2**63),), (2**32, 2**32), (1, 2), (1, 1, 1),
            (1,) * 100,
        )
    ],
    *[
        (rows(*shape), "inputs[0].shape")
        for shape in (
            (4,), (1, 0), (0, 4), (-1, 4), (1, 1, 4), (4096, 2**62), (2**32 + 1, 2**32 - 1), (4097, 4),
        )
    ],
    *[(rows(1, 4, raw=raw), "raw_input_contents") for raw in (b"", ROW[:-1], ROW + b"x", ROW * 2)],
    (rows(1, 4, datatype="FP64"), "raw_input_contents"),
    (rows(1, 3, raw=ROW[:-4]), "inputs[0].contents[0].values"),  # the model's own number
    *[(rows(1, 4, datatype=bad), "inputs[0].datatype") for bad in ("", "fp32", "INT32", "FP16", "BYTES")],
    *[(texts(1, datatype=bad), "inputs[0].datatype") for bad in ("", "STRING", "FP32")],
    *[(texts(1, name=bad), "inputs[0].name") for bad in ("", "TEXT", "../x", "x" * 1_000_000)],
    *[
        (texts(1, raw=raw), "inputs[0].contents")
        for raw in (
            b"", b"\1\0", b"\xff\xff\xff\xffx", struct.pack("<I", 2**31) + b"x",
            struct.pack("<I", 1) + b"xyz", joined(b"x") + b"\0", joined(b"x", b"y"), b"\0\0\0\0" * 500_000,
        )
    ],
    (texts(3), "inputs[0].contents"),
    *[(texts(1, raw=joined(bad)), "inputs[0].contents[0]") for bad in (b"\xff\xfe", b"\xed\xa0\x80")],
    (typed(1, name="text", datatype="BYTES", bytes_contents=[b"x", b"y"]), "inputs[0].contents"),
    (typed(1, name="text", datatype="BYTES", fp32_contents=[1]), "inputs[0].contents"),
    (typed(1, name="text", datatype="BYTES"), "inputs[0].contents"),
    (typed(1, 4, fp32_contents=[1] * 3), "inputs[0].contents"),
    (typed(1, 4, int_contents=[1] * 4), "inputs[0].contents"),
    (typed(1, 4, fp32_contents=[1] * 4, fp64_contents=[2] * 4), "inputs[0].contents"),
    (texts(1, contents={"bytes_contents": [b"other"]}), "inputs[0].contents"),
    (rows(1, 4, contents={"fp32_contents": [9] * 4}), "inputs[0].contents"),
    ({"inputs": []}, "inputs"),
    ({"inputs": [tensor(1)] * 9, "raw_input_contents": [joined(b"x")] * 9}, "inputs"),
    ({"inputs": [tensor(1)] * 2, "raw_input_contents": [joined(b"x")] * 2}, "inputs[1].name"),
    (texts(1, name="pair"), "inputs"),
    ({"inputs": [tensor(1), tensor(1, 4, name="features", datatype="FP32")],
      "raw_input_contents": [joined(b"x"), ROW]}, "inputs"),
    ({"inputs": [tensor(1), tensor(2, name="pair")],
      "raw_input_contents": [joined(b"x"), joined(b"y", b"z")]}, "inputs[1].shape"),
    ({"inputs": [tensor(1, name="pair"), tensor(1)],
      "raw_input_contents": [joined(b"x"), joined(b"x" * 101)]}, "inputs[1].contents[0].text"),
    ({"inputs": [tensor(1), tensor(1, name="pair")],
      "raw_input_contents": [joined(b"x"), joined(b"x" * 101)]}, "inputs[1].contents[0].pair"),
    (texts(1) | {"raw_input_contents": [joined(b"x")] * 2}, "raw_input_contents"),
    (texts(1, parameters={"shared_memory_region": Parameter(string_param="x")}), "inputs[0].parameters"),
    (rows(1, 4) | {"model_name": "sizes"}, "model_name"),
    (texts(1) | {"model_name": "risk"}, "model_name"),
    *[
        (texts(1) | {"model_name": bad}, "model_name")
        for bad in ("", "../x", "/etc", "a\0b", "a\u202e", "x" * 9999)
    ],
    *[(texts(1) | {"model_version": bad}, "model_version") for bad in ("..", "-1", "a/b", "x" * 9999)],
    *[(texts(1) | {"id": bad}, "id") for bad in ("a\0b", "a\nb", "a\u202eb", "\x1b[31m", "x" * 129)],
    (parameters(unheard_of={"bool_param": True}), "parameters"),
    (parameters(truncate={"string_param": "true"}), "parameters"),
    (parameters(truncate={}), "parameters"),
    (parameters(reuse={"int64_param": 1}), "parameters"),
    (parameters(timeout={"int64_param": -1}), "parameters"),
    (parameters(timeout={"string_param": "5"}), "parameters"),
    (outputs(Wanted(name="nothing")), "outputs"),
    (outputs(Wanted()), "outputs"),
    (outputs(*[Wanted(name=str(number)) for number in range(5000)]), "outputs"),
    *[(outputs(classes(int64_param=bad)), "outputs") for bad in (0, -1, 10_001, 2**63 - 1)],
    (outputs(classes(string_param="2")), "outputs"),
    (outputs(classes("label", int64_param=2)), "outputs"),
    (outputs(Wanted(name="scores", parameters={"shared_memory_region": Parameter()})), "outputs"),
]  # fmt: skip


def of(fields: dict[str, Any]) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(**{"model_name": "sizes", **fields})


@pytest.mark.parametrize(("fields", "field"), INFER, ids=lambda value: str(value)[:50])
async def test_bad_field_is_named(fields: dict[str, Any], field: str) -> None:
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        refusal = await refused(method(server, "ModelInfer")(of(fields)))
        assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, [field])
        call = stream(server)
        await call.write(of(fields))
        await call.write(infer("x", request_id="next"))
        await call.done_writing()
        bad, good = await rest_of(call)
        assert bad.error_message == refusal.message
        assert (good.error_message, good.infer_response.id) == ("", "next")
    assert server.front_end.num_active_calls == predict.num_open_calls == 0


async def test_unheard_parameter_cannot_write_into_a_terminal() -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        named = {"\x1b[31m\n" + "x" * 9999: Parameter(bool_param=True)}
        request = of(texts(1) | {"parameters": named})
        refusal = await refused(method(server, "ModelInfer")(request))
    assert refusal.message.isprintable()
    assert len(refusal.message) < 300


async def test_what_tritons_clients_add_means_nothing() -> None:
    added: dict[str, dict[str, Any]] = {
        "sequence_id": {"int64_param": 2**63 - 1},
        "sequence_start": {"bool_param": True},
        "sequence_end": {"bool_param": True},
        "priority": {"uint64_param": 2**64 - 1},
        "triton_enable_empty_final_response": {"bool_param": True},
        "timeout": {"uint64_param": 2**64 - 1},
    }
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        answer = await method(server, "ModelInfer")(of(parameters(**added)))
        await method(server, "ModelInfer")(of(parameters(timeout={"int64_param": 1_500_000})))
    assert [output.name for output in answer.outputs] == ["label", "score", "scores"]
    assert [asked.deadline_s is not None and asked.deadline_s <= 1.5 for asked in predict.asked] == [
        False,
        True,
    ]


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e300])
async def test_rows_go_as_they_are_to_the_model_that_judges_them(bad: float) -> None:
    """Whether a number is one, the model's process says; one too large for a float is infinite there."""
    predict = ScriptedPredict()
    values = [0.0, 1.0, 2.0, bad]
    async with serving(ScriptedEngine(), predict=predict) as server:
        for request in (
            rows(1, 4, raw=struct.pack("<4d", *values), datatype="FP64"),
            typed(1, 4, datatype="FP64", fp64_contents=values),
        ):
            await method(server, "ModelInfer")(of(request))
    sent = [struct.unpack("<4f", asked.inputs.rows)[3] for asked in predict.asked]
    assert [math.isfinite(number) for number in sent] == [False, False]


@pytest.mark.parametrize(
    ("name", "request_", "field"),
    [
        ("ModelReady", pb.ModelReadyRequest(), "name"),
        ("ModelMetadata", pb.ModelMetadataRequest(), "name"),
        ("ModelConfig", pb.ModelConfigRequest(), "name"),
        ("ModelStatistics", pb.ModelStatisticsRequest(version="1"), "version"),
        ("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="/etc"), "repository_name"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(), "model_name"),
        (
            "RepositoryModelLoad",
            pb.RepositoryModelLoadRequest(model_name="sizes", repository_name="/etc"),
            "repository_name",
        ),
        (
            "RepositoryModelLoad",
            pb.RepositoryModelLoadRequest(
                model_name="sizes",
                parameters={"file:1/model.pt": pb.ModelRepositoryParameter(bytes_param=b"x")},
            ),
            "parameters",
        ),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(), "model_name"),
    ],
)
async def test_question_about_nothing_in_particular_is_refused(name: str, request_: Any, field: str) -> None:
    """To unload a model without a name used to unload all of them."""
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        refusal = await refused(method(server, name)(request_))
    assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, [field])
    assert (predict.asked, predict.ops) == ([], [])


@pytest.mark.parametrize(
    "name",
    [
        "ModelReady",
        "ModelMetadata",
        "ModelConfig",
        "ModelStatistics",
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    ],
)
async def test_questions_while_the_process_starts_again_may_be_asked_again(name: str) -> None:
    """Some of them used to end INTERNAL, with a traceback in the log."""
    predict = ScriptedPredict(fails=PredictLostError("the models are being loaded", retry_after_s=0.5))
    request = getattr(pb, f"{name}Request")()
    if name.startswith("RepositoryModel"):
        request.model_name = "sizes"
    elif name != "RepositoryIndex":
        request.name = "sizes"
    async with serving(ScriptedEngine(), predict=predict) as server:
        refusal = await refused(method(server, name)(request))
        if name == "ModelStatistics":
            of_all = await refused(method(server, name)(pb.ModelStatisticsRequest()))
            assert of_all.code is Code.UNAVAILABLE
    assert (refusal.code, refusal.reason, refusal.retry_after_s) == (Code.UNAVAILABLE, "PREDICT_LOST", 0.5)


@pytest.mark.parametrize("raw", [b"\xff" * 40, b"\x0b" * 5000, b"\x0a\x03\xff\xfe\xfd", b"\x0a\x7fshort"])
@pytest.mark.parametrize("name", ["ModelInfer", "ModelReady", "ModelStatistics", "RepositoryModelUnload"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(raw: bytes, name: str) -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        refusal = await refused(server.channel.unary_unary(SERVICE + name)(raw))
    assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["request"])


async def test_bytes_that_are_no_message_end_a_stream_after_what_came_before() -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        call = stream(server)
        await call.write(infer("x", request_id="1"))
        await call.write(b"\xff" * 10)
        assert (await call.read()).infer_response.id == "1"
        refusal = await refused(call)
    assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["request"])


@pytest.mark.parametrize(
    "name",
    ["SystemSharedMemoryRegister", "CudaSharedMemoryStatus", "TraceSetting", "LogSettings", "Train"],
)
async def test_what_is_not_served_is_unimplemented(name: str) -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        refusal = await refused(server.channel.unary_unary(SERVICE + name)(b""))
    assert refusal.code is Code.UNIMPLEMENTED
