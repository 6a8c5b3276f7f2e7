"""From arguments to messages about the cache and back, and what is refused before anything is sent."""

from dataclasses import fields
from typing import Any

import pytest

import kvserve
from kvserve import PrefixId
from kvserve.testing import AsyncMockTransport, MockTransport
from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import common_pb2

ANSWERS: dict[str, Any] = {
    "GetStats": pb.GetStatsResponse(),
    "ListPrefixes": pb.ListPrefixesResponse(),
    "LookupPrefix": pb.LookupPrefixResponse(),
    "PinPrefix": pb.PinPrefixResponse(),
    "UnpinPrefix": pb.UnpinPrefixResponse(),
    "SetLifetime": pb.SetLifetimeResponse(),
    "ReleasePrefix": pb.ReleasePrefixResponse(),
    "EvictPrefixes": pb.EvictPrefixesResponse(),
    "ClearCache": pb.ClearCacheResponse(),
    "GetPolicy": pb.GetPolicyResponse(),
    "SetPolicy": pb.GetPolicyResponse(),
    "WarmPrefix": [pb.WarmPrefixProgress(done=True)],
    "SaveSnapshot": [pb.SnapshotProgress(done=True)],
    "RestoreSnapshot": [pb.SnapshotProgress(done=True)],
    "LoadModel": [pb.LoadModelProgress(done=True)],
    "UnloadModel": pb.UnloadModelResponse(),
}


@pytest.fixture
def transport():
    return MockTransport(lambda method, request: ANSWERS[method])


@pytest.fixture
def client(transport):
    with kvserve.Client(transport=transport) as running:
        yield running


def test_what_is_not_given_stays_absent(client, transport):
    client.cache.stats()
    list(client.cache.prefixes())
    client.cache.warm("x").wait()
    client.cache.set_lifetime("x", None)
    assert transport.requests == [
        pb.GetStatsRequest(),
        pb.ListPrefixesRequest(),
        pb.WarmPrefixRequest(prefix=pb.PrefixSelector(text="x")),
        pb.SetLifetimeRequest(prefix=pb.PrefixSelector(text="x")),
    ]


def test_every_argument_of_a_listing_has_its_place(client, transport):
    listed = client.cache.prefixes(
        model="m",
        namespace="n",
        min_age_s=0,
        max_age_s=2.5,
        min_hits=0,
        pinned=False,
        tier="disk",
        page_size=10,
    )
    assert list(listed) == []
    [request] = transport.requests
    expected = pb.ListPrefixesRequest(
        model="m", namespace="n", min_hits=0, pinned=False, tier="disk", page_size=10, page_token=""
    )
    expected.min_age.SetInParent()
    expected.max_age.FromMilliseconds(2500)
    assert request == expected


def test_prefixes_are_told_apart_by_what_they_are_made_of(client, transport):
    for prefix in (
        "3fa9c1d2",
        PrefixId("3fa9c1d2"),
        (1, 2),
        [],
        iter_once([5, 6]),
        [{"role": "user", "content": "Hi"}],
    ):
        client.cache.lookup(prefix)
    selectors = [request.prefix for request in transport.requests]
    assert [selector.WhichOneof("prefix") for selector in selectors] == [
        "text",
        "prefix_id",
        "token_ids",
        "token_ids",
        "token_ids",
        "chat",
    ]
    assert list(selectors[4].token_ids.ids) == [5, 6]


def iter_once(numbers):
    yield from numbers


def test_a_conversation_may_go_on(client, transport):
    client.cache.warm([kvserve.ChatMessage("system", "Be brief.")], add_generation_prompt=False).wait()
    assert transport.requests[0].prefix.chat == common_pb2.Chat(
        messages=[common_pb2.ChatMessage(role="system", content="Be brief.")], add_generation_prompt=False
    )


