"""``client.cache`` and ``client.models`` against a server that keeps a little state."""

import asyncio

import pytest
import pytest_asyncio

import kvserve
from kvserve import CacheEventKind, PinKind, PrefixId
from kvserve.v1 import cache_admin_pb2 as pb
from tests.rpc.scripted_server import scripted_server

NOTICED_S = 60.0


@pytest_asyncio.fixture
async def server():
    async with scripted_server() as running:
        yield running


@pytest_asyncio.fixture
async def client(server):
    async with kvserve.AsyncClient(server.target, timeout_s=20) as running:
        yield running


async def test_a_report_has_totals_namespaces_and_tiers(server, client):
    server.cache.add("a prefix of 20 bytes", in_use=True)
    server.cache.add("12 bytes now", namespace="ns-two", tenant="globex")
    report = await client.cache.stats()
    assert (report.num_blocks_in_use, report.num_blocks_cached, report.num_blocks_free) == (5, 3, 56)
    assert (report.total.entries, report.total.reused_tokens) == (2, 400)
    assert report.total.evicted_blocks == {"capacity": 7, "admin": 2}
    assert [(space.namespace, space.tenant) for space in report.namespaces] == [
        ("ns-main", "acme"),
        ("ns-two", "globex"),
    ]
    assert [(tier.tier, tier.is_available, tier.last_fault) for tier in report.tiers] == [
        ("disk", True, ""),
        ("redis", False, "unreachable"),
    ]
    assert (await client.cache.stats("ns-two")).total.entries == 1


async def test_prefixes_come_page_by_page_and_only_as_needed(server, client):
    entries = [server.cache.add(f"prefix number {i:02}", value=-i) for i in range(7)]
    found = [info async for info in client.cache.prefixes(page_size=3)]
    assert [info.prefix_id.value for info in found] == [entry.prefix_id for entry in entries]
    assert [request.page_token for request in server.cache.requests] == ["", "3", "6"]
    async for _ in client.cache.prefixes(page_size=3):
        break
    assert len(server.cache.requests) == 4


async def test_prefixes_are_filtered_by_the_server(server, client):
    server.cache.add("old and pinned..", age_s=100, pin=pb.PIN_KIND_HARD, lifetime_s=30, tiers={"disk": 4})
    server.cache.add("young", age_s=1, tenant="globex")
    [old] = [info async for info in client.cache.prefixes(min_age_s=50, pinned=True, tier="disk")]
    assert (old.pin, old.expires_in_s, old.preview) == (PinKind.HARD, 30, "old and pinned..")
    assert (old.tiers, old.parent_id) == ((kvserve.TierBlocks("disk", 4),), None)
    [young] = [info async for info in client.cache.prefixes(pinned=False)]
    assert (young.pin, young.expires_in_s, young.preview) == (None, None, None)


async def test_a_prefix_is_named_by_what_it_says_or_by_its_id(server, client):
    entry = server.cache.add("a shared opening")
    messages = [{"role": "system", "content": "a shared"}, kvserve.ChatMessage("user", " opening")]
    for prefix in ("a shared opening", list(b"a shared opening"), messages, PrefixId(entry.prefix_id[:8])):
        found = await client.cache.lookup(prefix)
        assert (found.cached_tokens, found.is_exact, found.prefix_id) == (16, True, PrefixId(entry.prefix_id))
    kinds = [request.prefix.WhichOneof("prefix") for request in server.cache.requests]
    assert kinds == ["text", "token_ids", "chat", "prefix_id"]
    nothing = await client.cache.lookup("no such thing")
    assert (nothing.cached_tokens, nothing.prefix_id) == (0, None)


async def test_warming_is_awaited_for_its_result(server, client):
    warmed = await client.cache.warm("a shared opening", lifetime_s=60, pin="soft")
    assert (warmed.done, warmed.num_tokens, warmed.computed_tokens) == (True, 16, 16)
    assert (await client.cache.lookup(warmed.prefix_id)).is_exact
    assert server.cache.entries[0].lifetime_s == 60
    assert server.cache.entries[0].pin == pb.PIN_KIND_SOFT


async def test_warming_can_be_followed_and_leaving_the_block_ends_it(server, client):
    async with client.cache.warm("one") as steps:
        assert [step.done async for step in steps] == [False, True]
    assert steps.result.num_tokens == 3
    server.cache.may_warm.clear()
    async with client.cache.warm("two") as steps:
        async for step in steps:
            assert step.prefix_id is None
            break
    await asyncio.wait_for(server.cache.cancelled.wait(), NOTICED_S)
    with pytest.raises(kvserve.MisuseError, match="no result"):
        _ = steps.result
    assert [bytes(entry.tokens) for entry in server.cache.entries] == [b"one"]


