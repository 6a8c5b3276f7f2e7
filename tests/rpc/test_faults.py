"""Refusals, failures, cancellation, deadlines and slow readers: one status each, and nothing left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc import aio

from kvserve.v1 import cache_admin_pb2 as admin_pb
from kvserve.v1 import generate_pb2 as pb
from server.engine.fake import FakeEngine
from server.engine.interface import EngineState
from server.engine.messages import Admitted, Failed, FailureKind, Refused, Submit, Tokens
from server.rpc.call import Call
from server.rpc.interceptor import CallLimits
from tests.rpc.harness import READY, ScriptedEngine, Server, refused, request, serving

Code = grpc.StatusCode
LONG = {"max_new_tokens": 900}


class Codes:
    """A ``CallObserver`` that keeps the codes."""

    def __init__(self) -> None:
        self.ended: list[Code] = []

    def begin(self, call: Call, metadata: Any) -> None:
        pass

    def end(self, call: Call, code: Code) -> None:
        self.ended.append(code)


async def idle(server: Server) -> None:
    async with asyncio.timeout(60):
        while server.front_end.num_active_calls:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("kind", "code", "reason", "retry_after_s"),
    [
        (FailureKind.QUEUE_FULL, Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 2.5),
        (FailureKind.TOO_LARGE, Code.FAILED_PRECONDITION, "KV_POOL_TOO_SMALL", None),
        (FailureKind.DEADLINE, Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", None),
        (FailureKind.DRAINING, Code.UNAVAILABLE, "DRAINING", 2.5),
        (FailureKind.ENGINE_LOST, Code.UNAVAILABLE, "ENGINE_LOST", 2.5),
        (FailureKind.NUMERICAL, Code.INTERNAL, "NUMERICAL", None),
        (FailureKind.INTERNAL, Code.INTERNAL, "INTERNAL", None),
    ],
)
async def test_refusal_by_the_engine(
    kind: FailureKind, code: Code, reason: str, retry_after_s: float | None
) -> None:
    engine = ScriptedEngine(lambda submit: [Refused(submit.key, kind, "/secret/path", 2.5)])
    async with serving(engine) as server:
        for call in (server.stub.Generate, server.stub.StreamGenerate):
            refusal = await refused(call(request()))
            assert (refusal.code, refusal.reason, refusal.retry_after_s) == (code, reason, retry_after_s)
            assert refusal.pushback_ms == (None if retry_after_s is None else "2500")
            assert "secret" not in refusal.message


async def test_a_request_in_quarantine_is_refused_and_clients_are_told_never_to_try_again() -> None:
    engine = ScriptedEngine(lambda submit: [Refused(submit.key, FailureKind.QUARANTINED, "/secret/path")])
    async with serving(engine) as server:
        for call in (server.stub.Generate, server.stub.StreamGenerate):
            refusal = await refused(call(request()))
            assert (refusal.code, refusal.reason) == (Code.INTERNAL, "QUARANTINED")
            assert (refusal.retry_after_s, refusal.pushback_ms) == (None, "-1")
            assert "secret" not in refusal.message


async def test_refused_stream_has_no_initial_metadata_so_that_it_can_be_retried() -> None:
    # A channel that may retry does so exactly because nothing was sent.
    config = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.01s",
        "maxBackoff": "0.01s", "backoffMultiplier": 1, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}"""
    engine = ScriptedEngine(lambda submit: [Refused(submit.key, FailureKind.QUEUE_FULL, "full", 0.01)])
    async with serving(engine) as server:
        address = f"127.0.0.1:{server.port}"
        async with aio.insecure_channel(address, options=[("grpc.service_config", config)]) as channel:
            call: Any = channel.unary_stream("/kvserve.v1.GenerateService/StreamGenerate")
            refusal = await refused(call(request().SerializeToString()))
    assert refusal.code is Code.RESOURCE_EXHAUSTED
    assert len(engine.submitted) == 3


@pytest.mark.parametrize("kind", list(FailureKind))
async def test_failure_after_the_first_token_ends_the_stream_with_one_status(kind: FailureKind) -> None:
    def script(submit: Submit) -> list[Any]:
        return [Admitted(submit.key, 0), Tokens(submit.key, 0, [61])]

    engine = ScriptedEngine(script)
    async with serving(engine) as server:
        stream = server.stub.StreamGenerate(request())
        first = await stream.read()
        assert list(first.token_ids) == [61]
        engine.desk.streams.dispatch([Failed(engine.submitted[0].key, kind, "internals")])
        refusal = await refused(stream)
        assert refusal.code is not Code.OK
        assert "internals" not in refusal.message


