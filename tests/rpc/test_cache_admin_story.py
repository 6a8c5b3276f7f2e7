"""An operator's day: CacheAdmin over the wire, with the real desk over the real cache and scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc

from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import generate_pb2
from server.engine.cache_desk import CacheDesk
from server.engine.local import LocalEngine
from server.engine.loop import EngineParts
from server.engine.options import EngineOptions
from server.rpc.auth import parse_api_keys
from tests.fakes import FakeRunner, fake_parts
from tests.rpc.harness import Server, refused, serving
from tests.rpc.test_cache_admin import KEYS, TEXT, bearer

Code = grpc.StatusCode
TOKENS = list(range(200, 296))
HERE = {"token_ids": {"ids": TOKENS}}
LONG = {"token_ids": {"ids": list(range(1000, 1320))}}


@asynccontextmanager
async def real_server(*, keys: Any = (), **options: Any) -> AsyncIterator[tuple[Server, FakeRunner]]:
    runner = FakeRunner(num_blocks=256, vocab_size=3072)

    def build() -> EngineParts:
        parts = fake_parts(EngineOptions(model="fake", **options), runner=runner)
        desk = CacheDesk(
            parts.scheduler.cache,
            clock=parts.clock,
            fingerprint="",
            epoch=7,
            largest_need=parts.scheduler.largest_need,
        )
        return replace(parts, desk=desk)

    async with serving(LocalEngine(build), keys=keys) as server:
        try:
            yield server, runner
        finally:
            runner.release_all()


async def generate(server: Server, prompt: dict[str, Any], metadata: Any = None) -> Any:
    wanted = generate_pb2.GenerateRequest(parameters={"max_new_tokens": 2, "ignore_eos": True}, **prompt)
    return await server.stub.Generate(wanted, metadata=metadata)


async def test_warm_look_pin_release_and_evict() -> None:
    async with real_server() as (server, _):
        admin = server.admin
        async for step in admin.WarmPrefix(pb.WarmPrefixRequest(prefix=HERE, pin=pb.PIN_KIND_HARD)):
            last = step
        assert (last.done, last.computed_tokens, last.num_tokens) == (True, 96, 96)
        found = await admin.LookupPrefix(pb.LookupPrefixRequest(prefix=HERE))
        assert (found.cached_block_tokens, found.is_exact, found.prefix_id) == (96, True, last.prefix_id)
        assert (await generate(server, HERE)).usage.computed_prompt_tokens == 0
        [entry, *_] = (await admin.ListPrefixes(pb.ListPrefixesRequest(pinned=True))).prefixes
        assert (entry.prefix_id, entry.pin, entry.own_blocks) == (last.prefix_id, pb.PIN_KIND_HARD, 6)
        stats = await admin.GetStats(pb.GetStatsRequest())
        assert stats.pins.hard_blocks == 6
        assert stats.total.prompt_tokens == 192
        assert 0 < stats.total.token_hit_rate < 1
        refusal = await refused(admin.EvictPrefixes(pb.EvictPrefixesRequest(subtree=HERE)))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "IN_USE")
        assert (await admin.UnpinPrefix(pb.UnpinPrefixRequest(prefix=HERE))).was_pinned
        evicted = await admin.EvictPrefixes(pb.EvictPrefixesRequest(subtree=HERE))
        assert evicted.evicted_blocks >= 1
        assert (await generate(server, HERE)).usage.computed_prompt_tokens >= 16


async def test_warm_names_a_prompt_alike_with_and_without_a_pin() -> None:
    prompt = {"token_ids": {"ids": [*TOKENS, 7, 8, 9]}}  # ends within a block
    async with real_server() as (server, _):
        names = []
        for pin in (pb.PIN_KIND_UNSPECIFIED, pb.PIN_KIND_SOFT):
            async for step in server.admin.WarmPrefix(pb.WarmPrefixRequest(prefix=prompt, pin=pin)):
                last = step
            names.append(last.prefix_id)
        assert len(set(names)) == 1
        named = pb.UnpinPrefixRequest(prefix={"prefix_id": names[0]})
        assert (await server.admin.UnpinPrefix(named)).was_pinned


async def test_neighbours_are_exact_whatever_the_operator_does() -> None:
    async with real_server(max_batch_tokens=32) as (server, _):
        admin = server.admin
        prompts = [{"token_ids": {"ids": [*TOKENS, k, k + 1]}} for k in range(20)]

        def wanted(prompt: dict[str, Any]) -> generate_pb2.GenerateRequest:
            return generate_pb2.GenerateRequest(
                parameters={"max_new_tokens": 24, "ignore_eos": True, "seed": 5}, **prompt
            )

        expected = [list((await server.stub.Generate(wanted(p))).samples[0].token_ids) for p in prompts]
        running = [asyncio.ensure_future(server.stub.Generate(wanted(p))) for p in prompts]
        for _ in range(5):
            await admin.ClearCache(pb.ClearCacheRequest(in_use=pb.IN_USE_SKIP))
            await admin.SetPolicy(pb.SetPolicyRequest(policy="fifo"))
            await admin.EvictPrefixes(pb.EvictPrefixesRequest(min_idle={"seconds": 0}, in_use=pb.IN_USE_SKIP))
            await admin.SetPolicy(pb.SetPolicyRequest(policy="lru"))
            await admin.ListPrefixes(pb.ListPrefixesRequest())
        results = [list(answer.samples[0].token_ids) for answer in await asyncio.gather(*running)]
        assert results == expected


async def test_what_the_desk_refuses_names_the_field_of_the_request() -> None:
    async with real_server() as (server, _):
        admin = server.admin
        await generate(server, HERE)
        cases: list[tuple[Any, Any, grpc.StatusCode, list[str]]] = [
            (
                admin.ListPrefixes,
                pb.ListPrefixesRequest(page_token="x"),
                Code.INVALID_ARGUMENT,
                ["page_token"],
            ),
            (admin.SetPolicy, pb.SetPolicyRequest(policy="newest"), Code.INVALID_ARGUMENT, ["policy"]),
            (admin.GetStats, pb.GetStatsRequest(namespace="0" * 16), Code.NOT_FOUND, []),
            (admin.UnpinPrefix, pb.UnpinPrefixRequest(prefix={"prefix_id": "0" * 64}), Code.NOT_FOUND, []),
            (admin.PinPrefix, pb.PinPrefixRequest(prefix=LONG), Code.NOT_FOUND, []),
            (admin.SaveSnapshot, pb.SaveSnapshotRequest(name="s"), Code.FAILED_PRECONDITION, []),
            (admin.RestoreSnapshot, pb.RestoreSnapshotRequest(name="s"), Code.FAILED_PRECONDITION, []),
        ]
        for method, request, code, fields in cases:
            refusal = await refused(method(request))
            assert (refusal.code, list(refusal.fields)) == (code, fields), request


async def test_text_belongs_to_its_tenant() -> None:
    async with real_server(keys=KEYS) as (server, _):
        await generate(server, {"text": TEXT}, bearer("alice"))
        mine = await server.admin.ListPrefixes(pb.ListPrefixesRequest(), metadata=bearer("alice"))
        theirs = await server.admin.ListPrefixes(pb.ListPrefixesRequest(), metadata=bearer("bob"))
        assert [entry.tenant for entry in theirs.prefixes] == ["alice"] * len(mine.prefixes)
        assert any("lazy dog" in entry.preview for entry in mine.prefixes)
        assert not any(entry.HasField("preview") for entry in theirs.prefixes)
        by_id = pb.EvictPrefixesRequest(subtree={"prefix_id": theirs.prefixes[0].prefix_id})
        assert (await server.admin.EvictPrefixes(by_id, metadata=bearer("bob"))).evicted_blocks > 0


async def test_a_watch_sees_blocks_come_and_go() -> None:
    async with real_server() as (server, _):
        watch = server.admin.WatchCache(pb.WatchCacheRequest())
        await watch.initial_metadata()
        await generate(server, HERE)
        stored = await watch.read()
        assert (stored.kind, stored.num_blocks, stored.num_tokens) == (pb.CACHE_EVENT_KIND_STORED, 6, 96)
        await server.admin.PinPrefix(pb.PinPrefixRequest(prefix=HERE))
        await server.admin.UnpinPrefix(pb.UnpinPrefixRequest(prefix=HERE))
        await server.admin.ClearCache(pb.ClearCacheRequest())
        kinds = [(await watch.read()).kind for _ in range(3)]
        assert kinds == [
            pb.CACHE_EVENT_KIND_PINNED,
            pb.CACHE_EVENT_KIND_UNPINNED,
            pb.CACHE_EVENT_KIND_EVICTED,
        ]
        watch.cancel()


async def test_a_namespace_goes_by_its_tenants_name() -> None:
    entries = [
        {"tenant": "carol", "key": f"carol-key-{n}-0123456789", "scopes": ["generate"]} for n in (1, 2)
    ]
    entries += [{"tenant": "alice", "key": "alice-key-0123456789", "scopes": ["generate", "admin"]}]
    entries += [{"tenant": name, "key": f"{name}-key-0123456789"} for name in ("bob", "dave")]
    async with real_server(keys=parse_api_keys(entries)) as (server, _):
        admin, me = server.admin, bearer("alice")
        for who in ("alice", "bob", "carol-key-1", "carol-key-2"):
            key = who if "-" in who else f"{who}-key"
            await generate(server, HERE, (("authorization", f"Bearer {key}-0123456789"),))

        everything = await admin.GetStats(pb.GetStatsRequest(), metadata=me)
        ids = {space.tenant: space.namespace for space in everything.namespaces}
        events = admin.WatchCache(pb.WatchCacheRequest(namespace="bob"), metadata=me)
        await events.initial_metadata()
        stats = await admin.GetStats(pb.GetStatsRequest(namespace="bob"), metadata=me)
        assert [space.namespace for space in stats.namespaces] == [ids["bob"]]
        listed = await admin.ListPrefixes(pb.ListPrefixesRequest(namespace="bob"), metadata=me)
        assert {entry.tenant for entry in listed.prefixes} == {"bob"}
        await admin.EvictPrefixes(pb.EvictPrefixesRequest(namespace="bob"), metadata=me)
        assert (await events.read()).namespace == ids["bob"]
        left = await admin.ListPrefixes(pb.ListPrefixesRequest(), metadata=me)
        assert {entry.tenant for entry in left.prefixes} == {"alice", "carol"}

        several = await refused(admin.GetStats(pb.GetStatsRequest(namespace="carol"), metadata=me))
        assert several.code is Code.INVALID_ARGUMENT
        carols = sorted(space.namespace for space in everything.namespaces if space.tenant == "carol")
        assert f"name one by id: {', '.join(carols)}" in several.message
        for nobody in ("dave", "eve"):
            refusal = await refused(admin.GetStats(pb.GetStatsRequest(namespace=nobody), metadata=me))
            assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["namespace"])