def test_times_pins_and_reach_have_their_places(client, transport):
    client.cache.warm("x", lifetime_s=1.5, pin="hard", pin_lifetime_s=60).wait()
    client.cache.evict(
        PrefixId("3fa9c1d2"), namespace="n", min_idle_s=5, in_use="skip", tiers=False, model="m"
    )
    client.models.unload("m", drain_s=0)
    warm, evict, unload = transport.requests
    assert (warm.lifetime.ToMilliseconds(), warm.pin, warm.pin_lifetime.seconds) == (
        1500,
        pb.PIN_KIND_HARD,
        60,
    )
    expected = pb.EvictPrefixesRequest(
        model="m",
        subtree=pb.PrefixSelector(prefix_id="3fa9c1d2"),
        namespace="n",
        in_use=pb.IN_USE_SKIP,
        tiers=False,
    )
    expected.min_idle.FromSeconds(5)
    assert evict == expected
    assert unload.HasField("drain")


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda cache: cache.warm("x", lifetime_s=-1), "lifetime_s must be above 0"),
        (lambda cache: cache.warm("x", lifetime_s=float("nan")), "lifetime_s"),
        (lambda cache: cache.warm("x", pin="soft", pin_lifetime_s=float("inf")), "pin_lifetime_s"),
        (lambda cache: cache.warm("x", pin="weak"), "pin must be 'soft' or 'hard'; not 'weak'"),
        (lambda cache: cache.pin("x", "weak"), "kind must be"),
        (lambda cache: cache.pin("x", lifetime_s=0), "lifetime_s"),
        (lambda cache: cache.pin(PrefixId("1234567")), "at least 8 characters"),
        (lambda cache: cache.set_lifetime("x", -0.5), "lifetime_s"),
        (lambda cache: cache.prefixes(min_age_s=-1), "min_age_s must be at least 0"),
        (lambda cache: cache.prefixes(max_age_s=-1), "max_age_s"),
        (lambda cache: cache.prefixes(page_size=0), "page_size must be from 1 to 1000"),
        (lambda cache: cache.prefixes(tier="tape"), "tier must be one of device, host, disk, redis"),
        (lambda cache: cache.evict("x", min_idle_s=-1), "min_idle_s"),
        (lambda cache: cache.evict("x", in_use="force"), "in_use must be 'fail' or 'skip'; not 'force'"),
        (lambda cache: cache.set_policy(""), "policy must be a name"),
        (lambda cache: cache.set_policy(canary=("lru", 0.6)), "from 0 to 0.5"),
        (lambda cache: cache.set_policy(canary=("lru", float("nan"))), "from 0 to 0.5"),
        (lambda cache: cache.watch(kinds=["stored", "stolen"]), "not 'stolen'"),
        (lambda cache: cache.watch(kinds=["other"]), "not 'other'"),
        (lambda cache: cache.save_snapshot(""), "can't be empty"),
    ],
)
def test_values_that_mean_nothing_are_refused_at_once(client, transport, ask, text):
    with pytest.raises(ValueError, match=text):
        ask(client.cache)
    assert transport.requests == []


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda cache: cache.lookup(b"bytes"), "not bytes"),
        (lambda cache: cache.lookup(7), "not int"),
        (lambda cache: cache.lookup({"role": "user", "content": "x"}), "not dict"),
        (lambda cache: cache.lookup(["a", "b"]), r"prefix\.token_ids\.ids"),
        (lambda cache: cache.warm(PrefixId("3fa9c1d2")), "cached already"),
        (lambda cache: cache.warm("x", pin_lifetime_s=5), "pin_lifetime_s needs pin"),
        (lambda cache: cache.warm("x", life_time_s=5), "did you mean 'lifetime_s'"),
        (lambda cache: cache.prefixes(min_age=5), "did you mean 'min_age_s'"),
        (lambda cache: cache.evict(), r"clear\(\) empties"),
        (lambda cache: cache.set_policy(), "needs policy, trial or canary"),
        (lambda cache: cache.set_policy(trial="lru"), "a list of names"),
        (lambda cache: cache.watch(kinds="stored"), "a list of names"),
    ],
)
def test_wrong_types_and_names_are_refused_at_once(client, transport, ask, text):
    with pytest.raises(TypeError, match=text):
        ask(client.cache)
    assert transport.requests == []


def test_what_no_message_can_hold_names_its_field(client):
    with pytest.raises(kvserve.InvalidArgument, match=r"prefix\.text: is not valid Unicode"):
        client.cache.pin("\ud800")
    with pytest.raises(kvserve.InvalidArgument, match=r"subtree\.token_ids\.ids"):
        client.cache.evict([2**31])
    with pytest.raises(kvserve.InvalidArgument, match="lifetime"):
        client.cache.pin("x", lifetime_s=1e30)