async def test_unexpected_error_shows_a_reference_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def script(submit: Submit) -> list[Any]:
        raise ZeroDivisionError("/secret/path")

    async with serving(ScriptedEngine(script)) as server:
        refusal = await refused(server.stub.Generate(request(request_id="mine")))
    assert (refusal.code, refusal.message) == (Code.INTERNAL, "internal error; reference mine")
    (record,) = [record for record in caplog.records if record.message == "call failed"]
    assert record.exc_info is not None
    assert record.request_id == "mine"  # type: ignore[attr-defined]


async def test_lost_engine_ends_streams_and_refuses_until_it_is_back() -> None:
    engine = FakeEngine(ready=READY, step_s=0.01)
    async with serving(engine) as server:
        stream = server.stub.StreamGenerate(request(parameters=LONG))
        await stream.read()
        engine.lose()
        assert (await refused(stream)).code is Code.UNAVAILABLE
        refusal = await refused(server.stub.Generate(request()))
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "ENGINE_LOST")
        assert refusal.retry_after_s is not None
        engine.recover()
        await server.stub.Generate(request(parameters={"max_new_tokens": 1}))


async def test_loading_engine_refuses() -> None:
    async with serving(ScriptedEngine(), started=False) as server:
        for call in (server.stub.Generate(request()), server.stub.GetModelInfo(pb.GetModelInfoRequest())):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "LOADING")


@pytest.mark.parametrize("method", ["StreamGenerate", "Generate"])
async def test_cancelled_call_cancels_the_request(method: str) -> None:
    engine = ScriptedEngine(lambda submit: [Admitted(submit.key, 0)])
    codes = Codes()
    async with serving(engine, observers=[codes]) as server:
        call = getattr(server.stub, method)(request(request_id="x"))
        while not engine.submitted:
            await asyncio.sleep(0.001)
        call.cancel()
        await idle(server)
        assert [cancel.key for cancel in engine.cancelled] == [engine.submitted[0].key]
        assert engine.desk.streams.num_open == 0
        assert codes.ended == [Code.CANCELLED]


async def test_dropped_connection_cancels_the_request() -> None:
    engine = FakeEngine(ready=READY, step_s=0.001)
    async with serving(engine) as server:
        async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stream_generate: Any = channel.unary_stream("/kvserve.v1.GenerateService/StreamGenerate")
            stream = stream_generate(request(parameters=LONG).SerializeToString())
            await stream.read()
        await idle(server)
        assert engine.stats is not None
        assert engine.stats.generated_tokens < 900


async def test_hundreds_of_cancelled_calls_leave_nothing() -> None:
    engine = FakeEngine(ready=READY, step_s=0.001)
    async with serving(engine) as server:
        survivor = server.stub.Generate(request(parameters={"max_new_tokens": 300}))

        async def cancelled(number: int) -> None:
            call = server.stub.StreamGenerate(request(parameters=LONG))
            for _ in range(number % 4):
                await call.read()
            call.cancel()

        for _ in range(4):
            await asyncio.gather(*(cancelled(number) for number in range(80)))
        answer = await survivor
        await idle(server)
        assert list(answer.samples[0].token_ids) == [60 + position for position in range(300)]


async def test_deadline_travels_to_the_engine_and_ends_the_call() -> None:
    engine = ScriptedEngine(lambda submit: [Admitted(submit.key, 0), Tokens(submit.key, 0, [61])])
    codes = Codes()
    async with serving(engine, observers=[codes]) as server:
        refusal = await refused(server.stub.StreamGenerate(request(), timeout=1.0))
        assert refusal.code is Code.DEADLINE_EXCEEDED
        await idle(server)
        deadline_s = engine.submitted[0].deadline_s
        assert deadline_s is not None
        assert 0 < deadline_s < 2  # the transport rounds up
        assert len(engine.cancelled) == 1
        assert codes.ended == [Code.DEADLINE_EXCEEDED]


