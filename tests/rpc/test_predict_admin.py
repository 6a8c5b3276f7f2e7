"""CacheAdmin over predict models: list, load, unload, aliases, and what reuse under drift costs."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import msgspec
import pytest
from grpc import aio

from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import predict_pb2 as predict_pb
from server.engine.fake import FakeEngine
from server.engine.model_slot import ModelSlot
from server.predict.errors import (
    InputError,
    ModelExistsError,
    ModelInUseError,
    ModelRefusedError,
    ModelTooLargeError,
    PredictLostError,
)
from server.predict.messages import (
    ClearReuse,
    EventKind,
    GetReuse,
    IntervalReport,
    LoadModel,
    ModelPhase,
    OpProgress,
    ReuseEvent,
    SetAlias,
    UnloadModel,
)
from server.rpc.auth import Authenticator, parse_api_keys
from server.rpc.errors import PermissionDenied
from server.rpc.oip import open_inference_pb2 as inference_pb
from server.rpc.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.rpc.harness import READY, ScriptedEngine, refused, serving
from tests.rpc.scripted_predict import POLICY, SIZES, ScriptedPredict, status

Code = grpc.StatusCode
COMMIT = "0123456789abcdef0123456789abcdef01234567"


async def rest_of(call: Any) -> list[Any]:
    messages = []
    while (message := await call.read()) is not aio.EOF:
        messages.append(message)
    return messages


async def test_the_list_has_the_generating_model_and_every_version() -> None:
    predict = ScriptedPredict(
        [
            status(
                "sizes",
                SIZES,
                aliases=("latest",),
                traffic_share=0.9,
                num_running=2,
                num_requests=7,
                idle_s=1.5,
                load_s=0.25,
            ),
            status("sizes", None, version="2", fault="its files are damaged"),
        ]
    )
    predict.catalogue[1] = msgspec.structs.replace(predict.catalogue[1], phase=ModelPhase.FAILED)
    async with serving(FakeEngine(ready=READY), predict=predict) as server:
        listed = await server.admin.ListModels(pb.ListModelsRequest())
    generating, first, second = listed.models
    assert (generating.name, generating.kind) == ("tiny", "generate")
    assert first == pb.ModelStatus(
        name="sizes",
        version="1",
        kind="predict",
        state=pb.MODEL_STATE_READY,
        task="classify",
        num_bytes=1000,
        aliases=["latest"],
        traffic_share=0.9,
        running_requests=2,
        num_requests=7,
        idle_s=1.5,
        load_s=0.25,
        source_kind="folder",
    )
    assert (second.version, second.state, second.fault) == (
        "2",
        pb.MODEL_STATE_FAILED,
        "its files are damaged",
    )
    assert not second.HasField("idle_s")
    assert (listed.predict_bytes, listed.predict_memory) == (1000, 5000)


async def test_loading_tells_how_it_goes() -> None:
    loading = msgspec.structs.replace(status("sizes", None), phase=ModelPhase.LOADING)
    predict = ScriptedPredict(
        progress=[
            OpProgress(1, loading, "fetching"),
            OpProgress(1, loading, "reading", 10, 100),
            status("sizes", SIZES, load_s=0.5),
        ]
    )
    source = f"hf:owner/name@{COMMIT}"
    async with serving(FakeEngine(ready=READY), predict=predict) as server:
        steps = await rest_of(
            server.admin.LoadModel(
                pb.LoadModelRequest(model="sizes", version="3", source=source, task="embed", pooling="cls")
            )
        )
    assert predict.ops == [LoadModel("sizes", "3", source, "embed", "cls")]
    assert [(step.phase, step.done_bytes, step.total_bytes, step.done) for step in steps] == [
        ("fetching", 0, 0, False),
        ("reading", 10, 100, False),
        ("", 0, 0, True),
    ]
    assert [step.status.state for step in steps] == [pb.MODEL_STATE_LOADING] * 2 + [pb.MODEL_STATE_READY]
    assert steps[-1].status.load_s == 0.5
    assert 0 <= steps[0].elapsed_s <= steps[-1].elapsed_s


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ModelRefusedError("config.json has auto_map"), Code.FAILED_PRECONDITION, "MODEL_REFUSED"),
        (ModelTooLargeError("it takes 2 GB of 1 GB"), Code.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE"),
        (ModelInUseError("it is used"), Code.FAILED_PRECONDITION, "MODEL_BUSY"),
        (PredictLostError("it is started again"), Code.UNAVAILABLE, "PREDICT_LOST"),
    ],
)
async def test_what_predict_refuses_has_its_status(error: Exception, code: Code, reason: str) -> None:
    predict = ScriptedPredict(progress=[OpProgress(1, status("sizes", None), "checking"), error])
    async with serving(FakeEngine(ready=READY), predict=predict) as server:
        admin = server.admin
        load = admin.LoadModel(pb.LoadModelRequest(model="sizes"))
        assert (await load.read()).phase == "checking"
        refusal = await refused(load)
        assert (refusal.code, refusal.reason, refusal.message) == (code, reason, str(error))
        predict.fails = error
        for call in (
            admin.ListModels(pb.ListModelsRequest()),
            admin.LoadModel(pb.LoadModelRequest(model="sizes")),
            admin.UnloadModel(pb.UnloadModelRequest(model="sizes")),
            admin.SetModelAlias(pb.SetModelAliasRequest(model="sizes", alias="canary", version="1")),
            admin.GetReuse(pb.GetReuseRequest(model="risk")),
            admin.ClearReuse(pb.ClearReuseRequest(model="risk")),
            admin.WatchReuse(pb.WatchReuseRequest(model="risk")),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (code, reason)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (InputError("is an alias", part="version"), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        (ModelExistsError("is another one", part="task"), Code.ALREADY_EXISTS, "MODEL_EXISTS"),
    ],
)
async def test_a_field_that_the_predict_process_refuses_is_named(
    error: InputError | ModelExistsError, code: Code, reason: str
) -> None:
    async with serving(FakeEngine(ready=READY), predict=ScriptedPredict(progress=[error])) as server:
        refusal = await refused(server.admin.LoadModel(pb.LoadModelRequest(model="sizes")).read())
    assert (refusal.code, refusal.reason, list(refusal.fields)) == (code, reason, [error.part])
    assert refusal.message == f"{error.part}: {error}"


async def test_a_server_without_predict_says_how_to_have_it() -> None:
    """It used to say that there is no such model, whichever was asked for."""
    item = inference_pb.ModelInferRequest(model_name="m")
    async with serving(FakeEngine(ready=READY)) as server:
        admin = server.admin
        inference = GRPCInferenceServiceStub(server.channel)
        stream = inference.ModelStreamInfer()
        await stream.write(item)
        for call in (
            admin.LoadModel(pb.LoadModelRequest(model="m")),
            admin.LoadModel(pb.LoadModelRequest(model="m", source="m")),
            admin.UnloadModel(pb.UnloadModelRequest(model="m")),
            admin.SetModelAlias(pb.SetModelAliasRequest(model="m", alias="canary", version="1")),
            admin.GetReuse(pb.GetReuseRequest(model="m")),
            admin.ClearReuse(pb.ClearReuseRequest(model="m")),
            admin.WatchReuse(pb.WatchReuseRequest(model="m")),
            server.predict.Predict(predict_pb.PredictRequest(model="m", texts={"items": [{"text": "x"}]})),
            server.predict.Embed(predict_pb.EmbedRequest(model="m", inputs=[{"text": "x"}])),
            inference.ModelReady(inference_pb.ModelReadyRequest(name="m")),
            inference.ModelMetadata(inference_pb.ModelMetadataRequest(name="m")),
            inference.RepositoryIndex(inference_pb.RepositoryIndexRequest()),
            inference.RepositoryModelLoad(inference_pb.RepositoryModelLoadRequest(model_name="m")),
            inference.ModelInfer(item),
            stream,
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_CONFIGURED")
            assert "predict is off" in refusal.message
            assert "--predict on" in refusal.message
        assert (await inference.ServerLive(inference_pb.ServerLiveRequest())).live
        assert not (await inference.ServerReady(inference_pb.ServerReadyRequest())).ready
        assert [model.name for model in (await admin.ListModels(pb.ListModelsRequest())).models] == ["tiny"]


async def test_a_caller_that_leaves_does_not_stay_with_the_load() -> None:
    class Waiting(ScriptedPredict):
        left = False

        async def load(self, op: LoadModel) -> Any:
            try:
                yield OpProgress(1, status("sizes", None), "reading", 1, 2)
                await asyncio.Event().wait()
            finally:
                self.left = True

    predict = Waiting()
    async with serving(FakeEngine(ready=READY), predict=predict) as server:
        load = server.admin.LoadModel(pb.LoadModelRequest(model="sizes"))
        first = await load.read()
        # Nothing happens, and it is said again, so that the caller sees that it goes on.
        again = await load.read()
        assert (first.phase, again.phase) == ("reading", "reading")
        assert again.elapsed_s > first.elapsed_s
        load.cancel()
        async with asyncio.timeout(60):
            while not predict.left:
                await asyncio.sleep(0.001)


async def test_names_decide_whose_model_it_is() -> None:
    slot = ModelSlot(lambda: FakeEngine(ready=READY))
    predict = ScriptedPredict()
    async with serving(slot, model_control=slot, predict=predict) as server:
        admin = server.admin
        unloaded = (
            await admin.UnloadModel(pb.UnloadModelRequest(model="sizes", drain={"seconds": 2}))
        ).status
        assert (unloaded.name, unloaded.state) == ("sizes", pb.MODEL_STATE_UNLOADED)
        assert (await admin.UnloadModel(pb.UnloadModelRequest())).status.name == "tiny"
        assert (await rest_of(admin.LoadModel(pb.LoadModelRequest(model="tiny"))))[-1].status.name == "tiny"
        assert predict.ops == [UnloadModel("sizes", "", 2.0)]
        for request, field in (
            (pb.LoadModelRequest(source="minilm"), "model"),
            (pb.LoadModelRequest(model="tiny", source="minilm"), "model"),
            (pb.LoadModelRequest(model="tiny", version="2"), "version"),
            (pb.UnloadModelRequest(version="2"), "version"),
        ):
            is_load = isinstance(request, pb.LoadModelRequest)
            call = admin.LoadModel(request) if is_load else admin.UnloadModel(request)
            refusal = await refused(call)
            assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, [field])
        assert len(predict.ops) == 1
        refusal = await refused(admin.UnloadModel(pb.UnloadModelRequest(model="nobody")))
        assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_aliases_route_traffic() -> None:
    predict = ScriptedPredict([status("sizes", SIZES), status("sizes", SIZES, version="2")])
    async with serving(FakeEngine(ready=READY), predict=predict) as server:
        answer = await server.admin.SetModelAlias(
            pb.SetModelAliasRequest(model="sizes", alias="canary", version="1", traffic_share=0.25)
        )
        await server.admin.SetModelAlias(pb.SetModelAliasRequest(model="sizes", alias="canary"))
    assert [(one.version, list(one.aliases)) for one in answer.versions] == [("1", ["canary"]), ("2", [])]
    assert predict.ops == [
        SetAlias("sizes", "canary", "1", traffic_share=0.25),
        SetAlias("sizes", "canary", "", traffic_share=None),
    ]


async def test_reuse_is_reported_whole() -> None:
    predict = ScriptedPredict()
    async with serving(FakeEngine(ready=READY), predict=predict) as server:
        answer = await server.admin.GetReuse(pb.GetReuseRequest(model="risk", version="1", max_keys=10))
        cleared = await server.admin.ClearReuse(pb.ClearReuseRequest(model="risk"))
    assert predict.ops == [GetReuse("risk", "1", 10), ClearReuse("risk", "")]
    assert cleared.num_entries == 42
    assert (answer.model, answer.version, answer.kind) == ("risk", "1", "features")
    [policy] = answer.policies
    # Field by field, by name: what one side has and the other does not, fails here.
    assert {field.name for field in policy.DESCRIPTOR.fields} == set(POLICY.__struct_fields__)
    for name in POLICY.__struct_fields__:
        if name not in ("risk", "keys"):
            assert getattr(policy, name) == getattr(POLICY, name), name
    risk = policy.risk
    assert (risk.num_compared, risk.over_budget, risk.proven_safe) == (103, True, False)
    intervals = (risk.changed, risk.cosine_distance, risk.l2)
    assert [(one.lower, one.estimate, one.upper, one.weight) for one in intervals] == [
        (0.01, 0.02, 0.03, 100.0),
        (0.1, 0.2, 0.3, 101.0),
        (0.4, 0.5, 0.6, 102.0),
    ]
    [key] = policy.keys
    assert (key.key, key.lifetime_s, key.stopped, key.num_hits, key.risk) == ("0a1b", 30.0, True, 13, risk)


async def test_events_of_reuse_are_told_as_they_happen() -> None:
    predict = ScriptedPredict()
    async with serving(FakeEngine(ready=READY), predict=predict) as server:
        everything = server.admin.WatchReuse(pb.WatchReuseRequest())
        of_risk = server.admin.WatchReuse(pb.WatchReuseRequest(model="risk"))
        for watch in (everything, of_risk):
            assert (await watch.read()).kind == pb.ReuseEvent.STARTED
        assert predict.num_watchers == 2
        of_risk.cancel()
        async with asyncio.timeout(60):
            while predict.num_watchers != 1:
                await asyncio.sleep(0.001)
        for kind in EventKind:
            predict.events.put_nowait(
                ReuseEvent(
                    kind=kind,
                    model="other",
                    version="2",
                    policy="main",
                    key="0a",
                    measure="l2",
                    interval=IntervalReport(1.0, 2.0, 3.0, 4.0),
                    limit=0.5,
                    lifetime_s=6.0,
                    num_lost=7,
                )
            )
            event = await everything.read()
            assert pb.ReuseEvent.Kind.Name(event.kind) == kind.name
            assert (event.model, event.version, event.policy, event.key) == ("other", "2", "main", "0a")
            assert (event.measure, event.interval.upper, event.limit) == ("l2", 3.0, 0.5)
            assert (event.lifetime_s, event.num_lost) == (6.0, 7)
        one = server.admin.WatchReuse(pb.WatchReuseRequest(model="risk"))
        everything.cancel()
        await one.read()
        for model in ("other", "risk"):
            predict.events.put_nowait(ReuseEvent(kind=EventKind.ALARM, model=model))
        assert (await one.read()).model == "risk"
        predict.events.put_nowait(None)
        assert (await refused(one)).code is Code.UNAVAILABLE


NAMES = ("a\0b", "../x", "/etc", "..%2f", "a b", "x" * 10_240, "a\u202e", "a\nb")
SOURCES = (
    "../x", "/etc/passwd", "a/../b", "a\0b", "..%2f", "~/x", "a\\b", "C:\\x", "file:///etc", "https://x.y/z",
    "models:/a/../b", "hf:../x@y", "x" * 1000, "a b", "\N{RIGHT-TO-LEFT OVERRIDE}x", "models://a",
)  # fmt: skip
ALIAS = {"model": "sizes", "alias": "canary", "version": "1"}
BAD: list[tuple[str, dict[str, Any], str]] = [
    *[("LoadModel", {"model": name}, "model") for name in NAMES],
    *[("LoadModel", {"model": "m", "version": bad}, "version") for bad in (*NAMES, "..", "a/b")],
    *[("LoadModel", {"model": "m", "source": bad}, "source") for bad in SOURCES],
    ("LoadModel", {"model": "a/b", "source": "x"}, "model"),
    ("LoadModel", {"model": "m", "source": "x", "task": "features"}, "task"),
    ("LoadModel", {"model": "m", "source": "x", "task": "x"}, "task"),
    ("LoadModel", {"model": "m", "source": "x", "pooling": "max"}, "pooling"),
    ("LoadModel", {"model": "m", "task": "embed"}, "task"),
    ("LoadModel", {"model": "m", "pooling": "cls"}, "pooling"),
    *[("UnloadModel", {"model": name}, "model") for name in NAMES],
    ("UnloadModel", {"model": "sizes", "version": "../1"}, "version"),
    ("UnloadModel", {"model": "sizes", "drain": {"seconds": -1}}, "drain"),
    ("UnloadModel", {"model": "sizes", "drain": {"seconds": 10**12}}, "drain"),
    ("SetModelAlias", ALIAS | {"model": ""}, "model"),
    ("SetModelAlias", ALIAS | {"alias": ""}, "alias"),
    *[("SetModelAlias", ALIAS | {"alias": bad}, "alias") for bad in NAMES],
    ("SetModelAlias", ALIAS | {"version": "a/b"}, "version"),
    *[
        ("SetModelAlias", ALIAS | {"traffic_share": bad}, "traffic_share")
        for bad in (-0.1, 1.1, float("nan"), float("inf"))
    ],
    ("SetModelAlias", ALIAS | {"alias": "latest", "traffic_share": 0.5}, "traffic_share"),
    ("SetModelAlias", ALIAS | {"version": "", "traffic_share": 0.5}, "traffic_share"),
    ("GetReuse", {"model": ""}, "model"),
    *[("GetReuse", {"model": "risk", "max_keys": bad}, "max_keys") for bad in (-1, 1001, 2**31 - 1)],
    ("GetReuse", {"model": "risk", "version": ".."}, "version"),
    ("ClearReuse", {"model": ""}, "model"),
    ("ClearReuse", {"model": "../x"}, "model"),
    ("WatchReuse", {"model": "../x"}, "model"),
]


@pytest.mark.parametrize(("method", "fields", "field"), BAD, ids=lambda value: ascii(value)[:50])
async def test_bad_field_is_named_and_nothing_is_done(
    method: str, fields: dict[str, Any], field: str
) -> None:
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        request = getattr(pb, f"{method}Request")(**fields)
        refusal = await refused(getattr(server.admin, method)(request))
    assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, [field])
    assert predict.ops == []


def test_every_method_has_the_scope_that_it_needs() -> None:
    keys = parse_api_keys(
        [
            {"tenant": scope, "key": f"{scope}-key-0123456789", "scopes": [scope]}
            for scope in ("generate", "predict", "admin")
        ]
    )
    authenticator = Authenticator(keys)
    oip = "/inference.GRPCInferenceService"
    wanted = {
        "/kvserve.v1.GenerateService/Generate": "generate",
        "/kvserve.v1.PredictService/Predict": "predict",
        "/kvserve.v1.PredictService/StreamPredict": "predict",
        "/kvserve.v1.CacheAdminService/LoadModel": "admin",
        "/kvserve.v1.CacheAdminService/GetReuse": "admin",
        **{
            f"{oip}/{method}": "predict"
            for method in ("ServerLive", "ServerReady", "ModelInfer", "ModelStreamInfer", "RepositoryIndex")
        },
        **{
            f"{oip}/{method}": "admin"
            for method in ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")
        },
    }
    for method, needed in wanted.items():
        for scope in ("generate", "predict", "admin"):
            metadata = (("authorization", f"Bearer {scope}-key-0123456789"),)
            if scope == needed:
                assert authenticator.authenticate(metadata, method).tenant == scope
            else:
                with pytest.raises(PermissionDenied, match=f"lacks the scope {needed}"):
                    authenticator.authenticate(metadata, method)


def test_a_key_without_scopes_may_generate_alone() -> None:
    [key] = parse_api_keys([{"tenant": "a", "key": "a-key-0123456789abc"}])
    assert key.scopes == {"generate"}
