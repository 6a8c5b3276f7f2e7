"""``kvctl cache`` and ``kvctl models`` as processes against a server that keeps a little state."""

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest_asyncio

import kvserve
from kvserve.v1 import cache_admin_pb2 as pb
from tests.rpc.scripted_server import scripted_server
from tests.rpc.test_client_kvctl import NOTICED_S, kvctl, start_kvctl


@pytest_asyncio.fixture
async def server():
    async with scripted_server() as running:
        yield running


async def cache(server, *arguments, typed=""):
    return await kvctl("cache", *arguments, "--target", server.target, typed=typed)


async def test_stats_for_people_and_for_programs(server):
    server.cache.add("a prefix of 20 bytes", in_use=True)
    code, out, _ = await cache(server, "stats")
    assert code == 0
    assert "hit rate           40.0% of 1,000 prompt tokens, 75.0% of 20 requests\n" in out
    assert "blocks             64: 5 in use, 0 cached, 59 free\n" in out
    assert "evicted blocks     admin 2, capacity 7; expired 0\n" in out
    assert "redis  left alone" in out
    assert "restores           30 blocks; 2.0s for waiting requests, 25.0% of it hidden\n" in out
    assert "prefetch, waiting  40 blocks: 30 used, 8 late, 2 wasted\n" in out
    assert "prefetch, sessions" not in out
    traffic = "4 stored (4.0 KiB), 1,200 fetched (1.0 KiB), 1 quarantined, 2 fetches failed: corrupt"
    assert f"TIER  TRAFFIC\ndisk  {traffic}\n" in out
    code, out, _ = await cache(server, "stats", "--json")
    assert (code, out.count("\n")) == (0, 1)
    assert json.loads(out)["total"]["evicted_blocks"] == {"capacity": 7, "admin": 2}


async def test_list_shows_the_most_valuable_first_and_says_that_there_are_more(server):
    server.cache.add("cheap", value=1, pin=pb.PIN_KIND_HARD, pin_lifetime_s=90)
    dear = server.cache.add("dear\n\x1b[31m", value=2.5, lifetime_s=4000)
    code, out, err = await cache(server, "list", "--limit", "1")
    assert (code, err) == (0, "[1 shown, there are more: --limit N]\n")
    header, row = out.splitlines()
    assert header.split()[:4] == ["ID", "NAMESPACE", "TOKENS", "BLOCKS"]
    assert row.startswith(dear.prefix_id)
    assert "1h06m" in row
    assert r"'dear\n\x1b[31m'" in row
    code, out, _ = await cache(server, "list", "--pinned", "--min-age", "1m", "--json")
    listed = json.loads(out)
    assert [info["pin"] for info in listed["prefixes"]] == ["hard"]
    assert listed["is_complete"] is True


async def test_lookup_by_text_tokens_chat_and_id(server):
    entry = server.cache.add("a shared opening", tiers={"disk": 2})
    text = (
        "16 of 16 tokens on the device (16 in blocks, 0 partial), nothing to compute\n"
        f"more in tiers, in blocks: disk:2\nid {entry.prefix_id}\n"
    )
    for named in (
        ["a shared opening"],
        ["--token-ids", ",".join(map(str, b"a shared opening"))],
        ["--system", "a shared", " opening"],
        ["--id", entry.prefix_id[:8]],
    ):
        assert await cache(server, "lookup", *named) == (0, text, "")
    assert (await cache(server, "lookup", "-", typed="a shared opening"))[1] == text
    assert await cache(server, "lookup") == (
        2,
        "",
        "kvctl: name a prefix: a prompt, --system, --token-ids or --id\n",
    )
    assert (await cache(server, "lookup", "x", "--id", "12345678"))[0] == 2
    assert (await cache(server, "lookup", "--id", "1234"))[0] == 2


async def test_an_opening_alone_leaves_the_conversation_open(server):
    code, out, err = await cache(
        server, "warm", "--system", "Be brief.", "--lifetime", "10m", "--pin", "hard"
    )
    assert (code, err) == (0, "")
    assert out.startswith("9 tokens: 0 cached before, 9 computed in 500ms\nid ")
    request = server.cache.requests[-1]
    assert [(message.role, message.content) for message in request.prefix.chat.messages] == [
        ("system", "Be brief.")
    ]
    assert request.prefix.chat.add_generation_prompt is False
    assert (request.lifetime.seconds, request.pin) == (600, pb.PIN_KIND_HARD)