async def test_call_without_a_deadline_gets_the_servers() -> None:
    engine = ScriptedEngine(lambda submit: [Admitted(submit.key, 0), Tokens(submit.key, 0, [61])])
    async with serving(engine, limits=CallLimits(max_call_s=0.1)) as server:
        for deadline_s in (None, 100):
            refusal = await refused(server.stub.StreamGenerate(request(), timeout=deadline_s))
            assert (refusal.code, refusal.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert len(engine.cancelled) == 2


async def test_expired_calls_never_reach_the_engine() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as server:
        calls = [server.stub.Generate(request(), timeout=1e-6) for _ in range(200)]
        codes = {(await refused(call)).code for call in calls}
        await idle(server)
    assert codes == {Code.DEADLINE_EXCEEDED}
    assert all(submit.deadline_s > 0 for submit in engine.submitted)  # type: ignore[operator]
    assert engine.desk.streams.num_open == 0


async def test_slow_reader_is_cut_off_and_its_request_cancelled() -> None:
    engine = FakeEngine(ready=READY, step_s=0.0)
    codes = Codes()
    async with serving(engine, write_timeout_s=0.2, observers=[codes]) as server:
        options = [("grpc.http2.lookahead_bytes", 1 << 10), ("grpc.http2.bdp_probe", 0)]
        async with aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            # 20 log-probabilities a token fill any window before the end.
            parameters = {"max_new_tokens": 1000, "logprobs": 20, "n": 16}
            stream_generate: Any = channel.unary_stream("/kvserve.v1.GenerateService/StreamGenerate")
            stream = stream_generate(request(parameters=parameters).SerializeToString())
            await stream.wait_for_connection()
            await idle(server)
            assert codes.ended == [Code.ABORTED]
            refusal = await refused(stream)
            assert refusal.code in (Code.ABORTED, Code.CANCELLED, Code.UNKNOWN)


async def test_answer_beyond_the_message_limit_says_what_to_use_instead() -> None:
    from server.rpc.listener import ListenOptions

    listen = ListenOptions(port=0, max_message_bytes=64 << 10)
    async with serving(FakeEngine(ready=READY), listen=listen) as server:
        refusal = await refused(
            server.stub.Generate(request(parameters={"max_new_tokens": 500, "logprobs": 20, "n": 2}))
        )
        assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE")


async def test_full_queue_refuses_within_50_ms() -> None:
    engine = FakeEngine(ready=READY, max_waiting=0)
    async with serving(engine) as server:
        await refused(server.stub.Generate(request()))  # connects
        loop = asyncio.get_running_loop()
        took_s = []
        for _ in range(20):
            started_s = loop.time()
            refusal = await refused(server.stub.Generate(request()))
            took_s.append(loop.time() - started_s)
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert min(took_s) < 0.05  # whoever waits for something is never so quick; a busy machine may be late


async def test_drain_finishes_what_runs_and_refuses_what_is_new() -> None:
    engine = FakeEngine(ready=READY, step_s=0.002)
    async with serving(engine) as server:
        running = server.stub.Generate(request(parameters={"max_new_tokens": 100}))
        while not server.front_end.num_active_calls:
            await asyncio.sleep(0.001)
        while engine.stats is None or not engine.stats.num_running:
            await asyncio.sleep(0.001)
        stopping = asyncio.create_task(server.front_end.shut_down(grace_s=30.0))
        await engine.wait_state(EngineState.DRAINING)
        refusal = await refused(server.stub.Generate(request()))
        assert refusal.code is Code.UNAVAILABLE
        assert len((await running).samples[0].token_ids) == 100
        await stopping


async def test_what_does_not_finish_within_the_grace_is_ended() -> None:
    engine = FakeEngine(ready=READY, step_s=0.05)
    async with serving(engine) as server:
        running = server.stub.StreamGenerate(request(parameters=LONG))
        await running.read()
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        await server.front_end.shut_down(grace_s=0.1)
        refusal = await refused(running)
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "DRAINING")
        assert loop.time() - started_s < 30  # what runs would take 45 seconds


async def test_a_timer_that_is_early_by_the_calls_clock_is_a_deadline_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # An event loop's clock is coarser than the one that calls are measured with.
    monkeypatch.setattr(Call, "remaining_s", lambda call: 0.0005)
    async with serving(FakeEngine(), limits=CallLimits(max_call_s=0.1)) as server:
        refusal = await refused(server.admin.WatchCache(admin_pb.WatchCacheRequest()).read())
    assert refusal.code is Code.DEADLINE_EXCEEDED
    assert "call failed" not in caplog.text
