"""Unary calls, headers, retries, errors and health of the asyncio client against a real server."""

import asyncio

import grpc
import pytest
import pytest_asyncio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

import kvserve
from kvserve.v1 import generate_pb2
from tests.rpc.scripted_server import say_hello, scripted_server

QUICK_RETRIES = kvserve.RetryPolicy(initial_backoff_s=0.005, max_backoff_s=0.01)
NOTICED_S = 60.0


@pytest_asyncio.fixture
async def server():
    async with scripted_server() as running:
        yield running


@pytest_asyncio.fixture
async def client(server):
    async with kvserve.AsyncClient(server.target, timeout_s=20, retry=QUICK_RETRIES) as running:
        yield running


def packed(message):
    detail = any_pb2.Any()
    detail.Pack(message)
    return detail


def refusing(code, *details, message="no", num_times=1000):
    """Return a story that refuses the first calls before its first message, then says hello."""
    num_refused = 0

    async def story(request, context):
        nonlocal num_refused
        if num_refused < num_times:
            num_refused += 1
            status = status_pb2.Status(code=code.value[0], message=message, details=map(packed, details))
            await context.abort_with_status(rpc_status.to_status(status))
        async for event in say_hello(request, context):
            yield event

    return story


async def test_generate_once_returns_the_whole_answer(server, client):
    result = await client.generate_once(token_ids=[5, 8, 13], max_new_tokens=8)
    assert result.text == "Hello"
    assert result.token_ids == (1, 2)
    assert result.finish_reason is kvserve.FinishReason.LENGTH
    assert server.servicer.requests[0].token_ids.ids == [5, 8, 13]
    assert server.servicer.requests[0].parameters.max_new_tokens == 8


async def test_cancelling_the_task_of_a_unary_call_reaches_the_server(server, client):
    arrived = asyncio.Event()

    async def hang(request, context):
        arrived.set()
        await asyncio.Event().wait()

    server.servicer.unary_story = hang
    task = asyncio.create_task(client.generate_once("x"))
    await asyncio.wait_for(arrived.wait(), NOTICED_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_tokenize_detokenize_and_model_info(client):
    tokens = await client.tokenize("abc")
    assert tokens == kvserve.Tokens(token_ids=(97, 98, 99), max_model_length=4096)
    assert await client.detokenize([97, 98]) == "ab"
    info = await client.model_info()
    assert (info.name, info.num_parameters, info.eos_token_ids) == ("scripted", 3_574_528, (1, 6))


async def test_api_key_travels_as_one_authorization_header(server):
    async with kvserve.AsyncClient(server.target, api_key="secret") as client:
        await client.model_info()
    sent = [value for key, value in server.servicer.metadata[0] if key == "authorization"]
    assert sent == ["Bearer secret"]
    assert "secret" not in repr(client)


async def test_trace_context_travels_with_the_call(server, client):
    trace = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(
        trace_id=0x0AF7651916CD43DD8448EB211C80319C,
        span_id=0xB7AD6B7169203331,
        is_remote=False,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    with trace.use_span(trace.NonRecordingSpan(context)):
        await client.model_info()
    headers = dict(server.servicer.metadata[0])
    assert headers["traceparent"] == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_unavailable_twice_then_served(server, client):
    server.servicer.stream_story = refusing(grpc.StatusCode.UNAVAILABLE, num_times=2)
    async with client.generate("x") as stream:
        assert (await stream.collect()).text == "Hello world"
    assert len(server.servicer.requests) == 3


async def test_full_queue_is_tried_again_after_the_servers_pushback(server):
    num_calls = 0

    async def full_once(request, context):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", "10"),))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
        async for event in say_hello(request, context):
            yield event

    server.servicer.stream_story = full_once
    # Without the pushback the first wait would be long beyond the deadline.
    patient = kvserve.RetryPolicy(initial_backoff_s=600, max_backoff_s=600)
    async with (
        kvserve.AsyncClient(server.target, retry=patient, timeout_s=10) as client,
        client.generate("x") as stream,
    ):
        assert (await stream.collect()).text == "Hello world"
    assert num_calls == 2


async def test_no_retry_after_the_first_message(server, client):
    async def lost_halfway(request, context):
        yield generate_pb2.GenerateEvent(text="a", token_ids=[1], start=generate_pb2.GenerateStart())
        await context.abort(grpc.StatusCode.UNAVAILABLE, "engine lost")

    server.servicer.stream_story = lost_halfway
    async with client.generate("x") as stream:
        with pytest.raises(kvserve.Unavailable, match="engine lost"):
            await stream.collect()
    assert stream.text == "a"
    assert len(server.servicer.requests) == 1


async def test_retries_can_be_turned_off(server):
    server.servicer.stream_story = refusing(grpc.StatusCode.UNAVAILABLE)
    async with (
        kvserve.AsyncClient(server.target, retry=None) as client,
        client.generate("x") as stream,
    ):
        with pytest.raises(kvserve.Unavailable):
            await stream.collect()
    assert len(server.servicer.requests) == 1


async def test_invalid_argument_is_not_tried_again_and_names_the_fields(server, client):
    violation = error_details_pb2.BadRequest.FieldViolation(
        field="parameters.top_p", description="must be above 0"
    )
    server.servicer.stream_story = refusing(
        grpc.StatusCode.INVALID_ARGUMENT,
        error_details_pb2.BadRequest(field_violations=[violation]),
        message="1 field is wrong",
    )
    async with client.generate("x", top_p=0.0) as stream:
        with pytest.raises(kvserve.InvalidArgument, match="1 field is wrong") as caught:
            await stream.collect()
    assert caught.value.violations == (kvserve.FieldViolation("parameters.top_p", "must be above 0"),)
    assert isinstance(caught.value.__cause__, grpc.aio.AioRpcError)
    assert len(server.servicer.requests) == 1


async def test_resource_exhausted_says_when_to_come_back_and_why(server):
    server.servicer.stream_story = refusing(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
        error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="kvserve", metadata={"waiting": "256"}),
    )
    async with kvserve.AsyncClient(server.target, retry=None) as client, client.generate("x") as stream:
        with pytest.raises(kvserve.ResourceExhausted) as caught:
            await stream.collect()
    error = caught.value
    assert isinstance(error, kvserve.Retryable)
    assert error.retry_after_s == 1.5
    assert (error.reason, error.domain, error.details) == ("QUEUE_FULL", "kvserve", {"waiting": "256"})


@pytest.mark.parametrize(
    ("code", "error_type"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, kvserve.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, kvserve.PermissionDenied),
        (grpc.StatusCode.NOT_FOUND, kvserve.NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, kvserve.AlreadyExists),
        (grpc.StatusCode.FAILED_PRECONDITION, kvserve.FailedPrecondition),
        (grpc.StatusCode.OUT_OF_RANGE, kvserve.OutOfRange),
        (grpc.StatusCode.DEADLINE_EXCEEDED, kvserve.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, kvserve.Cancelled),
        (grpc.StatusCode.ABORTED, kvserve.Aborted),
        (grpc.StatusCode.UNIMPLEMENTED, kvserve.Unimplemented),
        (grpc.StatusCode.INTERNAL, kvserve.Internal),
        (grpc.StatusCode.DATA_LOSS, kvserve.DataLoss),
        (grpc.StatusCode.UNKNOWN, kvserve.Unknown),
    ],
)
async def test_each_code_has_its_error_in_both_clients(server, client, code, error_type):
    async def refuse(request, context):
        await context.abort(code, "because")

    server.servicer.stream_story = refusing(code, message="because")
    server.servicer.unary_story = refuse
    async with client.generate("x") as stream:
        with pytest.raises(error_type) as streamed:
            await stream.collect()
    with pytest.raises(error_type) as once:
        await client.generate_once("x")

    def blocking():
        with kvserve.Client(server.target) as sync_client:
            with pytest.raises(error_type, match="because"):
                sync_client.generate_once("x")
            with sync_client.generate("x") as sync_stream, pytest.raises(error_type, match="because"):
                sync_stream.collect()

    await asyncio.to_thread(blocking)
    for caught in (streamed, once):
        assert type(caught.value) is error_type
        assert caught.value.code is code
        if code is not grpc.StatusCode.CANCELLED:  # grpc.aio keeps no text of this one.
            assert str(caught.value) == "because"


