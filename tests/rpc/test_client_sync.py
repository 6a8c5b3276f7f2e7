"""The blocking client against a real server, which runs on the test's loop while the client has a thread."""

import asyncio
import threading

import pytest
import pytest_asyncio

import kvserve
from kvserve.v1 import generate_pb2
from tests.rpc.scripted_server import scripted_server

NOTICED_S = 60.0


@pytest_asyncio.fixture
async def server():
    async with scripted_server() as running:
        yield running


async def one_token_then_silence(request, context):
    yield generate_pb2.GenerateEvent(text="first", token_ids=[1], start=generate_pb2.GenerateStart())
    await asyncio.Event().wait()


async def in_thread(server, story):
    """Run ``story(client)`` in a thread with a client of its own."""

    def run():
        with kvserve.Client(server.target, timeout_s=20) as client:
            return story(client)

    return await asyncio.to_thread(run)


async def test_stream_and_result(server):
    def story(client):
        with client.generate("Say hello", temperature=0.5) as stream:
            texts = [event.text for event in stream]
        return texts, stream.result

    texts, result = await in_thread(server, story)
    assert texts == ["Hel", "lo", " world"]
    assert result.text == "Hello world"
    assert result.usage.cached_tokens == 16
    assert server.servicer.requests[0].parameters.temperature == 0.5


async def test_unary_calls(server):
    def story(client):
        return client.generate_once("x"), client.tokenize("ab"), client.detokenize([97]), client.model_info()

    result, tokens, text, info = await in_thread(server, story)
    assert (result.text, tokens.token_ids, text, info.name) == ("Hello", (97, 98), "a", "scripted")


async def test_leaving_the_block_cancels_the_call_at_the_server(server):
    server.servicer.stream_story = one_token_then_silence
    may_leave = threading.Event()

    def story(client):
        with client.generate("x") as stream:
            events = iter(stream)
            next(events)
        assert may_leave.wait(NOTICED_S)  # The client is still open: it was the block that ended the call.

    task = asyncio.create_task(in_thread(server, story))
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)
    may_leave.set()
    await task


async def test_breaking_out_of_the_loop_cancels_inside_the_block(server):
    server.servicer.stream_story = one_token_then_silence
    may_leave = threading.Event()

    def story(client):
        with client.generate("x") as stream:
            for _ in stream:
                break
            assert may_leave.wait(NOTICED_S)
        return stream.text

    task = asyncio.create_task(in_thread(server, story))
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)
    may_leave.set()
    assert await task == "first"


async def test_cancel_from_another_thread(server):
    server.servicer.stream_story = one_token_then_silence
    first = threading.Event()

    def read(stream):
        for _ in stream:
            first.set()

    def story(client):
        with client.generate("x") as stream:
            canceller = threading.Thread(target=lambda: first.wait(NOTICED_S) and stream.cancel())
            canceller.start()
            with pytest.raises(kvserve.Cancelled):
                read(stream)
            canceller.join()

    await in_thread(server, story)
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_deadline(server):
    server.servicer.stream_story = one_token_then_silence

    def story(client):
        with client.generate("x", timeout_s=0.2) as stream, pytest.raises(kvserve.DeadlineExceeded):
            stream.collect()

    await in_thread(server, story)


async def test_stream_outside_a_block_is_refused(server):
    def story(client):
        with pytest.raises(kvserve.MisuseError, match=r"with client\.generate"):
            next(iter(client.generate("x")))

    await in_thread(server, story)
    assert server.servicer.requests == []


async def test_closed_client_refuses(server):
    def story(client):
        client.close()
        with pytest.raises(kvserve.MisuseError, match="closed"):
            client.model_info()

    await in_thread(server, story)


async def test_health_and_wait_ready(server):
    def story(client):
        client.wait_ready(timeout_s=10)
        return client.check_health()

    assert await in_thread(server, story) is kvserve.HealthStatus.SERVING
    await server.set_not_serving()

    def late(client):
        with pytest.raises(kvserve.DeadlineExceeded, match="not_serving"):
            client.wait_ready(timeout_s=0.2)

    await in_thread(server, late)
