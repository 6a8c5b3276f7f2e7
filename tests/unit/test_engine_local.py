"""The engine in a thread: the whole shell, besides the process."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.engine.errors import EngineStartError
from server.engine.interface import Engine, EngineState
from server.engine.local import LocalEngine
from server.engine.loop import EngineParts
from server.engine.messages import Admitted, Failed, FailureKind, Finished, GenerateSpec, Refused, Tokens
from server.engine.streams import EventStream
from tests.fakes import FakeRunner, Poison, expected, local_engine, spec_of


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
async def engine(runner: FakeRunner) -> AsyncIterator[LocalEngine]:
    engine = local_engine(runner)
    await engine.start()
    yield engine
    runner.release_all()
    await engine.stop(grace_s=5)
    assert "engine" not in {thread.name for thread in threading.enumerate()}
    assert engine._desk.streams.num_open == 0


async def generate(engine: Engine, spec: GenerateSpec) -> tuple[list[int], Any]:
    """Return the tokens of the first sample and the terminal event; check the order of events."""
    tokens: list[int] = []
    events = [event async for ready in engine.submit(spec) for event in ready]
    assert isinstance(events[0], Admitted | Refused)
    assert sum(isinstance(event, Finished | Refused | Failed) for event in events) == 1
    for event in events:
        if isinstance(event, Tokens) and event.sample_index == 0:
            tokens += event.token_ids
    return tokens, events[-1]


async def all_of(stream: EventStream) -> list[Any]:
    return [event async for ready in stream for event in ready]


async def free(engine: LocalEngine) -> None:
    """Wait until the engine says that no request holds anything."""
    async with asyncio.timeout(60):
        while (
            (stats := engine.stats) is None
            or stats.num_blocks_leased
            or stats.num_running
            or stats.num_waiting
        ):
            await asyncio.sleep(0.01)


async def test_tokens_arrive_in_order_and_complete(engine: LocalEngine):
    protocol: Engine = engine
    spec = spec_of([1, 2, 3], 50)
    tokens, last = await generate(protocol, spec)
    assert tokens == expected(spec)
    assert isinstance(last, Finished)
    assert last.usage.generated_tokens == 50
    assert engine.ready is not None
    assert engine.ready.family == "fake"
    await free(engine)


async def test_64_concurrent_requests_are_all_exact(engine: LocalEngine):
    draw = random.Random(3)
    specs = [
        spec_of([draw.randrange(1000) for _ in range(draw.randint(1, 60))], draw.randint(1, 40))
        for _ in range(64)
    ]
    results = await asyncio.gather(*(generate(engine, spec) for spec in specs))
    assert [tokens for tokens, _ in results] == [expected(spec) for spec in specs]
    assert {type(last) for _, last in results} == {Finished}


async def test_leaving_at_any_stage_frees_everything_and_disturbs_nobody(engine: LocalEngine):
    async def leave_after(num_lists: int) -> None:
        async with engine.submit(spec_of([7] * 40, 100_000 // 4)) as stream:
            for _ in range(num_lists):
                await anext(stream)

    spec = spec_of([5, 6, 7], 200)
    (tokens, _), *_ = await asyncio.gather(
        generate(engine, spec), *(leave_after(n) for n in (0, 1, 2, 3, 5, 8))
    )
    assert tokens == expected(spec)
    await free(engine)


async def test_cancelled_readers_free_everything(engine: LocalEngine, runner: FakeRunner):
    runner.hold()
    readers = [asyncio.ensure_future(generate(engine, spec_of([k] * 20, 1000))) for k in range(10)]
    while runner.num_steps < 1:
        await asyncio.sleep(0.001)
    for reader in readers:
        reader.cancel()
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    runner.release_all()
    await free(engine)
    assert runner.num_steps <= 3


async def test_cancelling_ends_with_finished(engine: LocalEngine):
    stream = engine.submit(spec_of([1], 10_000))
    events: list[object] = []
    async for ready in stream:
        events += ready
        stream.cancel()
    assert isinstance(events[-1], Finished)


async def test_cancelling_one_sample_leaves_the_other(engine: LocalEngine, runner: FakeRunner):
    runner.hold()
    spec = spec_of([1, 2], 30, num_samples=2, seed=5)
    stream = engine.submit(spec)
    await asyncio.to_thread(runner.wait_for_step)
    runner.release(3)
    for _ in range(3):
        await asyncio.to_thread(runner.wait_for_step)
    stream.cancel(0)
    runner.release_all()
    events = [event async for ready in stream for event in ready]
    other = [t for e in events if isinstance(e, Tokens) and e.sample_index == 1 for t in e.token_ids]
    assert other == expected(spec, sample_index=1)
    assert isinstance(events[-1], Finished)


async def test_a_stuck_reader_delays_nobody(engine: LocalEngine):
    stuck_spec, spec = spec_of([1, 2, 3], 2000), spec_of([4, 5, 6], 100)
    stuck = engine.submit(stuck_spec)
    tokens, _ = await generate(engine, spec)
    assert tokens == expected(spec)
    await free(engine)
    ready = await all_of(stuck)
    assert [type(event) for event in ready] == [Admitted, Tokens, Finished]
    assert ready[1].token_ids == expected(stuck_spec)


async def test_a_full_queue_refuses_without_asking_the_engine(runner: FakeRunner):
    engine = LocalEngine(local_engine(runner)._build, max_waiting=2)
    await engine.start()
    runner.hold()
    running = engine.submit(spec_of([1], 5))
    await anext(running)
    waiting = [engine.submit(spec_of([k], 5)) for k in (2, 3)]
    [refused] = await all_of(engine.submit(spec_of([4], 5)))
    assert (refused.kind, refused.retry_after_s) == (FailureKind.QUEUE_FULL, 1.0)
    runner.release_all()
    for stream in (running, *waiting):
        assert isinstance([event async for ready in stream for event in ready][-1], Finished)
    await engine.stop(grace_s=5)


async def test_a_deadline_that_has_passed_is_refused(engine: LocalEngine, runner: FakeRunner):
    [refused] = await all_of(engine.submit(spec_of([1]), deadline_s=0))
    assert refused.kind is FailureKind.DEADLINE
    assert runner.num_steps == 0


async def test_submitting_before_start_and_after_stop_is_refused():
    engine = local_engine()
    for kind in (FailureKind.ENGINE_LOST, FailureKind.ENGINE_LOST):
        [refused] = await all_of(engine.submit(spec_of([1])))
        assert isinstance(refused, Refused)
        assert refused.kind is kind
        assert refused.retry_after_s is not None
        await engine.stop(grace_s=0)


async def test_draining_finishes_what_runs_and_refuses_what_comes(engine: LocalEngine, runner: FakeRunner):
    runner.hold()
    spec = spec_of([1, 2], 20)
    stream = engine.submit(spec)
    await asyncio.to_thread(runner.wait_for_step)
    stopping = asyncio.ensure_future(engine.stop(grace_s=10))
    await engine.wait_state(EngineState.DRAINING)
    [refused] = await all_of(engine.submit(spec))
    assert refused.kind is FailureKind.DRAINING
    runner.release_all()
    events = [event async for ready in stream for event in ready]
    assert [t for e in events if isinstance(e, Tokens) for t in e.token_ids] == expected(spec)
    await stopping
    assert engine.state is EngineState.DEAD


async def test_what_does_not_drain_in_time_is_ended(engine: LocalEngine):
    stream = engine.submit(spec_of([1], 50_000))
    await anext(stream)
    await engine.stop(grace_s=0.05)
    last = [event async for ready in stream for event in ready][-1]
    assert isinstance(last, Failed)
    assert last.kind is FailureKind.DRAINING


async def test_an_engine_that_breaks_fails_its_streams_and_is_dead(runner: FakeRunner):
    engine = local_engine(runner)
    await engine.start()
    runner.failures = [RuntimeError("broken") for _ in range(3)]
    for _ in range(3):
        _, last = await generate(engine, spec_of([1]))
        assert isinstance(last, Failed)
        assert last.kind is FailureKind.INTERNAL
    await asyncio.wait_for(engine.wait_state(EngineState.DEAD), 60)
    await engine.stop(grace_s=0)


async def test_a_model_that_cannot_be_loaded_says_why():
    def build() -> EngineParts:
        raise ValueError("no weights here")

    engine = LocalEngine(build)
    with pytest.raises(EngineStartError, match="no weights here") as caught:
        await engine.start()
    assert caught.value.kind == "ValueError"
    assert engine.state is EngineState.DEAD
    await engine.stop(grace_s=0)


async def test_a_poisoned_request_fails_alone(engine: LocalEngine):
    spec = spec_of([1, 2, 3], 20)
    (_, failed), (tokens, _) = await asyncio.gather(
        generate(engine, spec_of([Poison.NOT_FINITE])), generate(engine, spec)
    )
    assert isinstance(failed, Failed)
    assert tokens == expected(spec)