async def test_a_lifetime_without_a_pin_is_wrong_use(server):
    asked = await cache(server, "warm", "x", "--pin-lifetime", "1h")
    assert asked == (2, "", "kvctl: --pin-lifetime needs --pin\n")


async def test_warm_as_json_is_a_line_for_each_step(server):
    code, out, _ = await cache(server, "warm", "text", "--json")
    steps = [json.loads(line) for line in out.splitlines()]
    assert (code, [step["done"] for step in steps]) == (0, [False, True])
    assert steps[0]["prefix_id"] is None
    assert steps[1]["prefix_id"] == server.cache.entries[0].prefix_id


async def test_interrupting_warm_ends_the_work_at_the_server(server):
    server.cache.may_warm.clear()
    process = await start_kvctl("cache", "warm", "text", "--json", "--target", server.target)
    await asyncio.wait_for(process.stdout.readline(), NOTICED_S)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), NOTICED_S) == 130
    await asyncio.wait_for(server.cache.cancelled.wait(), NOTICED_S)


async def test_pins_lifetimes_and_releases(server):
    entry = server.cache.add("a shared opening")
    code, out, _ = await cache(server, "pin", "a shared opening", "--kind", "hard", "--lifetime", "2h")
    assert (code, out) == (
        0,
        f"16 tokens, 4 blocks pinned hard for 2h00m (4 newly)\nid {entry.prefix_id}\n",
    )
    assert (entry.pin, entry.pin_lifetime_s) == (pb.PIN_KIND_HARD, 7200)
    assert (await cache(server, "unpin", "--id", entry.prefix_id))[:2] == (0, "unpinned\n")
    assert json.loads((await cache(server, "unpin", "--id", entry.prefix_id, "--json"))[1]) == {
        "was_pinned": False
    }
    assert (await cache(server, "lifetime", "a shared opening", "--expire-in", "90s"))[0] == 0
    assert entry.lifetime_s == 90
    assert (await cache(server, "lifetime", "a shared opening", "--no-end"))[0] == 0
    assert entry.lifetime_s is None
    assert (await cache(server, "lifetime", "a shared opening", "--expire-in", "soon"))[0] == 2
    assert (await cache(server, "release", "a shared opening"))[:2] == (
        0,
        "4 blocks go first when room is wanted\n",
    )
    assert await cache(server, "pin", "no such") == (1, "", "kvctl: no such prefix is cached\n")


async def test_what_takes_much_wants_a_yes_where_nobody_can_be_asked(server):
    server.cache.add("base", in_use=True)
    server.cache.add("base and more", idle_s=1000)
    for verb in (["clear"], ["evict", "--min-idle", "10m"], ["evict", "--namespace", "ns-main"]):
        code, out, err = await cache(server, *verb)
        assert (code, out) == (2, "")
        assert err.startswith("kvctl: Evict everything ")
        assert err.endswith("say --yes\n")
    assert (await cache(server, "evict"))[0] == 2
    assert (await cache(server, "evict", "--namespace", "", "--yes"))[0] == 2
    assert server.cache.requests == []
    assert await cache(server, "clear", "--yes") == (
        1,
        "",
        "kvctl: a running request or a hard pin holds some of it\n",
    )
    code, out, _ = await cache(server, "evict", "--min-idle", "10m", "--yes", "--json")
    assert (code, json.loads(out)["evicted_blocks"]) == (0, 3)
    server.cache.add("base and more")
    assert (await cache(server, "evict", "base", "--in-use", "skip"))[:2] == (
        0,
        "3 blocks evicted, 1 kept because they are held, 0 objects removed from tiers\n",
    )


async def test_policy_is_shown_and_changed(server):
    code, out, _ = await cache(
        server, "policy", "--set", "best", "--trial", "lru,best", "--canary", "lru:25%"
    )
    assert code == 0
    assert out.startswith("policy best\ncanary lru: 0 namespaces (25.0%)")
    assert "lru         50.0%" in out
    assert (await cache(server, "policy", "--trial", ""))[0] == 0
    assert server.cache.trial == []
    assert json.loads((await cache(server, "policy", "--json"))[1])["canary"]["share"] == 0.25
    assert (await cache(server, "policy", "--canary", "lru:0.9"))[0] == 2
    for wrong in ("lru", "lru=0.1", ":10%", "lru:", "lru:nan"):
        code, _, err = await cache(server, "policy", "--canary", wrong)
        assert (code, "such as arc:10%" in err) == (2, True)
    assert (await cache(server, "policy", "--canary", "lru:0"))[0] == 0
    assert server.cache.canary is None


