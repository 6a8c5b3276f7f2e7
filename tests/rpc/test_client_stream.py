"""Streams of the asyncio client against a real server: events, results, and above all who ends a call."""

import asyncio

import grpc
import pytest
import pytest_asyncio

import kvserve
from kvserve.v1 import common_pb2, generate_pb2
from tests.rpc.scripted_server import scripted_server

NOTICED_S = 60.0
"""More than enough for a cancellation to cross loopback; the tests wait for the event, not for the time."""


@pytest_asyncio.fixture
async def server():
    async with scripted_server() as running:
        yield running


@pytest_asyncio.fixture
async def client(server):
    async with kvserve.AsyncClient(server.target, timeout_s=20) as running:
        yield running


async def one_token_then_silence(request, context):
    yield generate_pb2.GenerateEvent(
        text="first",
        token_ids=[1],
        start=generate_pb2.GenerateStart(request_id="r-1", model="m", seed=3, prompt_tokens=4),
    )
    await asyncio.Event().wait()


async def test_events_arrive_in_order_and_fold_into_a_result(client):
    async with client.generate("Say hello", max_new_tokens=3) as stream:
        texts = [event.text async for event in stream]
    assert texts == ["Hel", "lo", " world"]
    assert stream.result.text == "Hello world"
    assert stream.result.token_ids == (0, 1, 2)
    assert stream.result.finish_reason is kvserve.FinishReason.EOS
    assert stream.result.usage.prompt_tokens == 20
    assert stream.result.usage.cached_tokens == 16
    assert stream.first_token_s is not None
    assert stream.first_token_s > 0


async def test_events_arrive_as_they_are_sent(server, client):
    may_go_on = asyncio.Event()

    async def in_two_parts(request, context):
        yield generate_pb2.GenerateEvent(text="a", token_ids=[1], start=generate_pb2.GenerateStart())
        await may_go_on.wait()
        yield generate_pb2.GenerateEvent(text="b", token_ids=[2], summary=generate_pb2.GenerateSummary())

    server.servicer.stream_story = in_two_parts
    texts = []
    async with client.generate("x") as stream:
        async for event in stream:
            texts.append(event.text)
            may_go_on.set()
    assert texts == ["a", "b"]


async def test_start_is_known_before_the_end(server, client):
    server.servicer.stream_story = one_token_then_silence
    async with client.generate("x") as stream:
        async for _ in stream:
            break
    assert stream.start == kvserve.GenerateStart("r-1", "m", 3, 4, 0)


async def test_leaving_the_block_cancels_the_call_at_the_server(server, client):
    # grpc 1.83 and later go on generating when an iterator is dropped (grpc/grpc#43462).
    server.servicer.stream_story = one_token_then_silence
    async with client.generate("x") as stream:
        events = aiter(stream)
        await anext(events)
        assert not server.servicer.cancelled.is_set()
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)
    assert server.servicer.num_running == 0


async def test_leaving_the_block_before_reading_cancels_the_call(server, client):
    arrived = asyncio.Event()

    async def never(request, context):
        arrived.set()
        await asyncio.Event().wait()
        yield

    server.servicer.stream_story = never
    async with client.generate("x"):
        await asyncio.wait_for(arrived.wait(), NOTICED_S)
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_breaking_out_of_the_loop_cancels_inside_the_block(server, client):
    server.servicer.stream_story = one_token_then_silence
    async with client.generate("x") as stream:
        async for _ in stream:
            break
        await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)
    assert stream.text == "first"
    with pytest.raises(kvserve.MisuseError, match="not read to its end"):
        _ = stream.result


