"""Frames that no client of gRPC writes: what they get, and that nobody else notices."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from kvserve.v1 import predict_pb2 as pb
from server.rpc.auth import ApiKey, parse_api_keys
from server.rpc.oip import open_inference_pb2 as oip
from tests.rpc import raw_http2 as raw
from tests.rpc.harness import ScriptedEngine, Server, serving
from tests.rpc.raw_http2 import Connection, framed, open_connection
from tests.rpc.scripted_predict import ScriptedPredict

OK, CANCELLED, INVALID, EXHAUSTED, INTERNAL, UNAUTHENTICATED = (
    code.value[0]
    for code in (
        grpc.StatusCode.OK,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAUTHENTICATED,
    )
)
PREDICT = "/kvserve.v1.PredictService/Predict"
STREAM = "/kvserve.v1.PredictService/StreamPredict"
INFER = "/inference.GRPCInferenceService/ModelInfer"
INFER_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
GOOD = {
    PREDICT: pb.PredictRequest(model="sizes", texts={"items": [{"text": "x"}]}).SerializeToString(),
    INFER: oip.ModelInferRequest(
        model_name="sizes",
        inputs=[oip.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[1])],
        raw_input_contents=[struct.pack("<I", 1) + b"x"],
    ).SerializeToString(),
}
GOOD |= {STREAM: GOOD[PREDICT], INFER_STREAM: GOOD[INFER]}
KEY = "a-key-of-the-tests-0123"
MAX_STREAMS = 100
"""Of a connection."""
ENHANCE_YOUR_CALM = 11


@asynccontextmanager
async def connected(
    predict: ScriptedPredict, keys: tuple[ApiKey, ...] = ()
) -> AsyncIterator[tuple[Server, Connection]]:
    """Serve, and be connected; in the end others must be served as ever and nothing be left running."""
    async with serving(ScriptedEngine(), predict=predict, keys=keys) as server:
        connection = await open_connection(server.port)
        try:
            yield server, connection
            assert await neighbour(server) == {OK: 2}
        finally:
            await connection.close()
        async with asyncio.timeout(10):
            while server.front_end.num_active_calls:
                await asyncio.sleep(0.001)
        assert predict.num_open_calls == 0


@asynccontextmanager
async def several(server: Server, count: int) -> AsyncIterator[list[Connection]]:
    """Connect so many times."""
    async with AsyncExitStack() as stack:
        connections = [await open_connection(server.port) for _ in range(count)]
        for connection in connections:
            stack.push_async_callback(connection.close)
        yield connections


async def neighbour(server: Server) -> Counter[int | None]:
    """Call both services over a connection of its own."""
    own = await open_connection(server.port)
    try:
        key = [("authorization", f"Bearer {KEY}")]
        streams = [own.call(path, framed(GOOD[path]), key) for path in (PREDICT, INFER)]
        return Counter([(await own.ended(stream)).status for stream in streams])
    finally:
        await own.close()


async def test_a_burst_of_calls_is_answered_to_the_last() -> None:
    """More than a thousand that waited to be taken used to end CANCELLED at random, which nobody retries."""
    async with connected(ScriptedPredict()) as (server, _), several(server, 20) as connections:
        calls = [(one, one.call(PREDICT, framed(GOOD[PREDICT]))) for one in connections * MAX_STREAMS]
        ended = Counter([(await one.ended(stream)).status for one, stream in calls])
    assert ended == {OK: 20 * MAX_STREAMS}


@pytest.mark.parametrize("path", GOOD)
async def test_rapid_resets_end_nobody_elses_calls(path: str) -> None:
    async with connected(ScriptedPredict()) as (server, others), several(server, 5) as hostile:
        calls = []
        for number in range(3500):
            connection = hostile[number % len(hostile)]
            stream = connection.begin(path)
            connection.send(raw.DATA, 0, stream, framed(GOOD[path]))
            connection.send(raw.RST_STREAM, 0, stream, struct.pack(">I", 8))
            if number >= 3000 and number % 10 == 0:
                calls.append(others.call(PREDICT, framed(GOOD[PREDICT])))
        assert Counter([(await others.ended(call)).status for call in calls]) == {OK: 50}


@pytest.mark.parametrize("path", GOOD)
async def test_calls_that_are_over_before_they_are_answered_are_no_errors(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Their deadline is a millisecond: the core takes no status for them any more."""
    async with connected(ScriptedPredict()) as (server, connection):
        for _ in range(5):
            timeout = [("grpc-timeout", "1m")]
            calls = [connection.call(path, framed(GOOD[path]), timeout) for _ in range(MAX_STREAMS)]
            for call in calls:
                await connection.ended(call)
        samples = [sample for metric in server.registry.collect() for sample in metric.samples]
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert not [sample for sample in samples if "INTERNAL" in sample.labels.values()]


