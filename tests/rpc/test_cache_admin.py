"""CacheAdmin over the wire: a real engine on a worker without a model, a real cache, a small desk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import generate_pb2
from server.engine.admin_messages import AdminErrorKind, AdminRefusal, PinType
from server.engine.local import LocalEngine
from server.engine.messages import FailureKind
from server.rpc.auth import ApiKey, parse_api_keys
from server.rpc.cache_admin_convert import error_from_refusal
from server.rpc.listener import ListenOptions
from server.rpc.requests import TextPrompt
from tests.fakes import FakeRunner
from tests.rpc.harness import TOKENIZER, Refusal, ScriptedEngine, Server, refused, serving
from tests.small_desk import SmallDesk, engine_with_desk

Code = grpc.StatusCode
KEYS = parse_api_keys(
    [
        {"tenant": "alice", "key": "alice-key-0123456789", "scopes": ["generate", "admin"]},
        {"tenant": "bob", "key": "bob-key-0123456789", "scopes": ["generate", "admin"]},
        {"tenant": "user", "key": "user-key-0123456789"},
    ]
)
TEXT = "the quick brown fox jumps over the lazy dog " * 12
TOKENS = list(range(100, 180))
HERE = {"token_ids": {"ids": TOKENS}}


def bearer(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {tenant}-key-0123456789"),)


@dataclass
class World:
    """A server, its engine and the desk in it."""

    server: Server
    engine: LocalEngine
    desk: SmallDesk
    runner: FakeRunner

    @property
    def admin(self) -> Any:
        return self.server.admin

    async def generate(
        self, tokens: list[int] | None = None, *, metadata: Any = None, **fields: Any
    ) -> generate_pb2.GenerateResponse:
        if "text" not in fields:
            fields["token_ids"] = {"ids": tokens or TOKENS}
        fields.setdefault("parameters", {"max_new_tokens": 2, "ignore_eos": True})
        wanted = generate_pb2.GenerateRequest(**fields)
        response: generate_pb2.GenerateResponse = await self.server.stub.Generate(wanted, metadata=metadata)
        return response


@asynccontextmanager
async def world(keys: tuple[ApiKey, ...] = (), **options: Any) -> AsyncIterator[World]:
    runner = FakeRunner(num_blocks=256, vocab_size=3072)
    listen = options.pop("listen", ListenOptions(port=0))
    write_timeout_s = options.pop("write_timeout_s", 10.0)
    engine, desks = engine_with_desk(runner, **options)
    async with serving(engine, keys=keys, listen=listen, write_timeout_s=write_timeout_s) as server:
        try:
            yield World(server, engine, desks[0], runner)
        finally:
            runner.release_all()
    assert engine._desk.admin.num_open == 0
    assert engine._desk.admin.num_watchers == 0


async def all_of(call: AsyncIterator[Any]) -> list[Any]:
    return [message async for message in call]


# -- looking --------------------------------------------------------------------------------------------


async def test_stats_show_what_the_engine_reports() -> None:
    async with world() as w:
        await w.generate()
        stats = await w.admin.GetStats(pb.GetStatsRequest(model="tiny"))
        assert (stats.model, stats.block_size, stats.num_blocks, stats.policy) == ("tiny", 16, 256, "lru")
        assert stats.num_blocks_free + stats.num_blocks_cached == 256
        assert stats.total.blocks == 5
        assert (stats.total.hits, stats.total.misses) == (1, 3)
        assert stats.total.request_hit_rate == 0.25
        assert [one.stats.blocks for one in stats.namespaces] == [5]


async def test_a_prefix_can_be_looked_up_in_every_form() -> None:
    async with world() as w:
        await w.generate(text=TEXT)
        token_ids = TOKENIZER.encode(TextPrompt(TEXT), max_model_length=1 << 20)
        by_text = await w.admin.LookupPrefix(pb.LookupPrefixRequest(prefix={"text": TEXT}))
        by_ids = await w.admin.LookupPrefix(pb.LookupPrefixRequest(prefix={"token_ids": {"ids": token_ids}}))
        assert by_text == by_ids
        assert by_text.prompt_tokens == len(token_ids)
        assert by_text.cached_block_tokens == len(token_ids) // 16 * 16
        assert by_text.is_exact
        assert [(tier.tier, tier.blocks) for tier in by_text.tiers] == [("disk", 3)]
        by_id = await w.admin.SetLifetime(pb.SetLifetimeRequest(prefix={"prefix_id": by_text.prefix_id[:8]}))
        assert by_id.prefix_id == by_text.prefix_id
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        found = await w.admin.LookupPrefix(pb.LookupPrefixRequest(prefix={"chat": chat}))
        assert found.cached_block_tokens == 0
        assert found.prompt_tokens > 1


async def test_pages_hold_what_was_asked_for_and_lead_to_the_next() -> None:
    async with world() as w:
        await w.generate()
        seen: list[str] = []
        token = ""
        for size in (2, 2, 1):
            page = await w.admin.ListPrefixes(pb.ListPrefixesRequest(page_size=2, page_token=token))
            assert (len(page.prefixes), page.total) == (size, 5)
            seen += [entry.prefix_id for entry in page.prefixes]
            token = page.next_page_token
        assert token == ""
        assert len(set(seen)) == 5
        refusal = await refused(w.admin.ListPrefixes(pb.ListPrefixesRequest(page_token="x")))
        assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["page_token"])


async def test_text_is_shown_to_its_owner_alone() -> None:
    async with world(KEYS) as w:
        await w.generate(text=TEXT, metadata=bearer("alice"))
        mine = await w.admin.ListPrefixes(pb.ListPrefixesRequest(), metadata=bearer("alice"))
        theirs = await w.admin.ListPrefixes(pb.ListPrefixesRequest(), metadata=bearer("bob"))
        assert [e.prefix_id for e in mine.prefixes] == [e.prefix_id for e in theirs.prefixes]
        assert {entry.tenant for entry in theirs.prefixes} == {"alice"}
        assert all(entry.preview.removeprefix("<|bos|>") in TEXT for entry in mine.prefixes)
        assert not any(entry.HasField("preview") for entry in theirs.prefixes)
        raw = (
            theirs.SerializeToString()
            + (await w.admin.GetStats(pb.GetStatsRequest(), metadata=bearer("bob"))).SerializeToString()
        )
        assert b"quick" not in raw
        for key in KEYS:
            assert key.caller().salt.encode() not in raw


async def test_a_desk_that_tells_too_much_is_not_believed() -> None:
    """The preview is dropped by whose entry it is, whatever the engine sends along."""
    async with world(KEYS) as w:
        await w.generate(text=TEXT, metadata=bearer("alice"))
        entry = w.desk._entry
        w.desk._entry = lambda *parts, viewer_salt: entry(*parts, viewer_salt=parts[1])  # type: ignore[method-assign]
        theirs = await w.admin.ListPrefixes(pb.ListPrefixesRequest(), metadata=bearer("bob"))
        assert len(theirs.prefixes) > 1
        assert not any(entry.HasField("preview") for entry in theirs.prefixes)


async def test_tenants_look_prompts_up_in_their_own_namespace() -> None:
    async with world(KEYS) as w:
        await w.generate(metadata=bearer("alice"))
        ask = pb.LookupPrefixRequest(prefix=HERE)
        assert (await w.admin.LookupPrefix(ask, metadata=bearer("alice"))).cached_block_tokens == 80
        assert (await w.admin.LookupPrefix(ask, metadata=bearer("bob"))).cached_block_tokens == 0
        refusal = await refused(w.admin.PinPrefix(pb.PinPrefixRequest(prefix=HERE), metadata=bearer("bob")))
        assert refusal.code is Code.NOT_FOUND


async def test_an_answer_beyond_the_message_limit_is_refused_with_advice() -> None:
    async with world(listen=ListenOptions(port=0, max_message_bytes=600)) as w:
        await w.generate()
        refusal = await refused(w.admin.ListPrefixes(pb.ListPrefixesRequest()))
        assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE")
        assert "smaller page" in refusal.message
        page = await w.admin.ListPrefixes(pb.ListPrefixesRequest(page_size=1))
        assert len(page.prefixes) == 1


# -- steering -------------------------------------------------------------------------------------------


async def test_a_prefix_is_pinned_and_unpinned() -> None:
    async with world() as w:
        await w.generate()
        pinned = await w.admin.PinPrefix(pb.PinPrefixRequest(prefix=HERE, kind=pb.PIN_KIND_HARD))
        assert (pinned.num_blocks, pinned.newly_pinned_blocks, pinned.num_tokens) == (5, 5, 80)
        assert w.desk.pins[pinned.prefix_id] == (PinType.HARD, 5)
        again = await w.admin.PinPrefix(pb.PinPrefixRequest(prefix=HERE))
        assert again.newly_pinned_blocks == 0
        page = await w.admin.ListPrefixes(pb.ListPrefixesRequest())
        kinds = {entry.prefix_id: entry.pin for entry in page.prefixes}
        assert kinds.pop(pinned.prefix_id) == pb.PIN_KIND_SOFT
        assert set(kinds.values()) == {pb.PIN_KIND_UNSPECIFIED}
        assert (await w.admin.UnpinPrefix(pb.UnpinPrefixRequest(prefix=HERE))).was_pinned
        assert not (await w.admin.UnpinPrefix(pb.UnpinPrefixRequest(prefix=HERE))).was_pinned


async def test_lifetimes_and_hints_reach_the_engine() -> None:
    async with world() as w:
        await w.generate()
        set_to = await w.admin.SetLifetime(pb.SetLifetimeRequest(prefix=HERE, lifetime={"seconds": 90}))
        endless = await w.admin.SetLifetime(pb.SetLifetimeRequest(prefix=HERE))
        assert (set_to.num_blocks, endless.num_blocks) == (5, 5)
        assert w.desk.lifetimes == [90.0, None]
        assert (await w.admin.ReleasePrefix(pb.ReleasePrefixRequest(prefix=HERE))).num_blocks == 5


async def test_what_is_in_use_is_not_taken_unless_it_may_stay() -> None:
    async with world() as w:
        alone = await w.generate(parameters={"max_new_tokens": 40, "seed": 1})
        for _ in range(w.runner.num_steps):
            w.runner.wait_for_step()
        w.runner.hold()
        running = asyncio.create_task(w.generate(parameters={"max_new_tokens": 40, "seed": 1}))
        await asyncio.to_thread(w.runner.wait_for_step)

        async def between_steps(call: Any) -> Any:
            """Have a call carried out after the step that is held, while the request still runs."""
            task = asyncio.ensure_future(call)
            while w.engine._inbox.empty():
                await asyncio.sleep(0)
            w.runner.release()
            return await task

        refusal = await between_steps(refused(w.admin.ClearCache(pb.ClearCacheRequest())))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "IN_USE")
        evicted = await between_steps(
            w.admin.EvictPrefixes(pb.EvictPrefixesRequest(subtree=HERE, in_use=pb.IN_USE_SKIP))
        )
        assert evicted.kept_blocks >= 5
        w.runner.release_all()
        assert (await running).samples[0].token_ids == alone.samples[0].token_ids
        cleared = await w.admin.ClearCache(pb.ClearCacheRequest())
        assert (cleared.kept_blocks, cleared.evicted_blocks >= 5) == (0, True)


async def test_policies_are_shown_and_changed() -> None:
    async with world() as w:
        shown = await w.admin.GetPolicy(pb.GetPolicyRequest())
        assert shown.policy == "lru"
        assert {one.name for one in shown.available} == {"lru", "fifo"}
        assert [(trial.policy, trial.token_hit_rate) for trial in shown.trial] == [("fifo", 0.25)]
        assert shown.canary.namespaces == 2
        changed = await w.admin.SetPolicy(
            pb.SetPolicyRequest(policy="fifo", trial={"names": []}, canary={"share": 0})
        )
        assert changed.policy == "fifo"
        refusal = await refused(w.admin.SetPolicy(pb.SetPolicyRequest(policy="best-ever")))
        assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["policy"])


async def test_refusals_of_the_engine_have_their_codes() -> None:
    async with world() as w:
        await w.generate(list(range(1000, 1400)))
        long = {"token_ids": {"ids": list(range(1000, 1400))}}
        admin = w.admin
        cases: list[tuple[Any, Any, grpc.StatusCode, str]] = [
            (
                admin.PinPrefix,
                pb.PinPrefixRequest(prefix={"prefix_id": "0" * 64}),
                Code.NOT_FOUND,
                "NOT_CACHED",
            ),
            (admin.PinPrefix, pb.PinPrefixRequest(prefix=long), Code.FAILED_PRECONDITION, "PIN_BUDGET"),
            (
                admin.RestoreSnapshot,
                pb.RestoreSnapshotRequest(name="none"),
                Code.NOT_FOUND,
                "SNAPSHOT_NOT_FOUND",
            ),
            (
                admin.SaveSnapshot,
                pb.SaveSnapshotRequest(name="broken"),
                Code.INTERNAL,
                "CACHE_OPERATION_FAILED",
            ),
        ]
        for method, request, code, reason in cases:
            refusal = await refused(method(request))
            assert (refusal.code, refusal.reason) == (code, reason)
            assert "/" not in refusal.message


@pytest.mark.parametrize(
    ("kind", "field", "code", "named"),
    [
        (AdminErrorKind.NOT_FOUND, "", Code.NOT_FOUND, []),
        (AdminErrorKind.AMBIGUOUS, "", Code.INVALID_ARGUMENT, ["subtree.prefix_id"]),
        (AdminErrorKind.IN_USE, "", Code.FAILED_PRECONDITION, []),
        (AdminErrorKind.OVER_BUDGET, "", Code.FAILED_PRECONDITION, []),
        (AdminErrorKind.EXISTS, "", Code.ALREADY_EXISTS, []),
        (AdminErrorKind.UNSUPPORTED, "", Code.FAILED_PRECONDITION, []),
        (AdminErrorKind.INVALID, "page_token", Code.INVALID_ARGUMENT, ["page_token"]),
        (AdminErrorKind.INVALID, "subtree.token_ids", Code.INVALID_ARGUMENT, ["subtree.token_ids"]),
        (AdminErrorKind.INVALID, "", Code.INVALID_ARGUMENT, ["subtree"]),
        (AdminErrorKind.FAILED, "", Code.INTERNAL, []),
    ],
)
def test_every_refusal_has_a_code(
    kind: AdminErrorKind, field: str, code: grpc.StatusCode, named: list[str]
) -> None:
    error = error_from_refusal(AdminRefusal(kind, "because", field), path="subtree")
    assert error.code is code
    assert [violation.field for violation in error.violations] == named
    assert "because" in error.message


async def test_without_an_engine_admin_calls_are_unavailable() -> None:
    engine = ScriptedEngine()
    async with serving(engine, started=False) as server:
        refusal = await refused(server.admin.GetStats(pb.GetStatsRequest()))
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "LOADING")
        await engine.start()
        waiting = asyncio.create_task(refused(server.admin.GetStats(pb.GetStatsRequest())))
        while not engine.asked:
            await asyncio.sleep(0)
        await engine.stop(grace_s=0)
        engine.desk.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")
        refusal = await waiting
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "ENGINE_LOST")
        refusal = await refused(server.admin.ClearCache(pb.ClearCacheRequest()))
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "ENGINE_LOST")


# -- warming --------------------------------------------------------------------------------------------


async def test_warming_computes_once_with_progress_and_pins() -> None:
    async with world(max_batch_tokens=16) as w:
        wanted = pb.WarmPrefixRequest(prefix=HERE, pin=pb.PIN_KIND_HARD, pin_lifetime={"seconds": 60})
        steps = await all_of(w.admin.WarmPrefix(wanted))
        assert {step.num_tokens for step in steps} == {80}
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
        computed = [step.computed_tokens for step in steps]
        assert computed == sorted(computed)
        assert {0, 80} <= set(computed)
        assert w.desk.pins == {steps[-1].prefix_id: (PinType.HARD, 5)}
        assert steps[-1].cached_tokens == 0
        before = w.runner.num_tokens_computed
        answer = await w.generate()
        assert answer.usage.computed_prompt_tokens == 0
        assert w.runner.num_tokens_computed == before + 1  # the second new token's


async def test_warming_again_finds_it_and_renews_its_lifetime() -> None:
    async with world() as w:
        await all_of(w.admin.WarmPrefix(pb.WarmPrefixRequest(prefix=HERE)))
        assert w.desk.lifetimes == []
        *_, last = await all_of(
            w.admin.WarmPrefix(pb.WarmPrefixRequest(prefix=HERE, lifetime={"seconds": 30}))
        )
        assert (last.computed_tokens, last.cached_tokens, last.done) == (0, 80, True)
        assert w.desk.lifetimes == [30.0]
        assert last.prefix_id == (await w.admin.LookupPrefix(pb.LookupPrefixRequest(prefix=HERE))).prefix_id


async def test_cancelling_a_warming_frees_its_blocks() -> None:
    async with world(max_batch_tokens=16) as w:
        w.runner.hold()
        call = w.admin.WarmPrefix(pb.WarmPrefixRequest(prefix={"token_ids": {"ids": [7] * 2000}}))
        assert (await call.read()).computed_tokens == 0
        call.cancel()
        w.runner.release_all()
        async with asyncio.timeout(60):
            while (
                w.server.front_end.num_active_calls
                or (stats := w.engine.stats) is None
                or stats.num_blocks_leased
                or stats.num_running
            ):
                await asyncio.sleep(0.01)
        assert w.engine._desk.streams.num_open == 0


async def test_a_prefix_that_can_never_fit_is_refused_at_once() -> None:
    async with world() as w:
        wanted = pb.WarmPrefixRequest(prefix={"token_ids": {"ids": [1] * 5000}})
        refusal = await refused(w.admin.WarmPrefix(wanted))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "KV_POOL_TOO_SMALL")


# -- snapshots ------------------------------------------------------------------------------------------


async def test_snapshots_are_saved_and_restored_with_progress() -> None:
    async with world() as w:
        await w.generate()
        steps = await all_of(w.admin.SaveSnapshot(pb.SaveSnapshotRequest(name="monday.1")))
        last = steps[-1]
        assert (last.done, last.done_objects, last.total_objects, last.done_bytes) == (True, 5, 5, 500)
        assert not any(step.done for step in steps[:-1])
        refusal = await refused(w.admin.SaveSnapshot(pb.SaveSnapshotRequest(name="monday.1")))
        assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "SNAPSHOT_EXISTS")
        replaced = await all_of(w.admin.SaveSnapshot(pb.SaveSnapshotRequest(name="monday.1", replace=True)))
        assert replaced[-1].done
        restored = await all_of(w.admin.RestoreSnapshot(pb.RestoreSnapshotRequest(name="monday.1")))
        assert restored[-1].done


async def test_cancelling_a_snapshot_stops_the_engines_work() -> None:
    async with world() as w:
        call = w.admin.SaveSnapshot(pb.SaveSnapshotRequest(name="endless"))
        await call.read()
        call.cancel()
        async with asyncio.timeout(60):
            while not w.desk.cancelled:
                await asyncio.sleep(0.01)
        assert (await w.generate()).usage.generated_tokens == 2


# -- who may --------------------------------------------------------------------------------------------

METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["CacheAdminService"].methods}


async def outcome(server: Server, method: str, metadata: Any) -> Refusal:
    kind = "unary_stream" if METHODS[method].server_streaming else "unary_unary"
    call = getattr(server.channel, kind)(f"/kvserve.v1.CacheAdminService/{method}")
    return await refused(call(b"", metadata=metadata))


@pytest.mark.parametrize("method", sorted(METHODS))
async def test_a_user_key_may_not_administer(method: str) -> None:
    engine = ScriptedEngine()
    async with serving(engine, keys=KEYS) as server:
        denied = await outcome(server, method, bearer("user"))
        assert (denied.code, denied.reason) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")
        for metadata in ((), bearer("nobody")):
            assert (await outcome(server, method, metadata)).code is Code.UNAUTHENTICATED
        assert (engine.asked, engine.submitted) == ([], [])


async def test_shutting_down_ends_watches_and_calls() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as server:
        watch = server.admin.WatchCache(pb.WatchCacheRequest())
        stats = server.admin.GetStats(pb.GetStatsRequest())
        await watch.wait_for_connection()
        while not engine.asked:
            await asyncio.sleep(0)
        ended = asyncio.gather(refused(watch), refused(stats))
        engine.desk.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")
        await server.front_end.shut_down(grace_s=0.0)
        refusals = await ended
    assert {refusal.code for refusal in refusals} == {Code.UNAVAILABLE}