async def test_an_exception_in_the_block_cancels_the_call(server, client):
    server.servicer.stream_story = one_token_then_silence

    async def fail_in_the_block():
        async with client.generate("x") as stream:
            async for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_in_the_block()
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_cancelling_the_task_cancels_the_call(server, client):
    server.servicer.stream_story = one_token_then_silence
    first = asyncio.Event()

    async def read():
        async with client.generate("x") as stream:
            async for _ in stream:
                first.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(first.wait(), NOTICED_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_cancel_from_another_task_ends_the_iteration_with_a_typed_error(server, client):
    server.servicer.stream_story = one_token_then_silence
    first = asyncio.Event()

    async def read(stream):
        async for _ in stream:
            first.set()

    async with client.generate("x") as stream:
        reading = asyncio.create_task(read(stream))
        await asyncio.wait_for(first.wait(), NOTICED_S)
        stream.cancel()
        with pytest.raises(kvserve.Cancelled):
            await reading
        stream.cancel()
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_a_server_that_answers_cancelled_does_not_cancel_the_callers_task(server, client):
    # grpc.aio raises asyncio.CancelledError for it, which would end this task without a word.
    async def cancelled(request, context):
        await context.abort(grpc.StatusCode.CANCELLED, "cancelled by the operator")
        yield

    server.servicer.stream_story = cancelled
    async with client.generate("x") as stream:
        with pytest.raises(kvserve.Cancelled):
            await stream.collect()


async def test_a_timeout_around_the_stream_is_the_callers_timeout(server, client):
    server.servicer.stream_story = one_token_then_silence
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0), client.generate("x") as stream:
            await stream.collect()
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_closing_the_client_ends_its_streams(server):
    # grpc.aio 1.81 closes the channel and leaves such a stream running.
    server.servicer.stream_story = one_token_then_silence
    client = kvserve.AsyncClient(server.target)
    async with client.generate("x") as stream:
        events = aiter(stream)
        await anext(events)
        await client.aclose()
        with pytest.raises(kvserve.Cancelled):
            await asyncio.wait_for(anext(events), NOTICED_S)
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)
    with pytest.raises(kvserve.MisuseError, match="closed"):
        await client.model_info()


async def test_deadline_of_the_call_ends_it_on_both_sides(server, client):
    server.servicer.stream_story = one_token_then_silence
    async with client.generate("x", timeout_s=0.2) as stream:
        with pytest.raises(kvserve.DeadlineExceeded):
            await stream.collect()
    assert stream.text == "first"
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_default_deadline_travels_with_the_call(server):
    remaining = []

    async def note_deadline(request, context):
        remaining.append(context.time_remaining())
        return generate_pb2.GenerateResponse(samples=[generate_pb2.Sample()])

    server.servicer.unary_story = note_deadline
    async with kvserve.AsyncClient(server.target, timeout_s=40) as client:
        await client.generate_once("x")
        await client.generate_once("x", timeout_s=None)
    assert 30 < remaining[0] <= 40
    assert remaining[1] is None or remaining[1] > 1e6


async def test_stream_outside_a_block_is_refused_and_sends_nothing(server, client):
    stream = client.generate("x")
    with pytest.raises(kvserve.MisuseError, match="async with"):
        async for _ in stream:
            pass
    assert server.servicer.requests == []


async def test_stream_can_be_entered_only_once(client):
    async with client.generate("x") as stream:
        await stream.collect()
    with pytest.raises(kvserve.MisuseError, match="only once"):
        async with stream:
            pass


async def test_samples_fold_apart(server, client):
    async def two_samples(request, context):
        start = generate_pb2.GenerateStart(request_id="r", model="m", seed=1, prompt_tokens=2)
        yield generate_pb2.GenerateEvent(index=1, text="x", token_ids=[10], start=start)
        yield generate_pb2.GenerateEvent(index=0, text="a", token_ids=[20, 21])
        yield generate_pb2.GenerateEvent(
            index=1,
            text="y",
            token_ids=[11],
            finish_reason=generate_pb2.FINISH_REASON_STOP_STRING,
            stop_reason="END",
        )
        yield generate_pb2.GenerateEvent(
            index=0, token_ids=[22], finish_reason=generate_pb2.FINISH_REASON_LENGTH
        )
        yield generate_pb2.GenerateEvent(
            summary=generate_pb2.GenerateSummary(usage=common_pb2.Usage(prompt_tokens=2, generated_tokens=5))
        )

    server.servicer.stream_story = two_samples
    async with client.generate("x", n=2) as stream:
        events = [(event.index, event.text) async for event in stream]
    assert events == [(1, "x"), (0, "a"), (1, "y"), (0, "")]
    first, second = stream.result.samples
    assert (first.text, first.token_ids, first.finish_reason) == ("a", (20, 21, 22), "length")
    assert (second.text, second.token_ids, second.finish_reason) == ("xy", (10, 11), "stop_string")
    assert second.stop_reason == "END"
    assert stream.result.text == "a"
    assert server.servicer.requests[0].parameters.n == 2


async def test_a_stream_without_its_summary_is_an_error(server, client):
    async def cut_short(request, context):
        yield generate_pb2.GenerateEvent(text="a", token_ids=[1], start=generate_pb2.GenerateStart())

    server.servicer.stream_story = cut_short
    async with client.generate("x") as stream:
        with pytest.raises(kvserve.Internal, match="summary"):
            await stream.collect()
    assert stream.text == "a"


async def test_many_streams_share_a_connection(server, client):
    async def collect(i):
        async with client.generate(f"prompt {i}") as stream:
            return (await stream.collect()).text

    assert await asyncio.gather(*map(collect, range(64))) == ["Hello world"] * 64
