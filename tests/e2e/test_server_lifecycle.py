"""A server that is stopped, or whose engine is killed, under load."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from kvserve.v1 import generate_pb2 as pb
from tests.e2e.server_process import SMALL, server

Code = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
LONG = pb.GenerateRequest(
    token_ids={"ids": [5, 6, 7]}, parameters={"max_new_tokens": 3000, "ignore_eos": True}
)
SHORT = pb.GenerateRequest(
    token_ids={"ids": [5, 6, 7]}, parameters={"max_new_tokens": 200, "ignore_eos": True}
)


def code_of(stream: Any) -> Code:
    """Read a stream to its end; return how it ended."""
    try:
        for _ in stream:
            pass
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def wait_status(watch: Any, *, serving: bool) -> None:
    for answer in watch:
        if (answer.status == SERVING) is serving:
            return
    raise AssertionError("the health stream ended")


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_turns_health_finishes_what_runs_and_exits_0() -> None:
    with server("--port", "0", *SMALL) as process:
        process.wait_ready()
        engine = process.engine()
        with process.stub() as stub, process.channel() as channel:
            watch = process.health(channel)
            wait_status(watch, serving=True)
            stream = stub.StreamGenerate(SHORT, timeout=60)
            num_tokens = len(next(stream).token_ids)
            process.signal(signal.SIGINT)
            wait_status(watch, serving=False)
            assert process.process.poll() is None
            num_tokens += sum(len(event.token_ids) for event in stream)
            assert num_tokens == 200
        assert process.wait() == 0
        assert gone(engine)
        assert "Traceback" not in process.text
        assert process.lines[-1] == "stopped"


def test_keys_are_asked_for_and_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {tenant: alice, key: alice-key-0123456789}\n")
    metadata = (("authorization", "Bearer alice-key-0123456789"),)
    with server("--port", "0", "--api-keys-file", str(keys), *SMALL) as process:
        process.wait_ready()
        engine = process.engine()
        with process.stub() as stub:
            assert code_of(stub.StreamGenerate(SHORT, timeout=10)) is Code.UNAUTHENTICATED
            stream = stub.StreamGenerate(LONG, timeout=60, metadata=metadata)
            next(stream)
            process.signal(signal.SIGTERM)
            process.wait_for("^stopping: 1 calls")
            process.signal(signal.SIGTERM)
            assert process.wait(timeout_s=30) == 128 + signal.SIGTERM
            assert code_of(stream) is Code.UNAVAILABLE
        engine.wait(60)
    assert "alice-key" not in process.text


def test_killed_engine_ends_streams_at_once_and_comes_back() -> None:
    with server("--port", "0", *SMALL) as process:
        process.wait_ready()
        with process.stub() as stub, process.channel() as channel:
            watch = process.health(channel)
            wait_status(watch, serving=True)
            before = stub.Generate(SHORT, timeout=60)
            streams = [stub.StreamGenerate(LONG, timeout=60) for _ in range(3)]
            for stream in streams:
                next(stream)
            killed_s = time.monotonic()
            os.kill(process.engine().pid, signal.SIGKILL)
            assert {code_of(stream) for stream in streams} == {Code.UNAVAILABLE}
            wait_status(watch, serving=False)
            assert time.monotonic() - killed_s < 4.0  # by its silence it would be noticed after five seconds
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(SHORT, timeout=10)
            assert caught.value.code() is Code.UNAVAILABLE
            wait_status(watch, serving=True)
            after = stub.Generate(SHORT, timeout=60)
            assert after.samples[0].token_ids == before.samples[0].token_ids
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_engine_killed_while_loading_ends_the_server_with_an_error() -> None:
    with server("--port", "0", *SMALL) as process:
        process.wait_for("^loading")
        children: list[psutil.Process] = []
        end_s = time.monotonic() + 30
        while not children and time.monotonic() < end_s:
            children = psutil.Process(process.process.pid).children()
        children[0].kill()
        assert process.wait() == 1
        assert "kvserve: error: the engine process ended while starting" in process.text
        assert "Traceback" not in process.text


def test_signal_while_loading_ends_cleanly() -> None:
    with server("--port", "0", *SMALL) as process:
        process.wait_for("^loading")
        process.signal(signal.SIGTERM)
        assert process.wait() in (0, -signal.SIGTERM)
        assert "Traceback" not in process.text


def test_killed_server_takes_its_engine_along() -> None:
    with server("--port", "0", *SMALL) as process:
        process.wait_ready()
        engine = process.engine()
        process.process.kill()
        engine.wait(60)