async def test_cancelling_the_task_that_awaits_ends_the_work(server, client):
    server.cache.may_warm.clear()

    async def warm():
        await client.cache.warm("x")

    task = asyncio.create_task(warm())
    while not server.cache.requests:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.cache.cancelled.wait(), NOTICED_S)


async def test_pins_lifetimes_and_releases(server, client):
    entry = server.cache.add("a shared opening")
    pinned = await client.cache.pin("a shared opening", "hard", lifetime_s=90)
    assert pinned == kvserve.PinResult(
        prefix_id=PrefixId(entry.prefix_id), num_blocks=4, newly_pinned_blocks=4, num_tokens=16
    )
    assert (entry.pin, entry.pin_lifetime_s) == (pb.PIN_KIND_HARD, 90)
    assert await client.cache.unpin(pinned.prefix_id) is True
    assert await client.cache.unpin(pinned.prefix_id) is False
    assert (await client.cache.set_lifetime(pinned.prefix_id, 0.5)).num_blocks == 4
    assert entry.lifetime_s == 0.5
    await client.cache.set_lifetime(pinned.prefix_id, None)
    assert entry.lifetime_s is None
    assert await client.cache.release(pinned.prefix_id) == 4
    with pytest.raises(kvserve.NotFound, match="no such prefix"):
        await client.cache.pin("something else")


async def test_what_is_in_use_is_refused_or_left(server, client):
    server.cache.add("base", in_use=True)
    server.cache.add("base and more", tiers={"disk": 3})
    with pytest.raises(kvserve.FailedPrecondition, match="a running request"):
        await client.cache.evict("base")
    assert len(server.cache.entries) == 2
    assert await client.cache.evict("base", in_use="skip") == kvserve.EvictResult(
        evicted_blocks=3, kept_blocks=1, evicted_objects=3
    )
    server.cache.entries[0].in_use = False
    assert (await client.cache.clear(tiers=False)).evicted_blocks == 1
    assert server.cache.entries == []
    assert server.cache.requests[-1] == pb.ClearCacheRequest(in_use=pb.IN_USE_FAIL, tiers=False)


async def test_policies_trials_and_canaries(server, client):
    assert (await client.cache.policy()).canary is None
    report = await client.cache.set_policy("best", trial=["lru", "best"], canary=("lru", 0.25))
    assert (report.policy, [result.policy for result in report.trial]) == ("best", ["lru", "best"])
    assert (report.canary.policy, report.canary.share) == ("lru", 0.25)
    assert report.available[0] == kvserve.PolicyInfo("lru", "least recently used")
    report = await client.cache.set_policy(trial=[])
    assert (report.policy, report.trial, report.canary.share) == ("best", (), 0.25)
    assert (await client.cache.set_policy(canary=("lru", 0))).canary is None


async def test_a_watch_sees_what_happens_and_ends_with_its_block(server, client):
    async with client.cache.watch(kinds=["evicted", CacheEventKind.PINNED]) as events:
        reading = asyncio.create_task(anext(aiter(events)))
        await asyncio.wait_for(server.cache.watching.wait(), NOTICED_S)
        await client.cache.warm("a shared opening")
        await client.cache.pin("a shared opening")
        event = await asyncio.wait_for(reading, NOTICED_S)
    assert (event.kind, event.sequence, event.num_tokens, event.num_lost) == (CacheEventKind.PINNED, 2, 16, 0)
    await asyncio.wait_for(server.cache.cancelled.wait(), NOTICED_S)


async def test_a_watch_reports_losses_and_restarts(server, client):
    seen = []
    async with client.cache.watch() as events:
        stream = aiter(events)
        reading = asyncio.create_task(anext(stream))
        await asyncio.wait_for(server.cache.watching.wait(), NOTICED_S)
        server.cache.tell(pb.CACHE_EVENT_KIND_STORED)
        server.cache.tell(pb.CACHE_EVENT_KIND_STORED, num_lost=3)
        server.cache.sequence += 2  # Two that the server doesn't own up to.
        server.cache.tell(pb.CACHE_EVENT_KIND_EXPIRED)
        server.cache.epoch, server.cache.sequence = 2, 0
        server.cache.tell(pb.CACHE_EVENT_KIND_STORED)
        server.cache.epoch, server.cache.sequence = 3, 0
        server.cache.tell(pb.CACHE_EVENT_KIND_RESET)
        server.cache.tell(99)
        seen.append(await asyncio.wait_for(reading, NOTICED_S))
        while len(seen) < 7:
            seen.append(await asyncio.wait_for(anext(stream), NOTICED_S))
    assert [(event.epoch, event.kind.value, event.num_lost) for event in seen] == [
        (1, "stored", 0),
        (1, "stored", 3),
        (1, "expired", 2),
        (2, "reset", 0),
        (2, "stored", 0),
        (3, "reset", 0),
        (3, "other", 0),
    ]
    assert events.num_lost == 5


