"""The front end's side of a request."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from server.engine.messages import (
    Admitted,
    Cancel,
    Failed,
    FailureKind,
    Finish,
    Finished,
    Refused,
    RequestTimings,
    RequestUsage,
    Tokens,
)
from server.engine.streams import Event, EventStream, StreamTable, merge_events


def finished(key: int) -> Finished:
    return Finished(key, RequestUsage(1, 0, 0, 0, 1, 1), RequestTimings(0, 0, 0, 0))


class Engine:
    """Notes what the front end says."""

    def __init__(self) -> None:
        self.cancels: list[Cancel] = []
        self.table = StreamTable(self.cancels.append)


@pytest.fixture
def engine() -> Engine:
    return Engine()


async def read(stream: EventStream) -> list[list[Any]]:
    return [list(ready) async for ready in stream]


def test_tokens_of_a_sample_are_joined_and_the_terminal_event_stays_last():
    events: list[Event] = [
        Admitted(1, 0),
        Tokens(1, 0, [10], [-1.0], [[(10, -1.0)]]),
        Tokens(1, 1, [20], [-2.0], [[(20, -2.0)]]),
        Tokens(1, 0, [11, 12], [-1.1, -1.2], [[(11, -1.1)], []], Finish.EOS),
        finished(1),
    ]
    before = list(events)
    assert merge_events(events) == [
        Admitted(1, 0),
        Tokens(1, 0, [10, 11, 12], [-1.0, -1.1, -1.2], [[(10, -1.0)], [(11, -1.1)], []], Finish.EOS),
        Tokens(1, 1, [20], [-2.0], [[(20, -2.0)]]),
        finished(1),
    ]
    assert events == before
    assert events[1] == Tokens(1, 0, [10], [-1.0], [[(10, -1.0)]])


async def test_a_reader_gets_what_is_ready_and_then_each_event(engine: Engine):
    stream = engine.table.open()
    engine.table.dispatch([Admitted(1, 0), Tokens(1, 0, [1]), Tokens(1, 0, [2])])
    assert await anext(stream) == [Admitted(1, 0), Tokens(1, 0, [1, 2])]
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert not waiting.done()
    engine.table.dispatch([Tokens(1, 0, [3])])
    assert await waiting == [Tokens(1, 0, [3])]
    engine.table.dispatch([Tokens(1, 0, [4], finish=Finish.LENGTH), finished(1)])
    assert await read(stream) == [[Tokens(1, 0, [4], finish=Finish.LENGTH), finished(1)]]
    assert engine.table.num_open == 0
    assert engine.cancels == []


async def test_each_event_goes_to_its_own_stream(engine: Engine):
    streams = [engine.table.open() for _ in range(3)]
    engine.table.dispatch([Tokens(s.key, 0, [s.key]) for s in reversed(streams)])
    assert [await anext(s) for s in streams] == [[Tokens(s.key, 0, [s.key])] for s in streams]


async def test_there_is_exactly_one_terminal_event(engine: Engine):
    stream = engine.table.open()
    engine.table.dispatch([finished(1), Failed(1, FailureKind.INTERNAL, "twice"), Tokens(1, 0, [9])])
    engine.table.fail_all(FailureKind.ENGINE_LOST, "lost")
    assert await read(stream) == [[finished(1)]]
    assert await read(stream) == []


async def test_a_reader_that_does_not_read_holds_its_tokens_and_nothing_more(engine: Engine):
    stream = engine.table.open()
    engine.table.dispatch([Admitted(1, 0)])
    for position in range(20_000):
        engine.table.dispatch([Tokens(1, position % 2, [position])])
    mailbox = stream._mailbox
    assert len(mailbox.pending) < 20_000
    engine.table.dispatch([finished(1)])
    [ready] = await read(stream)
    assert [type(event) for event in ready] == [Admitted, Tokens, Tokens, Finished]
    assert ready[1].token_ids == list(range(0, 20_000, 2))
    assert ready[2].token_ids == list(range(1, 20_000, 2))


async def test_leaving_cancels_once_and_drops_what_comes_late(engine: Engine):
    stream = engine.table.open()
    await stream.aclose()
    await stream.aclose()
    stream.cancel()
    engine.table.dispatch([Tokens(1, 0, [1]), finished(1)])
    assert engine.cancels == [Cancel(1)]
    assert engine.table.num_open == engine.table.num_waiting == 0
    assert await read(stream) == []


async def test_leaving_an_ended_stream_cancels_nothing(engine: Engine):
    async with engine.table.open():
        engine.table.dispatch([finished(1)])
    assert engine.cancels == []


async def test_a_cancelled_reader_cancels_its_request_and_stays_cancelled(engine: Engine):
    stream = engine.table.open()
    reader = asyncio.ensure_future(read(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert engine.cancels == [Cancel(1)]
    assert engine.table.num_open == 0


async def test_breaking_out_of_the_loop_cancels(engine: Engine):
    async def first() -> list[object]:
        async for ready in engine.table.open():
            return list(ready)
        return []

    reader = asyncio.ensure_future(first())
    await asyncio.sleep(0)
    engine.table.dispatch([Admitted(1, 0)])
    assert await reader == [Admitted(1, 0)]
    await asyncio.sleep(0)
    assert engine.cancels == [Cancel(1)]


async def test_a_stream_that_is_never_read_cancels_when_it_is_dropped(engine: Engine):
    stream = engine.table.open()
    del stream
    gc.collect()
    await asyncio.sleep(0)
    assert engine.cancels == [Cancel(1)]


async def test_a_stream_may_be_dropped_on_another_thread(engine: Engine):
    streams = [engine.table.open()]
    await asyncio.to_thread(streams.clear)
    await asyncio.sleep(0)
    assert engine.cancels == [Cancel(1)]


async def test_cancelling_goes_on_to_the_terminal_event(engine: Engine):
    stream = engine.table.open()
    stream.cancel(1)
    stream.cancel()
    stream.cancel()
    stream.cancel(0)
    assert engine.cancels == [Cancel(1, 1), Cancel(1)]
    engine.table.dispatch([finished(1)])
    assert await read(stream) == [[finished(1)]]
    stream.cancel()
    assert len(engine.cancels) == 2


async def test_two_readers_are_refused_and_the_first_goes_on(engine: Engine):
    stream = engine.table.open()
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await anext(stream)
    engine.table.dispatch([Admitted(1, 0)])
    assert await first == [Admitted(1, 0)]


async def test_a_lost_engine_fails_every_stream_after_what_it_had_said(engine: Engine):
    admitted, waiting = engine.table.open(), engine.table.open()
    engine.table.dispatch([Admitted(admitted.key, 0), Tokens(admitted.key, 0, [7])])
    assert engine.table.fail_all(FailureKind.ENGINE_LOST, "lost") == [admitted.key]
    assert await read(admitted) == [
        [Admitted(1, 0), Tokens(1, 0, [7]), Failed(1, FailureKind.ENGINE_LOST, "lost")]
    ]
    assert await read(waiting) == [[Failed(2, FailureKind.ENGINE_LOST, "lost")]]
    assert engine.table.num_open == 0


async def test_a_refusal_is_the_first_event_and_the_engine_never_hears_of_it(engine: Engine):
    stream = engine.table.refuse(FailureKind.DRAINING, "bye", retry_after_s=2.0)
    assert await read(stream) == [[Refused(1, FailureKind.DRAINING, "bye", 2.0)]]
    assert engine.table.num_open == engine.table.num_waiting == 0
    assert engine.cancels == []


async def test_waiting_samples_are_counted_until_admission(engine: Engine):
    table = engine.table
    first, second = table.open(3), table.open()
    assert table.num_waiting == 4
    table.dispatch([Admitted(first.key, 0), Admitted(first.key, 0)])
    assert table.num_waiting == 1
    await second.aclose()
    table.dispatch([finished(first.key)])
    assert (table.num_waiting, table.num_open) == (0, 0)


async def test_keys_are_never_drawn_twice(engine: Engine):
    keys = []
    for _ in range(5):
        async with engine.table.open() as stream:
            keys.append(stream.key)
    assert keys == [1, 2, 3, 4, 5]
