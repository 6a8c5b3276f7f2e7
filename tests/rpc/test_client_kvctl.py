"""``kvctl`` as a process of its own against a real server."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import grpc
import pytest_asyncio

import kvserve
from kvserve.v1 import generate_pb2
from tests.rpc.scripted_server import scripted_server

NOTICED_S = 60.0


@pytest_asyncio.fixture
async def server():
    async with scripted_server() as running:
        yield running


async def start_kvctl(*arguments, **environment):
    # The width of whoever runs the tests is not the commands'.
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvserve._cli",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**inherited, "PYTHONPATH": str(Path(kvserve.__file__).parents[1]), **environment},
    )


async def kvctl(*arguments, typed="", **environment):
    """Run to the end; return exit code, standard output, standard error."""
    process = await start_kvctl(*arguments, **environment)
    out, err = await asyncio.wait_for(process.communicate(typed.encode()), NOTICED_S)
    return process.returncode, out.decode(), err.decode()


async def test_generate_writes_the_text_and_statistics_apart(server):
    code, out, err = await kvctl(
        "generate", "Say hello", "--max-new-tokens", "3", "--temperature", "0.5", "--stop", "a",
        "--stop", "b", "--no-prefix-read", "--stats", "--target", server.target,
    )  # fmt: skip
    assert (code, out) == (0, "Hello world\n")
    assert err.startswith("[prompt 20 tokens, 16 cached | first token ")
    assert err.endswith("| eos]\n")
    request = server.servicer.requests[0]
    assert request.text == "Say hello"
    assert request.parameters.max_new_tokens == 3
    assert request.parameters.stop == ["a", "b"]
    assert request.cache.read_prefix is False
    assert not request.cache.HasField("write_prefix")
    assert not request.parameters.HasField("top_k")


async def test_generate_as_json_from_standard_input(server):
    code, out, _ = await kvctl("--target", server.target, "generate", "-", "--json", typed="a prompt")
    assert code == 0
    answer = json.loads(out)
    assert answer["samples"][0]["text"] == "Hello world"
    assert answer["usage"]["prompt_tokens"] == 20
    assert server.servicer.requests[0].text == "a prompt"


async def test_target_and_key_come_from_the_environment(server):
    code, out, _ = await kvctl("info", "--json", KVSERVE_TARGET=server.target, KVSERVE_API_KEY="k1")
    assert code == 0
    assert json.loads(out)["name"] == "scripted"
    assert ("authorization", "Bearer k1") in server.servicer.metadata[0]


async def test_tokenize_and_info(server):
    code, out, err = await kvctl("tokenize", "ab", "--target", server.target)
    assert (code, out, err) == (0, "97 98\n", "[2 tokens, the model takes 4096]\n")
    code, out, _ = await kvctl("tokenize", "ab", "--pieces", "--target", server.target)
    assert (code, out) == (0, "97\t'a'\n98\t'b'\n")
    code, out, _ = await kvctl("info", "--target", server.target)
    assert code == 0
    assert "num parameters     3,574,528\n" in out


async def test_health_has_exit_codes(server):
    assert (await kvctl("health", "--target", server.target))[:2] == (0, "serving\n")
    await server.set_not_serving()
    assert (await kvctl("health", "--target", server.target))[:2] == (3, "not_serving\n")
    assert (await kvctl("health", "--wait", "0.2", "--target", server.target))[0] == 5


async def test_errors_are_one_line_and_an_exit_code(server):
    code, out, err = await kvctl("info", "--model", "nope", "--target", server.target)
    assert (code, out, err) == (1, "", "kvctl: no model named 'nope'\n")

    code, _, err = await kvctl("info", "--target", "127.0.0.1:1")
    assert code == 3
    assert err.startswith("kvctl: 127.0.0.1:1 is unavailable: ")
    assert err.count("\n") == 1

    async def refuse(request, context):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "an API key is needed")
        yield

    server.servicer.stream_story = refuse
    code, _, err = await kvctl("generate", "x", "--target", server.target)
    assert (code, err) == (4, "kvctl: an API key is needed\n")


async def test_a_mistyped_option_is_a_usage_error(server):
    code, _, err = await kvctl("generate", "x", "--max-tokens", "3")
    assert code == 2
    assert "--max-tokens" in err


async def test_interrupt_cancels_the_call_and_exits_130(server):
    async def silent(request, context):
        yield generate_pb2.GenerateEvent(text="first", token_ids=[1], start=generate_pb2.GenerateStart())
        await asyncio.Event().wait()

    server.servicer.stream_story = silent
    process = await start_kvctl("generate", "x", "--target", server.target)
    assert await asyncio.wait_for(process.stdout.readexactly(5), NOTICED_S) == b"first"
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), NOTICED_S) == 130
    assert b"Traceback" not in await process.stderr.read()
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)


async def test_chat_keeps_the_conversation(server):
    code, out, err = await kvctl(
        "chat",
        "--system",
        "Be brief.",
        "--stats",
        "--target",
        server.target,
        typed="one\n\ntwo\n/reset\nthree\n",
    )
    assert (code, out) == (0, "Hello world\n" * 3)
    assert err.count("16 cached") == 3
    turns = [
        [(message.role, message.content) for message in request.chat.messages]
        for request in server.servicer.requests
    ]
    assert turns == [
        [("system", "Be brief."), ("user", "one")],
        [("system", "Be brief."), ("user", "one"), ("assistant", "Hello world"), ("user", "two")],
        [("system", "Be brief."), ("user", "three")],
    ]


async def test_interrupt_stops_an_answer_and_the_conversation_goes_on(server):
    async def silent(request, context):
        yield generate_pb2.GenerateEvent(text="first", token_ids=[1], start=generate_pb2.GenerateStart())
        await asyncio.Event().wait()

    server.servicer.stream_story = silent
    process = await start_kvctl("chat", "--stats", "--target", server.target)
    process.stdin.write(b"one\n")
    assert await asyncio.wait_for(process.stdout.readexactly(5), NOTICED_S) == b"first"
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(server.servicer.cancelled.wait(), NOTICED_S)
    assert await asyncio.wait_for(process.stderr.readline(), NOTICED_S) == b"[stopped]\n"
    process.stdin.write(b"two\n")
    assert await asyncio.wait_for(process.stdout.readexactly(6), NOTICED_S) == b"\nfirst"
    process.send_signal(signal.SIGINT)
    process.stdin.write_eof()
    assert await asyncio.wait_for(process.wait(), NOTICED_S) == 0
    said = [(message.role, message.content) for message in server.servicer.requests[1].chat.messages]
    assert said == [("user", "one"), ("assistant", "first"), ("user", "two")]
