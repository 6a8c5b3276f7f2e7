"""The engine that only pretends."""

from __future__ import annotations

import asyncio
from typing import Any

from server.engine.fake import FakeEngine
from server.engine.interface import Engine, EngineState
from server.engine.messages import Admitted, Failed, FailureKind, Finish, Finished, Refused, Tokens
from tests.fakes import spec_of


async def events_of(engine: Engine, **fields: Any) -> list[Any]:
    return [event async for ready in engine.submit(spec_of([1, 2], **fields)) for event in ready]


async def test_it_gives_every_stream_its_tokens():
    engine = FakeEngine(tokens_per_step=3)
    await engine.start()
    for events in await asyncio.gather(
        *(events_of(engine, max_new_tokens=100, num_samples=2) for _ in range(20))
    ):
        assert isinstance(events[0], Admitted)
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.generated_tokens == 200
        for sample in (0, 1):
            parts = [e for e in events if isinstance(e, Tokens) and e.sample_index == sample]
            assert [t for e in parts for t in e.token_ids] == [3 + sample + p for p in range(100)]
            assert [e.finish for e in parts if e.finish] == [Finish.LENGTH]
    assert engine.stats is not None
    assert engine.stats.requests_finished == 20
    await engine.stop(grace_s=1)
    assert engine.state is EngineState.DEAD


async def test_it_can_be_cancelled_expire_and_be_lost():
    engine = FakeEngine(step_s=0.001)
    await engine.start()
    stream = engine.submit(spec_of([1], 10**9))
    await anext(stream)
    stream.cancel()
    assert isinstance([event async for ready in stream for event in ready][-1], Finished)
    [*_, late] = [e async for r in engine.submit(spec_of([1], 10**9), deadline_s=0.02) for e in r]
    assert isinstance(late, Failed)
    assert late.kind is FailureKind.DEADLINE
    lost = engine.submit(spec_of([1], 10**9))
    await anext(lost)
    engine.lose()
    last: Any = [e async for r in lost for e in r][-1]
    assert last.kind is FailureKind.ENGINE_LOST
    assert isinstance((await events_of(engine))[0], Refused)
    engine.recover()
    assert isinstance((await events_of(engine))[-1], Finished)
    await engine.stop(grace_s=1)


async def test_stopping_ends_what_does_not_end_by_itself():
    engine = FakeEngine()
    await engine.start()
    stream = engine.submit(spec_of([1], 10**9))
    await anext(stream)
    await engine.stop(grace_s=0.05)
    last: Any = [e async for r in stream for e in r][-1]
    assert last.kind is FailureKind.DRAINING