async def test_a_request_beyond_the_size_limit_is_refused_here(server):
    async with kvserve.AsyncClient(server.target, max_message_bytes=10_000) as client:
        with pytest.raises(kvserve.InvalidArgument, match="max_message_bytes"):
            await client.generate_once("x" * 20_000)
        with pytest.raises(kvserve.InvalidArgument, match="max_message_bytes"):
            client.generate("x" * 20_000)
    assert server.servicer.requests == []


async def test_nobody_listens():
    async with kvserve.AsyncClient("127.0.0.1:1", retry=QUICK_RETRIES) as client:
        with pytest.raises(kvserve.Unavailable):
            await client.model_info()
        with pytest.raises(kvserve.DeadlineExceeded, match=r"not ready after 0\.2 s"):
            await client.wait_ready(timeout_s=0.2)


async def test_health_is_reported(server, client):
    assert await client.check_health() is kvserve.HealthStatus.SERVING
    await server.set_not_serving()
    assert await client.check_health() is kvserve.HealthStatus.NOT_SERVING
    with pytest.raises(kvserve.DeadlineExceeded, match="not_serving"):
        await client.wait_ready(timeout_s=0.2)


async def test_wait_ready_returns_when_the_server_turns_ready(server, client):
    await server.set_not_serving()
    waiting = asyncio.create_task(client.wait_ready(timeout_s=10))
    await asyncio.sleep(0)
    await server.set_serving()
    await asyncio.wait_for(waiting, NOTICED_S)


async def test_wait_ready_waits_for_a_server_that_starts_later():
    async with scripted_server() as gone:
        port = int(gone.target.rpartition(":")[2])
    async with kvserve.AsyncClient(f"127.0.0.1:{port}") as client:
        waiting = asyncio.create_task(client.wait_ready(timeout_s=20))
        await asyncio.sleep(0)
        async with scripted_server(port=port):
            await asyncio.wait_for(waiting, 60)
