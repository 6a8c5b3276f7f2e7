"""Requests that kill the process which computes them, and processes that are stopped: both services.

First over processes without models, which orders in the requests kill; then over a real server, where a
registered predictor kills, and for Generate the test itself does, while a certain request is in the engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import kvserve
from server.engine.interface import EngineState
from server.engine.messages import Admitted, Failed, FailureKind, Finished, GenerateSpec, Refused, Tokens
from server.engine.options import EngineOptions
from server.engine.process import EngineProcess
from server.engine.streams import EventStream
from server.predict.errors import PredictError, PredictLostError, QuarantinedError
from server.predict.interface import PredictState
from server.predict.messages import FailureKind as CallFailureKind
from server.predict.messages import Inputs, PredictAnswer
from server.predict.options import PredictOptions
from server.predict.process import PredictProcess
from server.process.child import ChildLimits
from tests.e2e.predict_server import PredictServer, predict_server
from tests.fakes import Poison, expected, spec_of
from tests.signals import stop_process

ENDLESS = 1_000_000


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


# ---- an engine without a model ----


def engine_of(**limits: float) -> EngineProcess:
    options = EngineOptions(model="fake", num_blocks=200_000)
    return EngineProcess(options, limits=ChildLimits(**limits), module="tests.fakes")


@pytest.fixture
async def engine() -> AsyncIterator[EngineProcess]:
    engine = engine_of(watchdog_s=1.0, heartbeat_s=0.1)
    await engine.start()
    yield engine
    await engine.stop(grace_s=0)


async def generate(engine: EngineProcess, spec: GenerateSpec) -> tuple[list[int], Any]:
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    events = [event async for ready in engine.submit(spec) for event in ready]
    return [t for e in events if isinstance(e, Tokens) for t in e.token_ids], events[-1]


async def test_a_request_that_kills_the_engine_twice_is_refused_and_no_loop_comes_of_it(
    engine: EngineProcess, caplog: pytest.LogCaptureFixture
) -> None:
    killer = spec_of([7, 7, Poison.KILL])
    for _ in range(2):
        _, last = await generate(engine, killer)
        assert (type(last), last.kind) == (Failed, FailureKind.ENGINE_LOST)
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    pid = engine.pid
    for seed in range(20):
        _, last = await generate(engine, spec_of([7, 7, Poison.KILL], seed=seed))
        assert (type(last), last.kind) == (Refused, FailureKind.QUARANTINED)
        spec = spec_of([7, 7, seed], 20)
        assert (await generate(engine, spec))[0] == expected(spec)
    assert (engine.pid, engine.num_restarts) == (pid, 2)
    counts = engine.quarantine
    assert (counts.num_quarantined, counts.num_refused, counts.num_suspects) == (1, 20, 0)
    [record] = [r for r in caplog.records if "is quarantined for 600 s" in r.message]
    assert record.levelno == logging.ERROR


async def test_whoever_was_beside_a_killer_is_answered_exactly_when_it_tries_again(
    engine: EngineProcess,
) -> None:
    async def persist(spec: GenerateSpec) -> tuple[list[int], Any]:
        while True:
            tokens, last = await generate(engine, spec)
            if isinstance(last, Finished) or last.kind is FailureKind.QUARANTINED:
                return tokens, last

    specs = [spec_of([k, k + 1], 40 + k) for k in range(40)]
    *results, (_, killed) = await asyncio.gather(
        *(persist(spec) for spec in specs), persist(spec_of([5, Poison.KILL]))
    )
    assert [tokens for tokens, _ in results] == [expected(spec) for spec in specs]
    assert killed.kind is FailureKind.QUARANTINED
    assert engine.num_restarts <= 3


async def test_a_request_that_hangs_the_engine_is_found_though_its_caller_never_waits(
    engine: EngineProcess,
) -> None:
    for times in (1, 2):
        await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
        async with engine.submit(spec_of([Poison.HANG])) as stream:
            assert isinstance((await anext(stream))[0], Admitted)
        await until(lambda times=times: engine.num_restarts == times)  # type: ignore[misc]
    _, last = await generate(engine, spec_of([Poison.HANG]))
    assert last.kind is FailureKind.QUARANTINED


async def kill_with_all_inside(engine: EngineProcess, streams: list[EventStream]) -> None:
    """Kill the engine when every stream has begun, and read them to their ends."""
    for stream in streams:
        await anext(stream)
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        async for _ in stream:
            pass


async def test_suspects_wait_for_their_turn_and_may_leave_or_be_cancelled_meanwhile(
    engine: EngineProcess,
) -> None:
    specs = [spec_of([k], ENDLESS) for k in range(1, 5)]
    streams = [engine.submit(spec) for spec in specs]
    await kill_with_all_inside(engine, streams)
    assert engine.quarantine.num_suspects == 4
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    # More tokens than at the death do not come of it: it is cut off before.
    first = engine.submit(spec_of([1], ENDLESS))
    cancelled, left, last = (engine.submit(spec_of([k], ENDLESS)) for k in (2, 3, 4))
    assert engine.quarantine.num_waiting == 3
    cancelled.cancel()
    assert [type(event) async for ready in cancelled for event in ready] == [Finished]
    await left.aclose()
    assert engine.quarantine.num_waiting == 1
    await anext(first)
    first.cancel()
    async for _ in first:
        pass
    assert isinstance((await anext(last))[0], Admitted)
    await last.aclose()


async def test_a_suspect_that_goes_on_past_its_point_lets_the_next_one_in(engine: EngineProcess) -> None:
    streams = [engine.submit(spec_of([k], ENDLESS)) for k in (1, 2)]
    await kill_with_all_inside(engine, streams)
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    streams = [engine.submit(spec_of([k], ENDLESS)) for k in (1, 2)]
    for stream in streams:
        await asyncio.wait_for(anext(stream), 60)  # the second though the first never ends
    for stream in streams:
        await stream.aclose()


async def test_a_crash_loop_without_requests_is_slowed_down_and_said(
    engine: EngineProcess, caplog: pytest.LogCaptureFixture
) -> None:
    pids = set()
    for times in (1, 2, 3):
        pid = engine.pid
        assert pid is not None
        pids.add(pid)
        os.kill(pid, signal.SIGKILL)
        await until(lambda times=times: engine.num_restarts == times)  # type: ignore[misc]
    assert len(pids) == 3
    said = [r.message for r in caplog.records if r.levelno == logging.CRITICAL]
    assert said == ["the engine process has died 3 times, each time within 30 s of its start"]
    assert not engine.quarantine.num_suspects
    spec = spec_of([1, 2], 10)
    assert (await generate(engine, spec))[0] == expected(spec)


async def test_an_engine_that_is_stopped_on_purpose_leaves_no_suspects() -> None:
    engine = engine_of()
    await engine.start()
    stream = engine.submit(spec_of([1], ENDLESS))
    await anext(stream)
    await engine.stop(grace_s=0)
    assert engine.quarantine.num_suspects == 0


# ---- a predict process without models ----


def predict_of(**limits: float) -> PredictProcess:
    return PredictProcess(PredictOptions(), limits=ChildLimits(**limits), module="tests.tiny_host")


@pytest.fixture
async def predict() -> AsyncIterator[PredictProcess]:
    process = predict_of(watchdog_s=1.0, heartbeat_s=0.1)
    await process.start()
    yield process
    await process.stop(grace_s=0)


def rows(number: int) -> Inputs:
    return Inputs(rows=number.to_bytes(4, "little"), num_rows=1)


async def ask(process: PredictProcess, model: str, number: int, **how: Any) -> int:
    await asyncio.wait_for(process.wait_state(PredictState.READY), 60)
    answer = await process.predict(model, rows(number), **how)
    return int.from_bytes(answer.outputs[0].values, "little")


async def test_a_call_that_kills_the_process_twice_is_refused_and_others_are_answered(
    predict: PredictProcess,
) -> None:
    for deadline_s in (None, 50.0):
        with pytest.raises(PredictLostError):
            await ask(predict, "kill", 1, deadline_s=deadline_s)
    await asyncio.wait_for(predict.wait_state(PredictState.READY), 60)
    pid = predict.pid
    asked = (ask(predict, "kill", 1) for _ in range(50))
    refused = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(error) for error in refused} == {QuarantinedError}
    assert [await ask(predict, "echo", k) for k in range(10)] == list(range(10))
    assert (predict.pid, predict.num_restarts) == (pid, 2)
    assert predict.quarantine.num_refused == 50


async def test_what_one_tenant_may_not_ask_again_others_may(predict: PredictProcess) -> None:
    for _ in range(2):
        with pytest.raises(PredictLostError):
            await ask(predict, "kill", 1, tenant="one")
    with pytest.raises(QuarantinedError):
        await ask(predict, "kill", 1, tenant="one")
    with pytest.raises(PredictLostError):
        await ask(predict, "kill", 1, tenant="two")


async def test_200_calls_beside_a_killer_are_answered_when_they_try_again(predict: PredictProcess) -> None:
    async def persist(model: str, number: int) -> int | QuarantinedError:
        while True:
            try:
                return await ask(predict, model, number)
            except PredictLostError:
                await asyncio.sleep(0.01)
            except QuarantinedError as error:
                return error

    kept = [asyncio.ensure_future(predict.predict("kept", rows(k))) for k in range(50)]
    first = asyncio.gather(*(persist("echo", k) for k in range(200)), persist("kill", 0))
    *answers, killed = await first
    assert answers == list(range(200))
    assert isinstance(killed, QuarantinedError)
    assert predict.num_restarts <= 3
    assert {type(error) for error in await asyncio.gather(*kept, return_exceptions=True)} == {
        PredictLostError
    }
    assert predict.num_open_calls == 0


async def test_a_call_that_hangs_the_process_is_found_though_its_caller_never_waits(
    predict: PredictProcess,
) -> None:
    for times in (1, 2):
        await asyncio.wait_for(predict.wait_state(PredictState.READY), 60)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(predict.predict("hang", rows(1)), 0.2)
        await until(lambda times=times: predict.num_restarts == times)  # type: ignore[misc]
    with pytest.raises(QuarantinedError):
        await ask(predict, "hang", 1)


async def test_a_call_whose_model_cannot_be_loaded_now_is_suspected_as_before(
    predict: PredictProcess,
) -> None:
    """It was let go as if it had been computed, and could kill twice more."""

    async def fail(kind: CallFailureKind) -> None:
        with pytest.raises(PredictError):
            await ask(predict, "fail", 1, version=kind.value)

    kinds = (CallFailureKind.MODEL_TOO_LARGE, CallFailureKind.MODEL_REFUSED, CallFailureKind.COMPUTE)
    hanging = asyncio.ensure_future(predict.predict("hang", rows(1)))
    while not predict.num_open_calls:
        await asyncio.sleep(0)
    await asyncio.gather(*map(fail, kinds))  # with the process when the watchdog ends it
    assert isinstance((await asyncio.gather(hanging, return_exceptions=True))[0], PredictLostError)
    assert predict.quarantine.num_suspects == 4
    for kind in kinds:
        await fail(kind)
    assert predict.quarantine.num_suspects == 3  # that one was computed


async def test_suspects_wait_in_turn_and_the_drain_waits_for_them(predict: PredictProcess) -> None:
    pid = predict.pid
    assert pid is not None
    kept = [asyncio.ensure_future(predict.predict("kept", rows(k))) for k in range(3)]
    await predict.models()
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait(kept)
    await asyncio.wait_for(predict.wait_state(PredictState.READY), 60)
    kept = [asyncio.ensure_future(predict.predict("kept", rows(k))) for k in range(3)]
    await predict.models()
    assert predict.quarantine.num_waiting == 2
    kept[1].cancel()
    await asyncio.wait(kept[1:2])
    assert predict.quarantine.num_waiting == 1
    releasing = [asyncio.ensure_future(predict.predict("release", rows(9)))]
    answers: list[PredictAnswer] = [await kept[0]]
    await predict.models()
    assert predict.quarantine.num_waiting == 0
    releasing.append(asyncio.ensure_future(predict.predict("release", rows(9))))
    stopping = asyncio.ensure_future(predict.stop(grace_s=60))
    answers += [await kept[2], *(await asyncio.gather(*releasing))]
    assert [int.from_bytes(answer.outputs[0].values, "little") for answer in answers] == [0, 2, 9, 9]
    await stopping


async def test_a_stopped_process_is_replaced_long_before_one_that_is_silent_at_work() -> None:
    process = predict_of(silence_s=1.5, busy_silence_s=60.0, heartbeat_s=0.1)
    await process.start()
    pid = process.pid
    assert pid is not None
    assert await ask(process, "grip", 3) == 3
    assert process.pid == pid
    stop_process(pid)
    with pytest.raises(PredictLostError):
        await asyncio.wait_for(process.predict("echo", rows(1)), 30)
    assert await ask(process, "echo", 4) == 4
    assert "it does nothing" in (process.fault or "")
    await process.stop(grace_s=0)


# ---- a real server ----

KILLER = """
import os
import numpy as np
from server.predict.reuse.predictor import Predictor

