"""StreamPredict: many requests over one call, each answered as it is ready."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc import aio

from kvserve.v1 import predict_pb2 as pb
from server.predict.errors import OverloadedError
from server.rpc.auth import parse_api_keys
from server.rpc.errors import Unavailable
from server.rpc.interceptor import CallLimits
from server.rpc.predict_stream import MAX_OPEN_REQUESTS, PredictStream
from tests.rpc.harness import ScriptedEngine, refused, serving
from tests.rpc.scripted_predict import Asked, ScriptedPredict

Code = grpc.StatusCode
PATH = "/kvserve.v1.PredictService/StreamPredict"


def text(request_id: str, content: str = "x", *, model: str = "sizes", **fields: Any) -> pb.PredictRequest:
    return pb.PredictRequest(
        request_id=request_id, model=model, texts={"items": [{"text": content}]}, **fields
    )


class Gates:
    """Lets each request through when told, by its text."""

    def __init__(self) -> None:
        self.opened: dict[str, asyncio.Event] = {}

    def __getitem__(self, content: str) -> asyncio.Event:
        return self.opened.setdefault(content, asyncio.Event())

    async def __call__(self, asked: Asked) -> None:
        await self[asked.inputs.texts[0].text].wait()


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def rest_of(call: Any) -> list[pb.StreamPredictResponse]:
    answers = []
    while (answer := await call.read()) is not aio.EOF:
        answers.append(answer)
    return answers


async def test_each_is_answered_as_it_is_ready() -> None:
    gates = Gates()
    predict = ScriptedPredict(before=gates)
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = server.predict.StreamPredict()
        for name in ("a", "b", "c"):
            await call.write(text(name, name))
        for name in ("c", "a", "b"):
            gates[name].set()
            answer = await call.read()
            assert (answer.request_id, answer.response.request_id) == (name, name)
            assert answer.response.predictions[0].classification.label == "short"
        await call.done_writing()
        assert await rest_of(call) == []
        assert await call.code() is Code.OK
    assert server.front_end.num_active_calls == 0


async def test_half_close_lets_running_requests_finish() -> None:
    gates = Gates()
    predict = ScriptedPredict(before=gates)
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = server.predict.StreamPredict()
        for index in range(5):
            await call.write(text(str(index), "x"))
        await call.done_writing()
        await until(lambda: predict.num_open_calls == 5)
        gates["x"].set()
        answers = await rest_of(call)
        assert {answer.request_id for answer in answers} == set("01234")
        assert await call.code() is Code.OK
        empty = server.predict.StreamPredict()
        await empty.done_writing()
        assert await rest_of(empty) == []
        assert await empty.code() is Code.OK


async def test_a_failing_request_does_not_end_the_stream() -> None:
    async def overloaded(asked: Asked) -> None:
        if asked.inputs.texts and asked.inputs.texts[0].text == "full":
            raise OverloadedError("too much waits", retry_after_s=0.5)

    predict = ScriptedPredict(before=overloaded)
    overflow = text("wide").SerializeToString() + b"\x2a\x06\x10" + b"\x85\x80\x80\x80\x10"  # top_k 2^32 + 5
    bad: list[tuple[pb.PredictRequest, Code, str, str]] = [
        (text("1", "x", model="nobody"), Code.NOT_FOUND, "", "MODEL_NOT_FOUND"),
        (text("2", "x" * 101), Code.INVALID_ARGUMENT, "texts.items[0].text", "INVALID_ARGUMENT"),
        (text("3", options={"top_k": -1}), Code.INVALID_ARGUMENT, "options.top_k", "INVALID_ARGUMENT"),
        (text("4", "full"), Code.RESOURCE_EXHAUSTED, "", "QUEUE_FULL"),
        (
            pb.PredictRequest(request_id="5", model="sizes"),
            Code.INVALID_ARGUMENT,
            "input",
            "INVALID_ARGUMENT",
        ),
        (text("", "x"), Code.INVALID_ARGUMENT, "request_id", "INVALID_ARGUMENT"),
    ]
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = server.predict.StreamPredict()
        for request, code, field, reason in bad:
            await call.write(request)
            answer = await call.read()
            error = answer.error
            assert answer.request_id == request.request_id
            assert (error.code, error.field, error.reason) == (code.value[0], field, reason)
            assert error.retry_after_s == (0.5 if reason == "QUEUE_FULL" else 0.0)
        await call.write(text("good"))
        assert (await call.read()).response.request_id == "good"
        call.cancel()
        raw = server.channel.stream_stream(PATH)()
        await raw.write(overflow)
        answer = pb.StreamPredictResponse.FromString(await raw.read())
        assert (answer.request_id, answer.error.field) == ("wide", "options.top_k")
        raw.cancel()


async def test_an_id_is_taken_while_its_request_runs_in_this_stream() -> None:
    gates = Gates()
    async with serving(ScriptedEngine(), predict=ScriptedPredict(before=gates)) as server:
        first, second = server.predict.StreamPredict(), server.predict.StreamPredict()
        for call in (first, second):  # streams do not share their ids
            await call.write(text("same"))
        await first.write(text("same", "other"))
        error = (await first.read()).error
        assert (error.code, error.reason) == (Code.ALREADY_EXISTS.value[0], "REQUEST_ID_IN_USE")
        gates["x"].set()
        for call in (first, second):
            assert (await call.read()).response.request_id == "same"
        for _ in range(50):  # at once again, when its answer is there
            await first.write(text("same"))
            assert (await first.read()).WhichOneof("outcome") == "response"
        first.cancel()
        second.cancel()


async def test_no_more_is_read_than_may_be_open() -> None:
    gates = Gates()
    predict = ScriptedPredict(before=gates)
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = server.predict.StreamPredict()
        num_sent = 0

        async def send() -> None:
            nonlocal num_sent
            for index in range(MAX_OPEN_REQUESTS + 50):
                await call.write(text(str(index)))
                num_sent += 1
            await call.done_writing()

        sending = asyncio.create_task(send())
        await until(lambda: predict.num_open_calls == MAX_OPEN_REQUESTS)
        # What one more call needs goes by: nothing more was read meanwhile.
        await server.predict.GetPredictModel(pb.GetPredictModelRequest(model="sizes"))
        assert predict.num_open_calls == MAX_OPEN_REQUESTS
        gates["x"].set()
        assert len({answer.request_id for answer in await rest_of(call)}) == MAX_OPEN_REQUESTS + 50
        await sending
    assert num_sent == MAX_OPEN_REQUESTS + 50


async def test_open_inputs_are_bounded_too() -> None:
    gates = Gates()
    predict = ScriptedPredict(before=gates)
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = server.predict.StreamPredict()
        for index in range(4):
            many = pb.PredictRequest(
                request_id=str(index), model="sizes", texts={"items": [{"text": "x"}] * 2000}
            )
            await call.write(many)
        await until(lambda: predict.num_open_calls == 3)  # the third passes 4,096
        await server.predict.GetPredictModel(pb.GetPredictModelRequest(model="sizes"))
        assert predict.num_open_calls == 3
        await call.done_writing()
        gates["x"].set()
        assert len(await rest_of(call)) == 4


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_the_end_of_a_stream_ends_all_that_runs_for_it(how: str) -> None:
    predict = ScriptedPredict(before=Gates())
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = server.predict.StreamPredict(timeout=1.5 if how == "deadline" else None)
        for index in range(20):
            await call.write(text(str(index)))
        await until(lambda: predict.num_open_calls == 20 or predict.num_cancelled)
        if how == "cancel":
            call.cancel()
        else:
            assert (await refused(call)).code is Code.DEADLINE_EXCEEDED
        await until(lambda: predict.num_open_calls == 0 and server.front_end.num_active_calls == 0)
    assert predict.num_cancelled == 20


async def test_the_servers_own_limit_ends_an_endless_stream() -> None:
    limits = CallLimits(max_call_s=0.2)
    async with serving(ScriptedEngine(), predict=ScriptedPredict(before=Gates()), limits=limits) as server:
        call = server.predict.StreamPredict()
        await call.write(text("1"))
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


async def test_a_stream_that_never_sends_ends_by_itself_and_an_idle_one_lives() -> None:
    limits = CallLimits(receive_timeout_s=0.5)
    async with serving(ScriptedEngine(), predict=ScriptedPredict(), limits=limits) as server:
        idle = server.predict.StreamPredict()
        await idle.write(text("1"))
        assert (await idle.read()).request_id == "1"
        silent = [server.channel.stream_stream(PATH)() for _ in range(10)]
        for call in silent:
            await call.wait_for_connection()
        refusals = [await refused(call) for call in silent]
        assert {refusal.message for refusal in refusals} == {"the request did not arrive in time"}
        assert {refusal.code for refusal in refusals} == {Code.DEADLINE_EXCEEDED}
        # By now more than the limit has passed for the first one as well.
        await idle.write(text("2"))
        assert (await idle.read()).request_id == "2"
        idle.cancel()


async def test_bytes_that_are_no_message_end_the_stream() -> None:
    predict = ScriptedPredict(before=Gates())
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = server.channel.stream_stream(PATH)()
        await call.write(text("1").SerializeToString())
        await until(lambda: predict.num_open_calls == 1)
        await call.write(b"\xff" * 20)
        refusal = await refused(call)
        assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["request"])
        await until(lambda: predict.num_open_calls == 0)


async def test_without_a_good_key_nothing_of_a_stream_is_read() -> None:
    keys = parse_api_keys([{"tenant": "a", "key": "a-key-0123456789abc", "scopes": ["generate"]}])
    async with serving(ScriptedEngine(), predict=ScriptedPredict(), keys=keys) as server:
        calls = [server.channel.stream_stream(PATH)() for _ in range(20)]  # none ever sends a message
        assert {(await refused(call)).code for call in calls} == {Code.UNAUTHENTICATED}
        metadata = (("authorization", "Bearer a-key-0123456789abc"),)
        call = server.predict.StreamPredict(metadata=metadata)
        assert (await refused(call)).code is Code.PERMISSION_DENIED


async def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict, write_timeout_s=0.3) as server:
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
        async with aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            call: Any = channel.stream_stream(PATH)()
            items = [{"text": "x"}] * 1000

            async def send() -> None:
                for index in range(2000):
                    request = pb.PredictRequest(
                        request_id=str(index), model="letters", texts={"items": items}
                    )
                    await call.write(request.SerializeToString())

            sending = asyncio.create_task(send())
            await until(lambda: server.front_end.num_active_calls == 1)
            # It reads nothing: at some point nothing more is read from it either, and then it is let go.
            await until(lambda: server.front_end.num_active_calls == 0)
            call.cancel()
            await asyncio.wait({sending})
            sending.cancelled() or sending.exception()
        assert server.sample("kvserve_rpc_calls_total", {"method": "StreamPredict", "code": "ABORTED"}) == 1
    assert len(predict.asked) < 1000
    assert predict.num_open_calls == 0


async def test_shutdown_answers_what_was_read_and_ends_streams() -> None:
    gates = Gates()
    predict = ScriptedPredict(before=gates)
    async with serving(ScriptedEngine(), predict=predict) as server:
        idle, busy = server.predict.StreamPredict(), server.predict.StreamPredict()
        await idle.write(text("1", "free"))
        gates["free"].set()
        assert (await idle.read()).request_id == "1"
        await busy.write(text("2"))
        await until(lambda: predict.num_open_calls == 1)
        stopping = asyncio.create_task(server.front_end.shut_down(grace_s=60.0))
        refusal = await refused(idle)
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "DRAINING")
        gates["x"].set()
        assert (await busy.read()).response.request_id == "2"
        assert (await refused(busy)).code is Code.UNAVAILABLE
        await stopping
    assert predict.stopped_with is not None


async def test_stream_that_has_just_come_ends_when_the_server_drains() -> None:
    """Its reader had not begun, and nobody was told that it had ended: the stream hung."""

    async def answer(ask: Any, received_s: float, response: pb.PredictResponse) -> None:
        raise AssertionError("nothing was read")

    stream = PredictStream(answer, max_inputs=10)
    unread: Any = None
    running = asyncio.create_task(stream.run(unread, unread, write_timeout_s=1.0))
    while stream._reader is None:
        await asyncio.sleep(0)
    stream.drain()
    async with asyncio.timeout(60):
        with pytest.raises(Unavailable):
            await running
