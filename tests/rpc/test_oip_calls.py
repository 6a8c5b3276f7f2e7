"""The Open Inference Protocol over the wire: what a request asks for, and what a model says of itself."""

from __future__ import annotations

from typing import Any

import grpc
import msgspec
import pytest

from server.predict.messages import ModelPhase
from server.rpc.auth import parse_api_keys
from server.rpc.oip import open_inference_pb2 as pb
from tests.rpc.harness import ScriptedEngine, refused, serving
from tests.rpc.scripted_predict import RISK, SIZES, ScriptedPredict, status
from tests.rpc.test_oip import infer, method

Code = grpc.StatusCode


async def test_options_of_a_request_reach_the_model_and_none_are_made_up() -> None:
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = method(server, "ModelInfer")
        await call(infer("x"))
        options: dict[str, Any] = {
            "truncate": pb.InferParameter(bool_param=True),
            "reuse": pb.InferParameter(bool_param=False),
            "timeout": pb.InferParameter(int64_param=5_000_000),
        }
        await call(infer("x", parameters=options))
        await call(infer("x", parameters=options), timeout=2.0)
        await call(infer("x"), timeout=100.0)
    plain, asked, hurried, patient = predict.asked
    assert (plain.truncate, plain.reuse) == (False, True)
    assert plain.deadline_s is not None
    assert plain.deadline_s > 100.0  # the server's own
    assert (asked.truncate, asked.reuse) == (True, False)
    assert asked.deadline_s == pytest.approx(5.0)
    assert hurried.deadline_s is not None
    assert 0 < hurried.deadline_s < 4.0  # the nearer of the two
    assert patient.deadline_s is not None
    assert 5.0 < patient.deadline_s < 110.0


async def test_callers_are_kept_apart_by_their_keys() -> None:
    predict = ScriptedPredict()
    keys = parse_api_keys(
        [
            {"tenant": name, "key": f"{name}-key-0123456789", "scopes": ["predict"]}
            for name in ("alice", "bob")
        ]
    )
    async with serving(ScriptedEngine(), predict=predict, keys=keys) as server:
        for name in ("alice", "bob", "alice"):
            metadata = (("authorization", f"Bearer {name}-key-0123456789"),)
            await method(server, "ModelInfer")(infer("x"), metadata=metadata)
    first, second, again = (asked.tenant for asked in predict.asked)
    assert first == again != second


async def test_a_model_says_what_it_takes_and_gives() -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        found = await method(server, "ModelMetadata")(pb.ModelMetadataRequest(name="risk"))
        config = (await method(server, "ModelConfig")(pb.ModelConfigRequest(name="sizes"))).config
    assert (found.name, list(found.versions)) == ("risk", ["1"])
    assert [(each.name, each.datatype, list(each.shape)) for each in found.inputs] == [
        ("features", "FP32", [-1, RISK.num_features])
    ]
    assert [(each.name, each.datatype, list(each.shape)) for each in found.outputs] == [
        ("prediction", "FP32", [-1]),
        ("cache_hit", "BOOL", [-1]),
    ]
    assert [(each.name, list(each.dims), each.optional) for each in config.input] == [
        ("text", [1], False),
        ("pair", [1], True),
    ]
    assert [(each.name, list(each.dims)) for each in config.output] == [
        ("label", [1]),
        ("score", [1]),
        ("scores", [len(SIZES.labels)]),
    ]


@pytest.mark.parametrize(
    ("phase", "fields"),
    [(ModelPhase.FAILED, {"fault": "its weights are cut off"}), (ModelPhase.UNLOADED, {"held": True})],
)
async def test_a_model_that_nobody_may_load_by_asking_is_described_as_not_loaded(
    phase: ModelPhase, fields: dict[str, Any]
) -> None:
    gone = msgspec.structs.replace(status("gone", None), phase=phase, **fields)
    predict = ScriptedPredict([gone])
    async with serving(ScriptedEngine(), predict=predict) as server:
        ready = await method(server, "ModelReady")(pb.ModelReadyRequest(name="gone"))
        refusal = await refused(method(server, "ModelMetadata")(pb.ModelMetadataRequest(name="gone")))
    assert not ready.ready
    assert refusal.reason == "MODEL_NOT_LOADED"
    assert refusal.message == fields.get("fault", "the model is not loaded")
    assert predict.ops == []