@pytest.mark.parametrize("path", GOOD)
async def test_a_length_that_no_message_can_have_is_refused_before_it_comes(path: str) -> None:
    async with connected(ScriptedPredict()) as (_, connection):
        stream = connection.begin(path)
        connection.send(raw.DATA, 0, stream, framed(b"x", length=0xFFFF_FFFF))
        assert (await connection.ended(stream)).status == EXHAUSTED


@pytest.mark.parametrize("path", [PREDICT, INFER])
async def test_a_message_that_ends_too_soon_is_an_invalid_argument(path: str) -> None:
    predict = ScriptedPredict()
    async with connected(predict) as (_, connection):
        good = framed(GOOD[path])
        streams = [connection.call(path, body) for body in (b"", good[:3], good[:-1]) for _ in range(20)]
        assert {(await connection.ended(stream)).status for stream in streams} == {INVALID}
        assert predict.asked == []


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    ("header", "body"),
    [
        (("grpc-encoding", "unknown"), b"x"),
        (("grpc-encoding", "identity"), b"x"),  # the flag says that it is compressed
        (("grpc-encoding", "gzip"), b"\x1f\x8b\x08 is not gzip"),
        (("grpc-timeout", "abc"), b"x"),
        (("grpc-timeout", "-1S"), b"x"),
    ],
)
async def test_what_the_core_cannot_read_never_reaches_a_service(
    path: str, header: tuple[str, str], body: bytes
) -> None:
    predict = ScriptedPredict()
    async with connected(predict) as (_, connection):
        stream = connection.call(path, framed(body, flag=1), [header])
        assert (await connection.ended(stream)).status == INTERNAL
        assert predict.asked == []


@pytest.mark.parametrize("path", GOOD)
async def test_calls_without_a_key_hold_no_slot_while_they_send_nothing(path: str) -> None:
    keys = parse_api_keys([{"tenant": "a", "scopes": ["predict"], "key": KEY}])
    predict = ScriptedPredict()
    async with connected(predict, keys) as (_, connection):
        for _ in range(3):
            streams = [connection.begin(path) for _ in range(MAX_STREAMS)]
            assert {(await connection.ended(stream)).status for stream in streams} == {UNAUTHENTICATED}
        assert predict.asked == []


async def test_streams_beyond_the_connections_limit_are_refused() -> None:
    async with connected(ScriptedPredict()) as (server, connection):
        streams = [connection.begin(STREAM) for _ in range(3000)]
        refused = [await connection.ended(stream) for stream in streams[MAX_STREAMS:]]
        assert {(one.status, one.reset) for one in refused} == {(None, ENHANCE_YOUR_CALM)}
        assert server.front_end.num_active_calls <= MAX_STREAMS


async def test_a_flood_of_pings_ends_its_own_connection() -> None:
    async with connected(ScriptedPredict()) as (_, connection):
        connection.write(100 * raw.frame(raw.PING, 0, 0, b"12345678"))
        await connection.let_go()
        assert connection.goaway == ENHANCE_YOUR_CALM


@pytest.mark.parametrize("block", [b"", b"\0\1a\x7f\x81\7" + b"v" * 1024], ids=["of nothing", "of much"])
async def test_headers_that_never_end_do_end_their_connection(block: bytes) -> None:
    async with connected(ScriptedPredict()) as (_, connection):
        connection.send(raw.HEADERS, 0, 1, raw.headers_of(PREDICT))
        connection.write(10_000 * raw.frame(raw.CONTINUATION, 0, 1, block))
        await connection.let_go()


async def test_settings_that_change_all_the_time_harm_nobody() -> None:
    async with connected(ScriptedPredict()) as (_, connection):
        change = raw.frame(raw.SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535))
        for _ in range(300):
            connection.write(change * 100)
            await connection.flush()