async def test_watch_writes_events_and_what_was_lost(server):
    process = await start_kvctl("cache", "watch", "--count", "2", "--target", server.target)
    await asyncio.wait_for(server.cache.watching.wait(), NOTICED_S)
    server.cache.tell(pb.CACHE_EVENT_KIND_EVICTED, entry=server.cache.add("four"), cause="quota", num_lost=3)
    server.cache.tell(pb.CACHE_EVENT_KIND_RESET)
    out, err = await asyncio.wait_for(process.communicate(), NOTICED_S)
    first, second = out.decode().splitlines()
    assert first.split()[:2] == ["1", "evicted"]
    assert first.endswith("ns-main quota")
    assert "engine started again" in second
    assert err == b"[3 events lost: read too slowly]\n"
    assert process.returncode == 0


async def test_watch_as_json_lines_until_interrupted(server):
    process = await start_kvctl(
        "cache", "watch", "--json", "--kind", "stored", "--kind", "expired", "--target", server.target
    )
    await asyncio.wait_for(server.cache.watching.wait(), NOTICED_S)
    server.cache.tell(pb.CACHE_EVENT_KIND_EVICTED)
    server.cache.tell(pb.CACHE_EVENT_KIND_EXPIRED)
    event = json.loads(await asyncio.wait_for(process.stdout.readline(), NOTICED_S))
    assert (event["kind"], event["sequence"], event["prefix_id"]) == ("expired", 2, None)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), NOTICED_S) == 130
    await asyncio.wait_for(server.cache.cancelled.wait(), NOTICED_S)


async def test_watch_ends_quietly_when_its_time_is_over(server):
    assert await cache(server, "watch", "--timeout", "200ms") == (0, "", "")
    assert server.cache.watching.is_set()
    code, _, err = await kvctl("cache", "watch", "--timeout", "60s", "--target", "127.0.0.1:1")
    assert (code, "unavailable" in err) == (3, True)


async def test_snapshots(server):
    server.cache.add("kept")
    code, out, _ = await cache(server, "save", "monday")
    assert (code, out) == (0, "1 of 1 objects saved, 1.0 KiB, 0 left out, 0ms\n")
    taken = "kvctl: a snapshot has this name; --replace takes its place\n"
    assert await cache(server, "save", "monday") == (1, "", taken)
    assert (await cache(server, "save", "monday", "--replace"))[0] == 0
    code, out, _ = await cache(server, "restore", "monday", "--json")
    assert (code, json.loads(out)["done_objects"]) == (0, 1)


async def test_models(server):
    code, out, _ = await kvctl("models", "list", "--target", server.target)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["scripted", "ready"],
        ["other", "unloaded"],
    ]
    assert (await kvctl("models", "load", "other", "--target", server.target))[:2] == (
        0,
        "other is ready after 250ms\n",
    )
    server.cache.running = 1
    assert (await kvctl("models", "unload", "other", "--target", server.target))[
        2
    ] == "kvctl: 1 requests run\n"
    code, out, _ = await kvctl(
        "models", "unload", "other", "--drain", "5s", "--json", "--target", server.target
    )
    assert (code, json.loads(out)["state"]) == (0, "unloaded")


async def test_top_once_writes_a_frame(server):
    server.cache.add("a shared opening", value=3)
    code, out, err = await cache(server, "top", "--once")
    assert (code, err) == (0, "")
    assert "cache of scripted   policy lru   up 1h00m   prefixes 1" in out
    assert "a shared opening" in out
    assert "\x1b" not in out
    assert (await cache(server, "top", "--once", "--rows", "0"))[0] == 2
    assert (await kvctl("cache", "top", "--once", "--target", "127.0.0.1:1"))[0] == 3


async def test_top_without_a_terminal_goes_on_writing_frames(server):
    process = await start_kvctl("cache", "top", "--interval", "50ms", "--target", server.target)
    for _ in range(3):
        while b"cache of scripted" not in await asyncio.wait_for(process.stdout.readline(), NOTICED_S):
            pass
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), NOTICED_S)
    assert (process.returncode, err) == (130, b"")


async def test_top_without_rich_says_what_to_install(server, tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('not here')\n")
    code, out, err = await kvctl(
        "cache", "top", "--target", server.target,
        PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(kvserve.__file__).parents[1]}",
    )  # fmt: skip
    assert (code, out, err) == (2, "", "kvctl: this table needs rich: pip install 'kvserve[top]'\n")
    assert server.cache.requests == []