def test_results_have_the_fields_of_the_contract():
    for result, message in (
        (kvserve.CacheReport, pb.GetStatsResponse),
        (kvserve.CacheStats, pb.CacheStats),
        (kvserve.NamespaceStats, pb.NamespaceStats),
        (kvserve.TierStats, pb.TierStats),
        (kvserve.Divergence, pb.Divergence),
        (kvserve.PinStats, pb.PinStats),
        (kvserve.PrefetchStats, pb.PrefetchStats),
        (kvserve.PrefetchCounts, pb.PrefetchCounts),
        (kvserve.PrefixInfo, pb.PrefixInfo),
        (kvserve.TierBlocks, pb.TierBlocks),
        (kvserve.PrefixLookup, pb.LookupPrefixResponse),
        (kvserve.WarmProgress, pb.WarmPrefixProgress),
        (kvserve.PinResult, pb.PinPrefixResponse),
        (kvserve.LifetimeResult, pb.SetLifetimeResponse),
        (kvserve.EvictResult, pb.EvictPrefixesResponse),
        (kvserve.EvictResult, pb.ClearCacheResponse),
        (kvserve.PolicyReport, pb.GetPolicyResponse),
        (kvserve.PolicyInfo, pb.PolicyInfo),
        (kvserve.TrialResult, pb.TrialResult),
        (kvserve.CanaryInfo, pb.CanaryInfo),
        (kvserve.CacheEvent, pb.CacheEvent),
        (kvserve.SnapshotProgress, pb.SnapshotProgress),
        (kvserve.ModelStatus, pb.ModelStatus),
        (kvserve.LoadProgress, pb.LoadModelProgress),
        (kvserve.Usage, common_pb2.Usage),
        (kvserve.Timings, common_pb2.Timings),
        (kvserve.Restore, common_pb2.Restore),
    ):
        assert {field.name for field in fields(result)} == set(message.DESCRIPTOR.fields_by_name), result


def test_kinds_and_states_are_those_of_the_contract():
    for ours, theirs, prefix in (
        (kvserve.CacheEventKind, pb.CacheEventKind, "CACHE_EVENT_KIND_"),
        (kvserve.ModelState, pb.ModelState, "MODEL_STATE_"),
        (kvserve.PinKind, pb.PinKind, "PIN_KIND_"),
        (kvserve.RestoreDecision, common_pb2.Restore.Decision, ""),
    ):
        known = {prefix + each.name for each in ours} - {f"{prefix}OTHER"}
        assert known == {name for name, number in theirs.items() if number}


async def test_an_old_server_that_says_nothing_new_is_understood():
    transport = AsyncMockTransport(lambda method, request: ANSWERS[method])
    async with kvserve.AsyncClient(transport=transport) as client:
        report = await client.cache.stats()
        assert (report.total.requests, report.tiers, report.prefetch.waiting.used_blocks) == (0, (), 0)
        warmed = await client.cache.warm("x")
        assert (warmed.done, warmed.prefix_id) == (True, None)
        assert (await client.models.unload("m")).state is kvserve.ModelState.OTHER


def test_a_lossy_tier_reports_its_divergence():
    measured = pb.Divergence(measured_blocks=5, relative_l2=0.01, is_over_budget=True)
    answer = pb.GetStatsResponse(
        tiers=[pb.TierStats(tier="disk", divergence=measured), pb.TierStats(tier="host")]
    )
    with kvserve.Client(transport=MockTransport(lambda method, request: answer)) as client:
        disk, host = client.cache.stats().tiers
    assert (disk.divergence.measured_blocks, disk.divergence.is_over_budget) == (5, True)
    assert host.divergence is None


async def test_work_that_ends_without_its_last_step_is_an_error():
    transport = AsyncMockTransport(lambda method, request: [pb.WarmPrefixProgress()])
    async with kvserve.AsyncClient(transport=transport) as client:
        with pytest.raises(kvserve.Internal, match="without its last message"):
            await client.cache.warm("x")


def test_an_id_is_no_text():
    assert str(PrefixId("3fa9c1d2")) == "3fa9c1d2"
    assert not isinstance(PrefixId("3fa9c1d2"), str)
    assert len({PrefixId("a"), PrefixId("a")}) == 1
