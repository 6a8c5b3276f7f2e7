"""An engine in a process of its own: killed, stopped, stuck, orphaned, drained, and replaced.

Over a fake worker, which needs no torch in the child; the last test loads a real model.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from server.engine.errors import EngineStartError
from server.engine.interface import Engine, EngineState
from server.engine.messages import Admitted, Failed, FailureKind, Finished, GenerateSpec, Refused, Tokens
from server.engine.options import EngineOptions
from server.engine.process import EngineProcess
from server.engine.streams import EventStream
from server.process import keeper
from server.process.child import ChildLimits
from tests.fakes import Poison, expected, spec_of

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = 1_000_000


def engine_of(model: str = "fake", **limits: float) -> EngineProcess:
    return EngineProcess(
        EngineOptions(model=model, num_blocks=200_000), limits=ChildLimits(**limits), module="tests.fakes"
    )


@pytest.fixture
async def engine() -> AsyncIterator[EngineProcess]:
    engine = engine_of()
    await engine.start()
    yield engine
    await engine.stop(grace_s=0)


async def generate(engine: Engine, spec: GenerateSpec) -> tuple[list[int], Any]:
    events = [event async for ready in engine.submit(spec) for event in ready]
    return [t for e in events if isinstance(e, Tokens) for t in e.token_ids], events[-1]


async def read_to_end(stream: EventStream) -> Any:
    return [event async for ready in stream for event in ready][-1]


async def only_event(stream: EventStream) -> Any:
    """Return the one event of a stream that was refused."""
    [[event]] = [ready async for ready in stream]
    return event


def pid_of(engine: EngineProcess) -> int:
    assert engine.pid is not None
    return engine.pid


def fault_of(engine: EngineProcess) -> str:
    assert engine.fault is not None
    return engine.fault


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Say whether a process exists and is more than a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def restarted(engine: EngineProcess, times: int) -> bool:
    return engine.num_restarts == times


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_64_requests_are_exact_and_nothing_leaks():
    fds, tasks = num_fds(), len(asyncio.all_tasks())
    engine = engine_of()
    await engine.start()
    specs = [spec_of([k, k + 1, k + 2] * (k % 20 + 1), 20 + k) for k in range(64)]
    results = await asyncio.gather(*(generate(engine, spec) for spec in specs))
    assert [tokens for tokens, _ in results] == [expected(spec) for spec in specs]
    assert {type(last) for _, last in results} == {Finished}
    await until(lambda: engine.stats is not None and engine.stats.requests_finished == 64)
    pid = pid_of(engine)
    await engine.stop(grace_s=5)
    await engine.stop(grace_s=5)
    assert engine.state is EngineState.DEAD
    assert not is_alive(pid)
    assert (num_fds(), len(asyncio.all_tasks())) == (fds, tasks)


async def test_leaving_and_cancelling_free_the_blocks(engine: EngineProcess):
    async with engine.submit(spec_of([1] * 100, ENDLESS)) as left:
        await anext(left)
    cancelled = engine.submit(spec_of([2] * 100, ENDLESS))
    await anext(cancelled)
    cancelled.cancel()
    assert isinstance(await read_to_end(cancelled), Finished)
    reader = asyncio.ensure_future(generate(engine, spec_of([3] * 100, ENDLESS)))
    await asyncio.sleep(0.05)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until(lambda: engine.stats is not None and engine.stats.requests_finished == 3)
    assert engine.stats is not None
    assert (engine.stats.num_running, engine.stats.num_blocks_leased) == (0, 0)


async def test_a_killed_engine_fails_its_streams_and_comes_back(
    engine: EngineProcess, caplog: pytest.LogCaptureFixture
):
    streams = [engine.submit(spec_of([k], ENDLESS)) for k in range(1, 6)]
    for stream in streams:
        await anext(stream)
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    lasts = await asyncio.gather(*(read_to_end(stream) for stream in streams))
    assert {(type(last), last.kind) for last in lasts} == {(Failed, FailureKind.ENGINE_LOST)}
    assert engine.state is not EngineState.READY
    refused = await only_event(engine.submit(spec_of([1])))
    assert (type(refused), refused.kind) == (Refused, FailureKind.ENGINE_LOST)
    assert refused.retry_after_s >= 1.0
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    assert engine.pid != pid
    assert engine.num_restarts == 1
    spec = spec_of([1, 2, 3], 20)
    assert (await generate(engine, spec))[0] == expected(spec)
    assert "SIGKILL" in fault_of(engine)
    [record] = [r for r in caplog.records if "requests running then" in r.message]
    assert str([stream.key for stream in streams]) in record.message


async def test_a_killed_engines_streams_fail_within_a_second(engine: EngineProcess):
    """Its socket tells, not its silence. One of three times will do: a busy machine may be late."""
    took_s = math.inf
    for attempt in range(1, 4):
        await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
        stream = engine.submit(spec_of([attempt], ENDLESS))
        await anext(stream)
        killed_s = time.monotonic()
        os.kill(pid_of(engine), signal.SIGKILL)
        assert (await read_to_end(stream)).kind is FailureKind.ENGINE_LOST
        took_s = time.monotonic() - killed_s
        if took_s < 1.0:
            break
    assert took_s < 1.0


async def test_an_idle_engine_that_is_killed_comes_back_too(engine: EngineProcess):
    for restarts in (1, 2):
        os.kill(pid_of(engine), signal.SIGKILL)
        await asyncio.wait_for(engine.wait_state(EngineState.DEAD), 60)
        await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
        await until(partial(restarted, engine, restarts))


async def test_a_request_that_kills_the_engine_is_not_replayed(engine: EngineProcess):
    _, last = await generate(engine, spec_of([Poison.KILL]))
    assert isinstance(last, Failed)
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    spec = spec_of([4, 5], 10)
    assert (await generate(engine, spec))[0] == expected(spec)
    assert engine.num_restarts == 1


async def test_steps_that_fail_in_a_row_replace_the_engine(engine: EngineProcess):
    for _ in range(3):
        _, last = await generate(engine, spec_of([Poison.RAISE]))
        assert isinstance(last, Failed)
        assert last.kind is FailureKind.INTERNAL
    await asyncio.wait_for(engine.wait_state(EngineState.DEAD), 60)
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    assert "EngineBrokenError" in fault_of(engine)
    assert "exit status 2" in fault_of(engine)


@pytest.mark.parametrize(
    ("poison", "limits", "reason"),
    [
        (Poison.HANG, {"watchdog_s": 0.5}, "stuck"),
        (Poison.HANG_HOLDING_ALL, {"silence_s": 2.0, "heartbeat_s": 0.1}, "no sign of life"),
    ],
)
async def test_a_stuck_engine_is_replaced(poison: Poison, limits: dict[str, float], reason: str):
    engine = engine_of(**limits)
    await engine.start()
    pid = pid_of(engine)
    bystander = engine.submit(spec_of([1], ENDLESS))
    await anext(bystander)
    _, last = await asyncio.wait_for(generate(engine, spec_of([poison])), 60)
    assert (type(last), last.kind) == (Failed, FailureKind.ENGINE_LOST)
    assert (await read_to_end(bystander)).kind is FailureKind.ENGINE_LOST
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    assert not is_alive(pid)
    assert reason in fault_of(engine)
    await engine.stop(grace_s=0)


async def test_a_blocked_event_loop_kills_no_engine():
    engine = engine_of(silence_s=1.0, heartbeat_s=0.1)
    await engine.start()
    pid = pid_of(engine)
    time.sleep(2.0)
    await asyncio.sleep(0.5)
    assert engine.state is EngineState.READY
    assert engine.pid == pid
    await engine.stop(grace_s=0)


@pytest.mark.parametrize(
    ("model", "start_s", "kind", "reason"),
    [
        ("fake:refuse", 60.0, "FakeLoadError", "no such model, try another"),
        ("fake:die", 60.0, "EngineStartError", "SIGKILL"),
        ("fake:hang", 1.0, "EngineStartError", "not ready after"),
    ],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing(
    model: str, start_s: float, kind: str, reason: str
):
    fds, tasks = num_fds(), len(asyncio.all_tasks())
    engine = engine_of(model, start_s=start_s)
    with pytest.raises(EngineStartError, match=reason) as caught:
        await engine.start()
    assert caught.value.kind == kind
    assert caught.value.detail is None
    assert "Traceback" not in str(caught.value)
    assert engine.state is EngineState.DEAD
    assert engine.pid is None
    assert (num_fds(), len(asyncio.all_tasks())) == (fds, tasks)
    await engine.stop(grace_s=0)


async def test_a_start_in_debug_brings_the_traceback_along():
    engine = EngineProcess(EngineOptions(model="fake:refuse"), debug=True, module="tests.fakes")
    with pytest.raises(EngineStartError) as caught:
        await engine.start()
    assert caught.value.detail is not None
    assert "raise FakeLoadError" in caught.value.detail


async def test_the_engine_logs_as_the_front_end_does(capfd: pytest.CaptureFixture[str]):
    engine = EngineProcess(
        EngineOptions(model="fake"), log_format="json", log_level="warning", module="tests.fakes"
    )
    await engine.start()
    pid = pid_of(engine)
    await generate(engine, spec_of([Poison.RAISE]))
    await engine.stop(grace_s=5)
    entries = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert {(entry["engine_pid"], entry["time"][-1]) for entry in entries} == {(pid, "Z")}
    assert "info" not in {entry["level"] for entry in entries}


async def test_an_engine_that_was_asked_to_end_is_stopped_not_dead(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    engine = engine_of()
    await engine.start()
    os.kill(pid_of(engine), signal.SIGKILL)
    await asyncio.wait_for(engine.wait_state(EngineState.DEAD), 60)
    await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
    await engine.stop(grace_s=5)
    assert engine.state is EngineState.DEAD
    said = [r.message for r in caplog.records if r.message.startswith("engine is ")]
    assert [line for line in said if line in {"engine is dead", "engine is stopped"}] == [
        "engine is dead",
        "engine is stopped",
    ]


async def test_a_module_that_is_not_there_is_a_failed_start():
    engine = EngineProcess(EngineOptions(model="fake"), module="tests.no_such_module")
    with pytest.raises(EngineStartError, match="exit status 1"):
        await engine.start()


async def test_a_cancelled_start_leaves_nothing():
    fds = num_fds()
    engine = engine_of("fake:hang")
    starting = asyncio.ensure_future(engine.start())
    await until(lambda: engine.pid is not None)
    pid = pid_of(engine)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not is_alive(pid)
    assert num_fds() <= fds  # fewer where an earlier test's leavings went meanwhile


async def test_stopping_while_it_loads_ends_the_start():
    engine = engine_of("fake:hang")
    starting = asyncio.ensure_future(engine.start())
    await until(lambda: engine.pid is not None)
    await engine.stop(grace_s=5)
    with pytest.raises(EngineStartError):
        await starting
    assert engine.state is EngineState.DEAD


async def test_an_engine_that_cannot_start_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(keeper, "MAX_FAILED_STARTS", 2)
    fds = num_fds()
    engine = engine_of(f"fake:once:{tmp_path / 'marker'}")
    await engine.start()
    os.kill(pid_of(engine), signal.SIGKILL)
    with caplog.at_level(logging.CRITICAL):
        await until(lambda: "giving it up" in caplog.text)
    assert engine.state is EngineState.DEAD
    assert engine.fault == "it was there only once"
    refused = await only_event(engine.submit(spec_of([1])))
    assert refused.kind is FailureKind.ENGINE_LOST
    await engine.stop(grace_s=5)
    assert num_fds() == fds


async def test_stopping_during_the_back_off_ends_it(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch):
    os.kill(pid_of(engine), signal.SIGKILL)
    await engine.wait_state(EngineState.DEAD)
    await engine.stop(grace_s=5)
    assert engine.state is EngineState.DEAD
    assert engine.pid is None


async def test_draining_finishes_what_runs_and_refuses_what_comes(engine: EngineProcess):
    spec = spec_of([1, 2, 3], 5000)
    stream = engine.submit(spec)
    first = await anext(stream)
    stopping = asyncio.ensure_future(engine.stop(grace_s=600))
    await engine.wait_state(EngineState.DRAINING)
    refused = await only_event(engine.submit(spec))
    assert refused.kind is FailureKind.DRAINING
    events = [*first, *[event async for ready in stream for event in ready]]
    assert isinstance(events[0], Admitted)
    assert [t for e in events if isinstance(e, Tokens) for t in e.token_ids] == expected(spec)
    assert isinstance(events[-1], Finished)
    await asyncio.wait_for(stopping, 60)


async def test_what_does_not_drain_in_time_is_ended_and_a_second_stop_is_quicker(engine: EngineProcess):
    stream = engine.submit(spec_of([1], ENDLESS))
    await anext(stream)
    patient = asyncio.ensure_future(engine.stop(grace_s=600))
    await engine.wait_state(EngineState.DRAINING)
    await asyncio.wait_for(engine.stop(grace_s=0.1), 60)
    await asyncio.wait_for(patient, 60)
    last = await read_to_end(stream)
    assert (type(last), last.kind) == (Failed, FailureKind.DRAINING)
    assert engine.pid is None or not is_alive(engine.pid)


async def test_an_engine_killed_while_draining_is_not_started_again(engine: EngineProcess):
    stream = engine.submit(spec_of([1], ENDLESS))
    await anext(stream)
    stopping = asyncio.ensure_future(engine.stop(grace_s=600))
    await engine.wait_state(EngineState.DRAINING)
    os.kill(pid_of(engine), signal.SIGKILL)
    last = await read_to_end(stream)
    assert (type(last), last.kind) == (Failed, FailureKind.ENGINE_LOST)
    await asyncio.wait_for(stopping, 60)
    assert engine.num_restarts == 0


async def test_signals_for_the_terminal_are_left_to_the_front_end(engine: EngineProcess):
    spec = spec_of([1, 2], 2000)
    stream = engine.submit(spec)
    await anext(stream)
    os.kill(pid_of(engine), signal.SIGINT)
    os.kill(pid_of(engine), signal.SIGTERM)
    assert isinstance(await read_to_end(stream), Finished)
    assert os.getsid(pid_of(engine)) != os.getsid(0)


FRONT_END = """
import asyncio, sys
from server.engine.options import EngineOptions
from server.engine.process import EngineProcess
from tests.fakes import spec_of

