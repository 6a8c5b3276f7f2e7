"""Events of reuse on their way to those who watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from server.predict.messages import EventKind, ReuseEvent
from server.predict.reuse_hub import ReuseHub


def events(*numbers: int) -> list[ReuseEvent]:
    return [ReuseEvent(kind=EventKind.LIFETIME, key=str(number)) for number in numbers]


async def begun(hub: ReuseHub) -> tuple[AsyncGenerator[ReuseEvent], asyncio.Task[ReuseEvent]]:
    """Return a watch that has begun, and its first event."""
    watch = hub.watch()
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    return watch, first


async def test_every_watcher_gets_what_comes_from_now_on_in_order():
    hub = ReuseHub()
    hub.dispatch(events(0))
    (one, first_of_one), (two, first_of_two) = await begun(hub), await begun(hub)
    assert hub.num_watchers == 2
    hub.dispatch(events(1, 2))
    for watch, first in ((one, first_of_one), (two, first_of_two)):
        assert [(await first).key, (await anext(watch)).key] == ["1", "2"]
    await one.aclose()
    assert hub.num_watchers == 1
    await two.aclose()


async def test_a_slow_watcher_loses_the_oldest_and_is_told_how_many_before_the_rest():
    hub = ReuseHub(max_waiting=3)
    watch, first = await begun(hub)
    hub.dispatch(events(1))
    await first
    hub.dispatch(events(*range(10)))
    told = [await anext(watch) for _ in range(4)]
    assert [(event.kind, event.num_lost) for event in told[:1]] == [(EventKind.LOST, 7)]
    assert [event.key for event in told[1:]] == ["7", "8", "9"]
    hub.dispatch(events(11))
    assert (await anext(watch)).key == "11"
    await watch.aclose()


async def test_what_the_process_says_it_lost_adds_up_when_it_is_lost_here():
    hub = ReuseHub(max_waiting=2)
    watch, first = await begun(hub)
    hub.dispatch(events(1))
    await first
    hub.dispatch([ReuseEvent(kind=EventKind.LOST, num_lost=40), *events(2, 3, 4)])
    assert [(await anext(watch)).num_lost, (await anext(watch)).key] == [41, "3"]
    await watch.aclose()


async def test_closing_ends_watches_after_what_waits():
    hub = ReuseHub()
    watch, first = await begun(hub)
    hub.dispatch(events(1, 2))
    hub.close()
    hub.close()
    assert [(await first).key, *[event.key async for event in watch]] == ["1", "2"]
    assert [event async for event in hub.watch()] == []
    assert hub.num_watchers == 0
