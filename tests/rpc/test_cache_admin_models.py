"""Models that come and go while the server listens."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import generate_pb2
from server.engine.errors import EngineStartError
from server.engine.fake import FakeEngine
from server.engine.model_slot import ModelSlot
from tests.rpc.harness import READY, Server, refused, request, serving

Code = grpc.StatusCode
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ENDLESS = {"parameters": {"max_new_tokens": 1020, "ignore_eos": True}}


class Engines:
    """Makes engines that start when ``gate`` lets them, and fail to as often as told."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: list[Exception] = []
        self.num_made = 0
        self.step_s = 0.0

    def __call__(self) -> FakeEngine:
        outer = self
        self.num_made += 1

        class Gated(FakeEngine):
            async def start(self) -> None:
                await outer.gate.wait()
                if outer.failures:
                    raise outer.failures.pop()
                await super().start()

        return Gated(ready=READY, step_s=self.step_s)


async def rest_of(call: Any) -> list[Any]:
    """Read a stream to its end."""
    messages = []
    while (message := await call.read()) is not aio.EOF:
        messages.append(message)
    return messages


async def status(server: Server) -> pb.ModelStatus:
    models: pb.ListModelsResponse = await server.admin.ListModels(pb.ListModelsRequest())
    [model] = models.models
    return model


async def health(server: Server, service: str = "kvserve.v1.GenerateService") -> Any:
    return (await server.health.Check(health_pb2.HealthCheckRequest(service=service))).status


async def health_becomes(server: Server, wanted: Any) -> None:
    watch = server.health.Watch(health_pb2.HealthCheckRequest(service="kvserve.v1.GenerateService"))
    async for answer in watch:
        if answer.status == wanted:
            break
    watch.cancel()


async def test_unloading_and_loading_again() -> None:
    slot = ModelSlot(Engines())
    async with serving(slot, model_control=slot) as server:
        assert (await status(server)).state == pb.MODEL_STATE_READY
        unloaded = (await server.admin.UnloadModel(pb.UnloadModelRequest(model="tiny"))).status
        assert (unloaded.name, unloaded.state, unloaded.kv_bytes) == ("tiny", pb.MODEL_STATE_UNLOADED, 0)
        await health_becomes(server, NOT_SERVING)
        assert await health(server, "kvserve.v1.CacheAdminService") == SERVING
        for call in (
            server.stub.Generate(request()),
            server.stub.StreamGenerate(request()),
            server.stub.Tokenize(generate_pb2.TokenizeRequest(text="x")),
            server.stub.GetModelInfo(generate_pb2.GetModelInfoRequest()),
            server.admin.GetStats(pb.GetStatsRequest()),
            server.admin.ClearCache(pb.ClearCacheRequest()),
            server.admin.WarmPrefix(pb.WarmPrefixRequest(prefix={"text": "x"})),
            server.admin.SaveSnapshot(pb.SaveSnapshotRequest(name="x")),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "MODEL_NOT_LOADED")
            assert refusal.message == "the model is not loaded"
        steps = await rest_of(server.admin.LoadModel(pb.LoadModelRequest()))
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
        assert steps[-1].status.state == pb.MODEL_STATE_READY
        await health_becomes(server, SERVING)
        assert (await server.stub.Generate(request())).usage.generated_tokens > 0


async def test_loading_tells_how_it_goes_and_is_shared() -> None:
    engines = Engines()
    slot = ModelSlot(engines)
    async with serving(slot, model_control=slot, started=False) as server:
        assert (await status(server)).state == pb.MODEL_STATE_UNLOADED
        engines.gate.clear()
        first, second = (server.admin.LoadModel(pb.LoadModelRequest()) for _ in range(2))
        for call in (first, second):
            step = await call.read()
            assert (step.status.state, step.done) == (pb.MODEL_STATE_LOADING, False)
        refusal = await refused(server.stub.Generate(request()))
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "LOADING")
        refusal = await refused(server.admin.UnloadModel(pb.UnloadModelRequest()))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "MODEL_BUSY")
        first.cancel()
        engines.gate.set()
        assert (await rest_of(second))[-1].done
        assert engines.num_made == 1


async def test_a_load_that_fails_says_why_and_can_be_tried_again() -> None:
    engines = Engines()
    slot = ModelSlot(engines)
    async with serving(slot, model_control=slot, started=False) as server:
        engines.failures = [EngineStartError("/srv/x: not there"), EngineStartError("too little memory")]
        refusal = await refused(server.admin.LoadModel(pb.LoadModelRequest()))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "MODEL_LOAD_FAILED")
        assert refusal.message == "too little memory"
        failed = await status(server)
        assert (failed.state, failed.fault) == (pb.MODEL_STATE_FAILED, "too little memory")
        refusal = await refused(server.admin.LoadModel(pb.LoadModelRequest()))
        assert "srv" not in refusal.message
        assert (await rest_of(server.admin.LoadModel(pb.LoadModelRequest())))[-1].done
        assert (await status(server)).fault == ""


async def test_a_model_in_use_is_unloaded_when_its_requests_have_finished() -> None:
    engines = Engines()
    engines.step_s = 0.0005
    slot = ModelSlot(engines)
    async with serving(slot, model_control=slot) as server:
        running = server.stub.StreamGenerate(request(**ENDLESS))
        first = await running.read()
        refusal = await refused(server.admin.UnloadModel(pb.UnloadModelRequest()))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "MODEL_BUSY")
        assert (await status(server)).running_requests == 1
        unload = asyncio.ensure_future(server.admin.UnloadModel(pb.UnloadModelRequest(drain={"seconds": 60})))
        async with asyncio.timeout(60):
            while (draining := await status(server)).state == pb.MODEL_STATE_READY:
                await asyncio.sleep(0)
        assert draining.state == pb.MODEL_STATE_DRAINING
        refusal = await refused(server.stub.Generate(request()))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "MODEL_NOT_LOADED")
        events = [first, *await rest_of(running)]
        assert sum(len(event.token_ids) for event in events) == 1020
        assert (await unload).status.state == pb.MODEL_STATE_UNLOADED


async def test_an_unloading_goes_on_when_the_caller_leaves() -> None:
    engines = Engines()
    engines.step_s = 0.0005
    slot = ModelSlot(engines)
    async with serving(slot, model_control=slot) as server:
        running = server.stub.StreamGenerate(request(**ENDLESS))
        await running.read()
        unload = server.admin.UnloadModel(pb.UnloadModelRequest(drain={"seconds": 60}))
        async with asyncio.timeout(60):
            while (await status(server)).state == pb.MODEL_STATE_READY:
                await asyncio.sleep(0)
        unload.cancel()
        await rest_of(running)
        async with asyncio.timeout(60):
            while (await status(server)).state != pb.MODEL_STATE_UNLOADED:
                await asyncio.sleep(0)


async def test_metrics_follow_the_model() -> None:
    slot = ModelSlot(Engines())
    labels = {"model_name": "tiny"}
    async with serving(slot, model_control=slot) as server:
        assert server.sample("kvserve_engine_up", labels) == 1.0
        await server.admin.UnloadModel(pb.UnloadModelRequest())
        assert server.sample("kvserve_engine_up", labels) == 0.0
        assert server.sample("kvserve_kv_blocks", labels) is None