class Encoder:
    def encode(self, rows):
        if (rows[:, 0] == 666.0).any():
            os._exit(17)
        return rows.copy()

class Head:
    def predict(self, encodings, rows):
        return np.clip(encodings.mean(axis=1), 0.0, 1.0).astype(np.float32)

def make():
    return Predictor(num_features=4, num_dimensions=4, encoder=Encoder(), head=Head())
"""
DEADLY = np.array([[666.0, 0, 0, 0]], dtype=np.float32)
HARMLESS = np.array([[0.25, 0.5, 0.75, 0.5], [0.125, 0, 0, 0]], dtype=np.float32)
WANTED = [0.5, 0.03125]
LONG: Any = {"max_new_tokens": 900, "ignore_eos": True}
PROMPT = "The function returns"
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PredictServer]:
    folder = tmp_path_factory.mktemp("killer")
    (folder / "killer_encoder.py").write_text(KILLER)
    installed = folder / "killer_encoder-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: killer-encoder\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[kvserve.predictors]\nkiller = killer_encoder:make\n")
    catalogue = folder / "models.yaml"
    features = {"predictor": "killer", "prefix": 4}
    catalogue.write_text(yaml.safe_dump({"models": [{"name": "risk", "features": features}]}))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    with predict_server(
        "--predict-models", str(catalogue), "--silence", "2s", environment={"PYTHONPATH": path}
    ) as running:
        yield running


@pytest.fixture
async def client(running: PredictServer) -> AsyncIterator[kvserve.AsyncClient]:
    async with running.client() as client:
        yield client


Answer = TypeVar("Answer")


async def once_up(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Repeat a call that harms nobody until the process behind it is there again."""
    async with asyncio.timeout(100):
        while True:
            try:
                return await call()
            except kvserve.Unavailable:
                await asyncio.sleep(0.05)