async def main():
    engine = EngineProcess(EngineOptions(model="fake", num_blocks=100_000), module="tests.fakes")
    await engine.start()
    stream = engine.submit(spec_of(eval(sys.argv[1]), 1_000_000))
    await anext(stream)
    print(engine.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("prompt", ["[1]", f"[1] * 600 + [{int(Poison.HANG)}]"])
async def test_the_engine_goes_with_its_front_end(prompt: str):
    """Whether it is generating or stuck in a step."""
    command = [sys.executable, "-c", FRONT_END, prompt]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as front_end:
        assert front_end.stdout is not None
        try:
            line = await asyncio.wait_for(asyncio.to_thread(front_end.stdout.readline), 60)
            pid = int(line)
            assert is_alive(pid)
        finally:
            front_end.kill()
    await until(lambda: not is_alive(pid))


async def test_dropped_streams_are_cancelled_in_the_engine(engine: EngineProcess):
    engine.submit(spec_of([1], ENDLESS))
    gc.collect()
    await until(lambda: engine.stats is not None and engine.stats.requests_finished == 1)


def test_it_runs_on_the_event_loop_that_serves():
    """uvloop's transports inherit from none of asyncio's."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        engine = engine_of()
        await engine.start()
        spec = spec_of([1, 2, 3], 30)
        assert (await generate(engine, spec))[0] == expected(spec)
        stream = engine.submit(spec_of([1], ENDLESS))
        await anext(stream)
        os.kill(pid_of(engine), signal.SIGKILL)
        assert (await read_to_end(stream)).kind is FailureKind.ENGINE_LOST
        await asyncio.wait_for(engine.wait_state(EngineState.READY), 60)
        await engine.stop(grace_s=1)

    # The first loop opens what uvloop keeps for the life of the process.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))
    fds = num_fds()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert num_fds() == fds


@pytest.mark.slow
async def test_the_real_process_serves_the_model_that_comes_with_it():
    pytest.importorskip("server.worker.runner")
    engine = EngineProcess(EngineOptions(model="builtin", num_blocks=64, num_threads=1))
    await asyncio.wait_for(engine.start(), 300)
    try:
        assert engine.ready is not None
        assert engine.ready.num_blocks == 64
        spec = spec_of([5, 6, 7, 8], 12)
        first, last = await generate(engine, spec)
        assert len(first) == 12
        assert isinstance(last, Finished)
        second, again = await generate(engine, spec)
        assert second == first
        assert again.usage.cached_tail_tokens or again.usage.cached_partial_tokens
    finally:
        await engine.stop(grace_s=5)


@pytest.mark.slow
async def test_a_model_folder_that_is_not_there_is_a_typed_refusal(tmp_path: Path):
    pytest.importorskip("server.worker.runner")
    engine = EngineProcess(EngineOptions(model=str(tmp_path / "nothing")))
    with pytest.raises(EngineStartError) as caught:
        await asyncio.wait_for(engine.start(), 300)
    assert caught.value.kind == "ModelLoadError"
