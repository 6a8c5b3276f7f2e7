"""Watching the cache: filters, slow readers, gaps, restarts, and no events while nobody looks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio

from kvserve.v1 import cache_admin_pb2 as pb
from server.engine.admin_messages import CacheEventKind, CacheEventNote, CacheEvents
from server.engine.fake import FakeEngine
from server.engine.model_slot import ModelSlot
from server.rpc.cache_admin_read import WatchFilter
from server.rpc.cache_watch import Watcher, WatchHub
from server.rpc.errors import CallError, Unavailable
from tests.rpc.harness import READY, refused, serving
from tests.rpc.test_cache_admin import HERE, world

HERE_NAMESPACE, OTHER_NAMESPACE = "a" * 16, "b" * 16


class Source(FakeEngine):
    """An engine whose watch says what the test puts in; counts how often it was switched on and off."""

    def __init__(self) -> None:
        super().__init__(ready=READY)
        self.messages: asyncio.Queue[CacheEvents | None] = asyncio.Queue()
        self.num_on = 0
        self.num_off = 0
        self.epoch = 1
        self.prefix_id = "ab" * 32
        self._sequence = 0

    async def watch(self) -> AsyncGenerator[CacheEvents]:
        self.num_on += 1
        try:
            yield CacheEvents(self.epoch, [])
            while (message := await self.messages.get()) is not None:
                yield message
        finally:
            self.num_off += 1

    async def stop(self, *, grace_s: float) -> None:
        await super().stop(grace_s=grace_s)
        self.messages.put_nowait(None)

    def say(self, count: int = 1, *, kind: str = "stored", namespace: str = HERE_NAMESPACE) -> None:
        notes = []
        for _ in range(count):
            self._sequence += 1
            notes.append(
                CacheEventNote(
                    self._sequence,
                    CacheEventKind(kind),
                    namespace,
                    self.prefix_id,
                    32,
                    2,
                    1.5,
                    "admin",
                    "disk",
                )
            )
        self.messages.put_nowait(CacheEvents(self.epoch, notes))

    def skip(self, count: int) -> None:
        self._sequence += count

    def restart(self) -> None:
        self.epoch += 1
        self._sequence = 0
        self.messages.put_nowait(CacheEvents(self.epoch, []))


class Losses:
    """Notes what the hub observes."""

    def __init__(self) -> None:
        self.count = 0
        self.num_lost = 0

    def watchers(self, count: int) -> None:
        self.count = count

    def watch_lost(self, count: int) -> None:
        self.num_lost += count


@asynccontextmanager
async def hub_of(source: Source, max_waiting: int = 4) -> AsyncIterator[tuple[WatchHub, Losses]]:
    losses = Losses()
    hub = WatchHub(source, observer=losses, max_waiting=max_waiting)
    yield hub, losses
    await hub.close()
    assert source.num_on == source.num_off


async def settle(source: Source) -> None:
    """Let the hub take everything that has been said."""
    while not source.messages.empty():
        await asyncio.sleep(0)
    await asyncio.sleep(0)


async def joined(hub: WatchHub, wanted: WatchFilter | None = None) -> Watcher:
    watcher = hub.join(wanted or WatchFilter())
    await watcher.has_begun.wait()
    return watcher


async def sequences(watcher: Watcher, count: int) -> list[tuple[int, int]]:
    """Return sequence and losses of the next events."""
    events = [await watcher.next() for _ in range(count)]
    return [(event.sequence, event.num_lost) for event in events]


# -- the hub --------------------------------------------------------------------------------------------


async def test_every_watcher_gets_what_its_filter_lets_through() -> None:
    source = Source()
    async with hub_of(source, max_waiting=100) as (hub, losses):
        everything = await joined(hub)
        evictions = await joined(hub, WatchFilter(kinds=frozenset({pb.CACHE_EVENT_KIND_EVICTED})))
        other = await joined(hub, WatchFilter(namespace=OTHER_NAMESPACE))
        source.say()
        source.say(kind="evicted")
        source.say(namespace=OTHER_NAMESPACE)
        source.say(kind="evicted", namespace=OTHER_NAMESPACE)
        assert await sequences(everything, 4) == [(1, 0), (2, 0), (3, 0), (4, 0)]
        assert await sequences(evictions, 2) == [(2, 0), (4, 0)]
        event = await other.next()
        assert (event.kind, event.namespace, event.epoch) == (
            pb.CACHE_EVENT_KIND_STORED,
            OTHER_NAMESPACE,
            1,
        )
        assert (event.num_tokens, event.num_blocks, event.tier, event.cause) == (32, 2, "disk", "admin")
        assert source.num_on == 1
        assert losses.num_lost == 0


async def test_what_a_slow_reader_misses_is_told_with_the_next_event_it_gets() -> None:
    source = Source()
    async with hub_of(source, max_waiting=4) as (hub, losses):
        slow, quick = await joined(hub), await joined(hub)
        for _ in range(50):
            source.say(2)
            assert len(await sequences(quick, 2)) == 2
        assert await sequences(slow, 4) == [(1, 0), (2, 0), (3, 0), (4, 0)]
        source.say()
        assert await sequences(slow, 1) == [(101, 96)]
        assert losses.num_lost == 96
        source.say()
        assert await sequences(slow, 1) == [(102, 0)]


async def test_events_that_a_filter_drops_are_not_lost() -> None:
    source = Source()
    async with hub_of(source, max_waiting=2) as (hub, losses):
        watcher = await joined(hub, WatchFilter(namespace=OTHER_NAMESPACE))
        source.say(100)
        source.say(namespace=OTHER_NAMESPACE)
        assert await sequences(watcher, 1) == [(101, 0)]
        assert losses.num_lost == 0


async def test_a_gap_of_the_engine_counts_as_lost_for_everybody() -> None:
    source = Source()
    async with hub_of(source, max_waiting=100) as (hub, losses):
        first, second = await joined(hub), await joined(hub, WatchFilter(namespace=HERE_NAMESPACE))
        source.skip(1000)  # before the first event nobody watched
        source.say()
        source.skip(7)
        source.say(2)
        for watcher in (first, second):
            assert await sequences(watcher, 3) == [(1001, 0), (1009, 7), (1010, 0)]
        assert losses.num_lost == 14


async def test_a_restart_of_the_engine_is_a_reset_with_the_new_epoch() -> None:
    source = Source()
    async with hub_of(source, max_waiting=2) as (hub, _):
        watcher = await joined(hub)
        some_kinds = await joined(hub, WatchFilter(kinds=frozenset({pb.CACHE_EVENT_KIND_STORED})))
        source.say()
        assert await sequences(watcher, 1) == [(1, 0)]
        source.restart()
        source.say()
        reset = await watcher.next()
        assert (reset.kind, reset.epoch, reset.num_lost) == (pb.CACHE_EVENT_KIND_RESET, 2, 0)
        event = await watcher.next()
        assert (event.sequence, event.epoch, event.num_lost) == (1, 2, 0)
        assert await sequences(some_kinds, 2) == [(1, 0), (1, 0)]
        later = await joined(hub)  # begins in the new epoch: nothing to reset
        source.say()
        assert await sequences(later, 1) == [(2, 0)]


async def test_a_reset_reaches_a_reader_whose_queue_is_full_and_100_take_no_more_room() -> None:
    source = Source()
    async with hub_of(source, max_waiting=2) as (hub, _):
        watcher = await joined(hub)
        source.say(5)
        await settle(source)
        for _ in range(100):
            source.restart()
        await settle(source)
        assert len(watcher._waiting) == 2
        assert await sequences(watcher, 1) == [(1, 0)]
        reset = await watcher.next()
        assert (reset.kind, reset.epoch, reset.num_lost) == (pb.CACHE_EVENT_KIND_RESET, 101, 4)


async def test_the_engine_is_watched_only_while_somebody_does() -> None:
    source = Source()
    async with hub_of(source) as (hub, losses):
        assert source.num_on == 0
        first, second = await joined(hub), await joined(hub)
        assert (source.num_on, losses.count) == (1, 2)
        hub.leave(first)
        assert source.num_off == 0
        hub.leave(second)
        hub.leave(second)
        assert losses.count == 0
        while not source.num_off:
            await asyncio.sleep(0)
        await joined(hub)
        assert (source.num_on, source.num_off) == (2, 1)


async def test_the_end_of_the_engine_ends_its_watchers_after_what_waits() -> None:
    source = Source()
    async with hub_of(source) as (hub, _):
        watcher = await joined(hub)
        source.say()
        source.messages.put_nowait(None)
        assert await sequences(watcher, 1) == [(1, 0)]
        with pytest.raises(Unavailable):
            await watcher.next()


async def test_a_watch_that_breaks_is_an_error_and_not_silence() -> None:
    class Broken(Source):
        async def watch(self) -> AsyncGenerator[CacheEvents]:
            self.num_on += 1
            self.num_off += 1
            yield CacheEvents(1, [])
            raise RuntimeError("broken")

    async with hub_of(Broken()) as (hub, _):
        watcher = hub.join(WatchFilter())
        with pytest.raises(CallError, match="failed"):
            await watcher.next()


# -- the stream -----------------------------------------------------------------------------------------


async def test_events_of_a_real_cache_arrive_in_order() -> None:
    async with world() as w:
        await w.generate()
        async with opened(w.admin.WatchCache(pb.WatchCacheRequest())) as watch:
            await w.admin.PinPrefix(pb.PinPrefixRequest(prefix=HERE))
            await w.admin.UnpinPrefix(pb.UnpinPrefixRequest(prefix=HERE))
            w.desk.skip_sequence(3)
            await w.admin.ClearCache(pb.ClearCacheRequest())
            events = [await watch.read() for _ in range(3)]
        assert [event.kind for event in events] == [
            pb.CACHE_EVENT_KIND_PINNED,
            pb.CACHE_EVENT_KIND_UNPINNED,
            pb.CACHE_EVENT_KIND_EVICTED,
        ]
        assert [event.num_lost for event in events] == [0, 0, 3]
        assert events[2].cause == "admin"
        assert {event.epoch for event in events} == {w.desk.epoch}
        assert w.server.sample("kvserve_cache_watch_lost_events_total") == 3
        async with asyncio.timeout(60):
            while w.desk._is_watched or w.server.sample("kvserve_cache_watchers"):
                await asyncio.sleep(0.01)


async def test_a_watch_outlives_its_engine() -> None:
    sources: list[Source] = []

    def make() -> Source:
        sources.append(Source())
        sources[-1].epoch = len(sources)
        return sources[-1]

    slot = ModelSlot(make)
    async with (
        serving(slot, model_control=slot) as server,
        opened(server.admin.WatchCache(pb.WatchCacheRequest())) as watch,
    ):
        sources[0].say()
        assert (await watch.read()).epoch == 1
        await server.admin.UnloadModel(pb.UnloadModelRequest())
        async for _ in server.admin.LoadModel(pb.LoadModelRequest()):
            pass
        reset = await watch.read()
        assert (reset.kind, reset.epoch) == (pb.CACHE_EVENT_KIND_RESET, 2)
        sources[1].say()
        assert (await watch.read()).sequence == 1


async def test_a_reader_that_stops_reading_is_ended_at_the_write_timeout() -> None:
    source = Source()
    source.prefix_id = "ab" * 4096  # fills any window soon
    async with serving(source, write_timeout_s=0.2) as server:
        options = [("grpc.http2.lookahead_bytes", 1 << 10), ("grpc.http2.bdp_probe", 0)]
        async with aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            watch: Any = channel.unary_stream("/kvserve.v1.CacheAdminService/WatchCache")(b"")
            await watch.initial_metadata()
            # The transport takes some; then nothing moves, and the queue stays as small as it is.
            async with asyncio.timeout(60):
                while server.front_end.num_active_calls:
                    if source.messages.empty():
                        source.say(100)
                    await asyncio.sleep(0)
            refusal = await refused(watch)
            assert refusal.code in (grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED)
        lost = server.sample("kvserve_cache_watch_lost_events_total")
        assert lost is not None
        assert lost > 0
        while not source.num_off:
            await asyncio.sleep(0)


async def test_a_watch_can_begin_before_the_engine_is_there() -> None:
    slot = ModelSlot(Source)
    async with serving(slot, model_control=slot, started=False) as server:
        watch = server.admin.WatchCache(pb.WatchCacheRequest())
        reading = asyncio.ensure_future(watch.read())
        async with asyncio.timeout(60):
            while not server.front_end.num_active_calls:
                await asyncio.sleep(0)
        await slot.load()
        assert isinstance(slot._engine, Source)
        slot._engine.say()
        assert (await reading).sequence == 1
        watch.cancel()


@asynccontextmanager
async def opened(watch: Any) -> AsyncIterator[Any]:
    """Wait until the watch has begun; cancel it in the end."""
    await watch.initial_metadata()
    try:
        yield watch
    finally:
        watch.cancel()


async def test_a_source_of_the_test_is_closed_as_an_engines_watch_is() -> None:
    source = Source()
    async with aclosing(source.watch()) as messages:
        assert await anext(messages) == CacheEvents(1, [])
    assert source.num_off == 1