@contextmanager
def health_of(running: PredictServer, service: str) -> Iterator[Any]:
    """Watch a service's health: each change."""
    with running.process.channel() as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=100)
        yield watch
        watch.cancel()


async def features_of(client: kvserve.AsyncClient, features: Any) -> list[float]:
    return [one.prediction for one in await client.predict_features(features, model="risk", reuse=False)]


async def test_a_row_that_kills_predict_twice_is_refused_and_the_process_stays_up(
    running: PredictServer, client: kvserve.AsyncClient
) -> None:
    for _ in range(2):
        assert await once_up(lambda: features_of(client, HARMLESS)) == WANTED
        with pytest.raises(kvserve.Unavailable) as lost:
            await features_of(client, DEADLY)
        assert lost.value.reason == "PREDICT_LOST"
    assert await once_up(lambda: features_of(client, HARMLESS)) == WANTED
    pid = running.process.predict().pid
    for _ in range(3):
        with pytest.raises(kvserve.Internal) as refused:
            await features_of(client, DEADLY)
        assert (refused.value.reason, refused.value.retry_after_s) == ("QUARANTINED", None)
        cause: Any = refused.value.__cause__
        assert ("grpc-retry-pushback-ms", "-1") in tuple(cause.trailing_metadata())
        assert await features_of(client, HARMLESS) == WANTED
    assert running.process.predict().pid == pid
    assert running.count("quarantined_requests_total", process="predict") == 1
    assert running.count("quarantine_refusals_total", process="predict") == 3
    assert running.count("process_restarts_total", process="predict") == 2
    assert running.count("process_restarts_total", process="engine") == 0