async def test_a_watch_has_no_deadline_of_its_own(server):
    async with kvserve.AsyncClient(server.target, timeout_s=0.2) as client:
        async with client.cache.watch(timeout_s=0.1) as events:
            with pytest.raises(kvserve.DeadlineExceeded):
                await anext(aiter(events))
        async with client.cache.watch() as events:
            reading = asyncio.create_task(anext(aiter(events)))
            done, _ = await asyncio.wait({reading}, timeout=0.4)
            assert not done
            server.cache.tell(pb.CACHE_EVENT_KIND_STORED)
            assert (await asyncio.wait_for(reading, NOTICED_S)).kind is CacheEventKind.STORED


async def test_snapshots(server, client):
    server.cache.add("kept")
    saved = await client.cache.save_snapshot("monday")
    assert (saved.done, saved.total_objects, saved.done_bytes) == (True, 1, 1024)
    with pytest.raises(kvserve.AlreadyExists):
        await client.cache.save_snapshot("monday")
    await client.cache.save_snapshot("monday", replace=True)
    await client.cache.clear()
    assert (await client.cache.restore_snapshot("monday")).done_objects == 1
    assert [bytes(entry.tokens) for entry in server.cache.entries] == [b"kept"]
    with pytest.raises(kvserve.NotFound):
        await client.cache.restore_snapshot("sunday")


async def test_models_are_listed_loaded_and_unloaded(server, client):
    models = await client.models.list()
    assert [(model.name, model.state.value) for model in models] == [
        ("scripted", "ready"),
        ("other", "unloaded"),
    ]
    async with client.models.load("other") as steps:
        states = [step.status.state async for step in steps]
    assert states == [kvserve.ModelState.LOADING, kvserve.ModelState.READY]
    server.cache.running = 2
    with pytest.raises(kvserve.FailedPrecondition, match="2 requests run"):
        await client.models.unload("other")
    assert (await client.models.unload("other", drain_s=5)).state is kvserve.ModelState.UNLOADED


async def test_the_blocking_client_does_the_same(server):
    server.cache.add("base", value=2)

    def story():
        with kvserve.Client(server.target, timeout_s=20) as client:
            warmed = client.cache.warm("base and more").wait()
            with client.cache.warm("third") as steps:
                dones = [step.done for step in steps]
            listed = [info.prefix_id for info in client.cache.prefixes(page_size=1)]
            client.cache.pin(warmed.prefix_id, "hard")
            with client.cache.watch() as events:
                reader = iter(events)
                asyncio.run_coroutine_threadsafe(evict_when_watched(), loop).result(NOTICED_S)
                event = next(reader)
            return warmed, dones, listed, event, client.models.list()

    async def evict_when_watched():
        await server.cache.watching.wait()
        server.cache.tell(pb.CACHE_EVENT_KIND_EVICTED, cause="capacity")

    loop = asyncio.get_running_loop()
    warmed, dones, listed, event, models = await asyncio.to_thread(story)
    assert (warmed.done, dones, len(listed)) == (True, [False, True], 3)
    assert (event.kind, event.cause) == (CacheEventKind.EVICTED, "capacity")
    assert [model.name for model in models] == ["scripted", "other"]
    await asyncio.wait_for(server.cache.cancelled.wait(), NOTICED_S)


async def test_streams_outside_their_block_are_refused(server, client):
    with pytest.raises(kvserve.MisuseError, match=r"async with client\.cache\.watch"):
        aiter(client.cache.watch())
    with pytest.raises(kvserve.MisuseError, match="or await it"):
        aiter(client.cache.warm("x"))
    work = client.cache.warm("x")
    assert await work is work.result
    assert await work is work.result
    with pytest.raises(kvserve.MisuseError, match="started already"):
        async with work:
            pass
    assert len(server.cache.requests) == 1


async def test_work_can_be_waited_for_inside_its_block(client):
    async with client.cache.warm("x") as steps:
        reader = aiter(steps)
        assert not (await anext(reader)).done
        assert (await steps.wait()).done
