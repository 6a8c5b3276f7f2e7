"""Administering the cache of an engine in a process of its own, and of a whole server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import cache_admin_pb2_grpc, generate_pb2
from server.engine.admin_messages import (
    AdminProgress,
    CacheEventKind,
    ClearCache,
    LookUpPrefix,
    PinPrefix,
    PinType,
    PrefixRef,
    ReadStats,
    SaveSnapshot,
    SnapshotDone,
)
from server.engine.errors import EngineUnavailableError
from server.engine.interface import EngineState
from server.engine.messages import FailureKind, Finished, Progress
from server.engine.options import EngineOptions
from server.engine.process import EngineProcess
from tests.e2e.server_process import SMALL, ServerProcess, server
from tests.fakes import spec_of

pytestmark = pytest.mark.timeout(180)
PROMPT = list(range(1, 65))
HERE = PrefixRef(token_ids=PROMPT)


@pytest.fixture
async def engine() -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(
        EngineOptions(model="fake", num_blocks=4096, max_batch_tokens=16), module="tests.small_desk"
    )
    await engine.start()
    yield engine
    await engine.stop(grace_s=0)
    assert (engine._desk.admin.num_open, engine._desk.admin.num_watchers) == (0, 0)


async def test_an_engine_process_carries_operations_out(engine: EngineProcess) -> None:
    events = [e async for ready in engine.submit(spec_of(PROMPT, 1, report_progress=True)) for e in ready]
    assert isinstance(events[-1], Finished)
    progress = [e.num_computed for e in events if isinstance(e, Progress)]
    assert progress == sorted(progress)
    assert progress[-1] == 64
    found = await engine.administer(LookUpPrefix(HERE))
    assert found.cached_block_tokens == 64  # type: ignore[union-attr]
    messages = [m async for m in engine.administer_with_progress(SaveSnapshot("s"))]
    assert messages[-1] == SnapshotDone(4, 400, 0)
    assert all(isinstance(message, AdminProgress) for message in messages[:-1])
    async with aclosing(engine.watch()) as watch:
        assert (await anext(watch)).events == []
        await engine.administer(PinPrefix(HERE, PinType.SOFT))
        [note] = (await anext(watch)).events
        assert (note.kind, note.num_blocks) == (CacheEventKind.PINNED, 4)
    cleared = await engine.administer(ClearCache())
    assert cleared.evicted_blocks == 4  # type: ignore[union-attr]


async def test_a_killed_engine_fails_its_operations_and_is_watched_again_when_it_is_back(
    engine: EngineProcess,
) -> None:
    async with aclosing(engine.watch()) as watch:
        before = await anext(watch)
        endless = asyncio.create_task(engine.administer(SaveSnapshot("endless")))
        await engine.administer(ReadStats())  # the one before it has begun
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineUnavailableError) as caught:
            await endless
        assert caught.value.kind is FailureKind.ENGINE_LOST
        with pytest.raises(EngineUnavailableError):
            await engine.administer(ReadStats())
        await engine.wait_state(EngineState.READY)
        after = await anext(watch)
        assert after.events == []
        assert after.epoch != before.epoch
        await engine.administer(ClearCache())
        assert [note.sequence for note in (await anext(watch)).events] == [1]


@pytest.fixture(scope="module")
def running() -> Iterator[ServerProcess]:
    with server("--port", "0", *SMALL) as process:
        yield process.wait_ready()


def test_a_served_model_is_unloaded_and_loaded_again(running: ServerProcess) -> None:
    first = running.engine()
    wanted = generate_pb2.GenerateRequest(
        text="The function returns", parameters={"max_new_tokens": 8, "ignore_eos": True}
    )
    with running.channel() as channel, running.stub() as generate:
        admin = cache_admin_pb2_grpc.CacheAdminServiceStub(channel)
        expected = generate.Generate(wanted, timeout=60).samples[0].token_ids
        [status] = admin.ListModels(pb.ListModelsRequest(), timeout=10).models
        assert (status.name, status.state) == ("builtin", pb.MODEL_STATE_READY)
        assert status.num_parameters > 3_000_000
        assert status.kv_bytes > 0
        unloaded = admin.UnloadModel(pb.UnloadModelRequest(drain={"seconds": 30}), timeout=60).status
        assert unloaded.state == pb.MODEL_STATE_UNLOADED
        assert not first.is_running()
        assert psutil.Process(running.process.pid).children() == []
        with pytest.raises(grpc.RpcError) as caught:
            generate.Generate(wanted, timeout=10)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        steps = list(admin.LoadModel(pb.LoadModelRequest(model="builtin"), timeout=120))
        assert {step.status.state for step in steps[:-1]} <= {pb.MODEL_STATE_LOADING}
        assert (steps[-1].done, steps[-1].status.state) == (True, pb.MODEL_STATE_READY)
        assert running.engine().pid != first.pid
        assert generate.Generate(wanted, timeout=60).samples[0].token_ids == expected
        statuses = running.health(channel)
        assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
        statuses.cancel()


def test_a_served_cache_is_seen_and_steered(running: ServerProcess) -> None:
    here = {"token_ids": {"ids": list(range(300, 364))}}
    with running.channel() as channel, running.stub() as generate:
        admin = cache_admin_pb2_grpc.CacheAdminServiceStub(channel)
        watch = admin.WatchCache(pb.WatchCacheRequest(kinds=[pb.CACHE_EVENT_KIND_PINNED]), timeout=120)
        watch.initial_metadata()
        *_, warmed = admin.WarmPrefix(
            pb.WarmPrefixRequest(prefix=here, pin=pb.PIN_KIND_SOFT, pin_lifetime={"seconds": 600}), timeout=60
        )
        assert (warmed.done, warmed.num_tokens, warmed.computed_tokens) == (True, 64, 64)
        pinned = next(watch)
        assert (pinned.prefix_id, pinned.num_blocks) == (warmed.prefix_id, 4)
        wanted = generate_pb2.GenerateRequest(parameters={"max_new_tokens": 4, "ignore_eos": True}, **here)  # type: ignore[arg-type]
        assert generate.Generate(wanted, timeout=60).usage.computed_prompt_tokens == 0
        page = admin.ListPrefixes(pb.ListPrefixesRequest(pinned=True), timeout=10)
        assert warmed.prefix_id in [entry.prefix_id for entry in page.prefixes]
        stats = admin.GetStats(pb.GetStatsRequest(), timeout=10)
        assert stats.pins.soft_blocks == 4
        assert stats.total.hits >= 1
        assert stats.bytes_per_block > 0
        assert admin.UnpinPrefix(pb.UnpinPrefixRequest(prefix=here), timeout=10).was_pinned
        assert admin.ClearCache(pb.ClearCacheRequest(), timeout=10).evicted_blocks >= 4
        assert generate.Generate(wanted, timeout=60).usage.computed_prompt_tokens == 64
        watch.cancel()