async def test_a_generation_in_which_the_engine_hangs_then_dies_is_refused_and_others_are_exact(
    running: PredictServer, client: kvserve.AsyncClient
) -> None:
    async def generate_until(num_messages: int, number: signal.Signals) -> None:
        num_read = 0
        async with client.generate("def kill():", **LONG) as stream:
            async for _ in stream:
                num_read += 1
                if num_read == num_messages:
                    os.kill(running.process.engine().pid, number)

    async def other() -> list[int]:
        generated = await client.generate_once(PROMPT, max_new_tokens=20)
        return list(generated.samples[0].token_ids)

    wanted = await other()
    with health_of(running, "") as health:
        for num_messages, number in ((60, signal.SIGSTOP), (1, signal.SIGKILL)):
            assert (await asyncio.to_thread(next, health)).status == SERVING
            with pytest.raises(kvserve.Unavailable) as lost:
                await generate_until(num_messages, number)
            assert lost.value.reason == "ENGINE_LOST"
            assert (await asyncio.to_thread(next, health)).status == NOT_SERVING
        assert (await asyncio.to_thread(next, health)).status == SERVING
    pid = running.process.engine().pid
    for _ in range(2):
        with pytest.raises(kvserve.Internal) as refused:
            await client.generate_once("def kill():", **LONG)
        assert refused.value.reason == "QUARANTINED"
        assert await other() == wanted
    assert running.process.engine().pid == pid
    assert running.count("quarantine_requests", process="engine") == 1


async def test_a_predict_process_that_is_stopped_ends_its_calls_turns_health_and_comes_back(
    running: PredictServer, client: kvserve.AsyncClient
) -> None:
    assert await once_up(lambda: features_of(client, HARMLESS)) == WANTED
    stopped = running.process.predict()
    with health_of(running, "kvserve.v1.PredictService") as health:
        assert (await asyncio.to_thread(next, health)).status == SERVING
        stop_process(stopped.pid)
        with pytest.raises(kvserve.Unavailable):
            await features_of(client, HARMLESS)
        assert (await asyncio.to_thread(next, health)).status == NOT_SERVING
        assert (await asyncio.to_thread(next, health)).status == SERVING
    assert await features_of(client, HARMLESS) == WANTED
    assert not stopped.is_running()
