"""What a hostile or careless operator may send to CacheAdmin: a clear error that names the field."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from kvserve.v1 import cache_admin_pb2 as pb
from tests.rpc.harness import ScriptedEngine, refused, serving

NAN, INF = math.nan, math.inf
GOOD: dict[str, Any] = {"token_ids": {"ids": [1, 2, 3]}}

# Rows: method, request, the only field at fault.
Row = tuple[str, dict[str, Any], str]

NAMES_IN_FOLDERS = (
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\nb",
    "a b",
    ".hidden",
    "a..b",
    "..%2f",
    "trailing.",
    "x" * 129,
    "a\u202eb",
    "C:x",
)
DURATIONS = (
    {},
    {"seconds": -1},
    {"seconds": 10**12},
    {"seconds": -(2**63)},
    {"seconds": 2**63 - 1},
    {"nanos": -5},
    {"nanos": 2_000_000_000},
    {"seconds": 1, "nanos": -1},
)
AGES = DURATIONS[1:]  # 0 is as good an age as any
IDS = (
    "",
    "abc",
    "1234567",
    "g" * 64,
    "A" * 64,
    "0" * 65,
    "../../etc",
    "0123456\0",
    "0123456\n",
    "x" * 10_240,
)
NAMESPACES = ("x", "0" * 15, "0" * 17, "g" * 16, "A" * 16, "../x", "a\0b", "0" * 10_240)
POLICIES = ("../x", "a b", "a\0b", "a\nb", "x" * 65, "os.system('x')", ";")

SELECTORS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    *[({"prefix_id": bad}, ".prefix_id") for bad in IDS],
    ({"text": ""}, ".text"),
    ({"text": "word " * 2000}, ".text"),
    ({"text": "x" * (1 << 20)}, ".text"),
    ({"token_ids": {}}, ".token_ids.ids"),
    ({"token_ids": {"ids": [1, -1]}}, ".token_ids.ids[1]"),
    ({"token_ids": {"ids": [3072]}}, ".token_ids.ids[0]"),
    ({"token_ids": {"ids": [2**31 - 1]}}, ".token_ids.ids[0]"),
    ({"token_ids": {"ids": [1] * 1024}}, ".token_ids.ids"),
    ({"token_ids": {"ids": [1] * 100_000}}, ".token_ids.ids"),
    ({"chat": {}}, ".chat.messages"),
    ({"chat": {"messages": [{"content": "x"}]}}, ".chat.messages[0].role"),
    ({"chat": {"messages": [{"role": "<|end|>"}]}}, ".chat.messages[0].role"),
    ({"chat": {"messages": [{"role": "stranger", "content": "x"}]}}, ".chat"),
    ({"chat": {"messages": [{"role": "user"}] * 5000}}, ".chat.messages"),
]
WITH_PREFIX = ("LookupPrefix", "WarmPrefix", "PinPrefix", "UnpinPrefix", "SetLifetime", "ReleasePrefix")

ROWS: list[Row] = [
    *[("GetStats", {"namespace": bad}, "namespace") for bad in NAMESPACES],
    *[("ListPrefixes", {"namespace": bad}, "namespace") for bad in NAMESPACES],
    *[("ListPrefixes", {"page_size": bad}, "page_size") for bad in (0, -1, 1001, 2**31 - 1, -(2**31))],
    *[("ListPrefixes", {"page_token": bad}, "page_token") for bad in ("a\0b", "a\nb", "x" * 513, "\x1b[31m")],
    *[("ListPrefixes", {"min_age": bad}, "min_age") for bad in AGES],
    *[("ListPrefixes", {"max_age": bad}, "max_age") for bad in AGES],
    ("ListPrefixes", {"min_age": {"seconds": 2}, "max_age": {"seconds": 1}}, "min_age"),
    *[("ListPrefixes", {"min_hits": bad}, "min_hits") for bad in (-1, -(2**63))],
    *[("ListPrefixes", {"tier": bad}, "tier") for bad in ("gpu", "Disk", "../x", "a\0b", "x" * 10_240)],
    *[(m, {"prefix": selector}, f"prefix{field}") for m in WITH_PREFIX for selector, field in SELECTORS],
    *[(method, {}, "prefix") for method in WITH_PREFIX],
    ("WarmPrefix", {"prefix": {"prefix_id": "0" * 64}}, "prefix.prefix_id"),
    *[("WarmPrefix", {"prefix": GOOD, "lifetime": bad}, "lifetime") for bad in DURATIONS],
    *[("WarmPrefix", {"prefix": GOOD, "pin": 1, "pin_lifetime": bad}, "pin_lifetime") for bad in DURATIONS],
    ("WarmPrefix", {"prefix": GOOD, "pin_lifetime": {"seconds": 1}}, "pin_lifetime"),
    *[("WarmPrefix", {"prefix": GOOD, "pin": bad}, "pin") for bad in (3, 999, -1)],
    *[("PinPrefix", {"prefix": GOOD, "kind": bad}, "kind") for bad in (3, 999, -1, 2**31 - 1)],
    *[("PinPrefix", {"prefix": GOOD, "lifetime": bad}, "lifetime") for bad in DURATIONS],
    *[("SetLifetime", {"prefix": GOOD, "lifetime": bad}, "lifetime") for bad in DURATIONS],
    *[("EvictPrefixes", {"subtree": selector}, f"subtree{field}") for selector, field in SELECTORS],
    ("EvictPrefixes", {}, "subtree"),
    ("EvictPrefixes", {"in_use": pb.IN_USE_SKIP, "tiers": True}, "subtree"),
    *[("EvictPrefixes", {"namespace": bad}, "namespace") for bad in NAMESPACES],
    *[("EvictPrefixes", {"min_idle": bad}, "min_idle") for bad in AGES],
    *[("EvictPrefixes", {"subtree": GOOD, "in_use": bad}, "in_use") for bad in (3, 999, -1)],
    *[("ClearCache", {"in_use": bad}, "in_use") for bad in (3, 999, -1)],
    *[("SetPolicy", {"policy": bad}, "policy") for bad in POLICIES],
    *[("SetPolicy", {"trial": {"names": ["lru", bad]}}, "trial.names[1]") for bad in (*POLICIES, "")],
    ("SetPolicy", {"trial": {"names": ["lru", "lru"]}}, "trial.names"),
    ("SetPolicy", {"trial": {"names": [f"p{i}" for i in range(17)]}}, "trial.names"),
    ("SetPolicy", {"trial": {"names": ["x"] * 100_000}}, "trial.names"),
    *[
        ("SetPolicy", {"canary": {"policy": "lru", "share": bad}}, "canary.share")
        for bad in (NAN, INF, -INF, -0.1, 0.51, 1e300)
    ],
    *[("SetPolicy", {"canary": {"policy": bad, "share": 0.1}}, "canary.policy") for bad in (*POLICIES, "")],
    *[("WatchCache", {"namespace": bad}, "namespace") for bad in NAMESPACES],
    *[("WatchCache", {"kinds": [1, bad]}, "kinds[1]") for bad in (0, 9, 999, -1)],
    ("WatchCache", {"kinds": [1] * 65}, "kinds"),
    *[("SaveSnapshot", {"name": bad}, "name") for bad in NAMES_IN_FOLDERS],
    *[("SaveSnapshot", {"name": "ok", "namespace": bad}, "namespace") for bad in NAMESPACES],
    *[("RestoreSnapshot", {"name": bad}, "name") for bad in NAMES_IN_FOLDERS],
    *[("UnloadModel", {"drain": bad}, "drain") for bad in AGES],
]

# What else a request needs so that its model alone is at fault.
WITH_MODEL: dict[str, dict[str, Any]] = {
    "GetStats": {},
    "ListPrefixes": {},
    **{method: {"prefix": GOOD} for method in WITH_PREFIX},
    "EvictPrefixes": {"subtree": GOOD},
    "ClearCache": {},
    "GetPolicy": {},
    "SetPolicy": {},
    "WatchCache": {},
    "SaveSnapshot": {"name": "ok"},
    "RestoreSnapshot": {"name": "ok"},
    "LoadModel": {},
    "UnloadModel": {},
    # Of predict; their own rows are in test_predict_admin.
    "SetModelAlias": {"alias": "canary", "version": "1"},
    "GetReuse": {},
    "WatchReuse": {},
    "ClearReuse": {},
}
OF_PREDICT = {"LoadModel", "UnloadModel", "SetModelAlias", "GetReuse", "WatchReuse", "ClearReuse"}
BAD_MODELS = ("../x", "/etc", "a\0b", "..%2f", "a b", "x" * 10_240, "a\u202e")


def request(method: str, fields: dict[str, Any]) -> Any:
    return getattr(pb, f"{method}Request")(**fields)


async def test_every_bad_field_is_named_and_nothing_reaches_the_engine() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as server:
        for method, fields, field in ROWS:
            refusal = await refused(getattr(server.admin, method)(request(method, fields)))
            row = f"{method} {str(fields)[:200]}"
            assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT, row
            assert list(refusal.fields) == [field], row
            assert refusal.reason == "INVALID_ARGUMENT", row
            assert field in refusal.message, row
        assert server.front_end.num_active_calls == 0
    assert (engine.asked, engine.submitted) == ([], [])


@pytest.mark.parametrize("method", sorted(WITH_MODEL))
async def test_models_that_cannot_be_or_are_not_served(method: str) -> None:
    engine = ScriptedEngine()
    async with serving(engine) as server:
        call = getattr(server.admin, method)
        for model in BAD_MODELS:
            refusal = await refused(call(request(method, {**WITH_MODEL[method], "model": model})))
            assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
            assert list(refusal.fields) == ["model"]
            assert model not in refusal.message
        refusal = await refused(call(request(method, {**WITH_MODEL[method], "model": "other/model"})))
        assert (refusal.code, refusal.reason) == (
            # Every other name would be predict's, which this server has not.
            (grpc.StatusCode.FAILED_PRECONDITION, "NOT_CONFIGURED")
            if method in OF_PREDICT
            else (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        )
    assert engine.asked == []


def test_every_method_has_its_hostile_rows() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["CacheAdminService"].methods}
    assert {method for method, _, _ in ROWS} | set(WITH_MODEL) == methods - {"ListModels"}


async def test_all_violations_are_reported_together() -> None:
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(
            server.admin.ListPrefixes(
                pb.ListPrefixesRequest(
                    model="../x",
                    page_size=0,
                    page_token="\0",
                    namespace="x",
                    min_age={"seconds": -1},
                    max_age={"seconds": -1},
                    min_hits=-1,
                    tier="x",
                )
            )
        )
    assert set(refusal.fields) == {
        "model",
        "page_size",
        "page_token",
        "namespace",
        "min_age",
        "max_age",
        "min_hits",
        "tier",
    }


async def test_error_texts_do_not_echo_what_was_sent() -> None:
    async with serving(ScriptedEngine()) as server:
        for call in (
            server.admin.SaveSnapshot(pb.SaveSnapshotRequest(name="/secret/\x1b[31m", namespace="secret")),
            server.admin.PinPrefix(pb.PinPrefixRequest(prefix={"prefix_id": "secret"})),
            server.admin.SetPolicy(pb.SetPolicyRequest(policy="secret policy")),
        ):
            refusal = await refused(call)
            assert "secret" not in refusal.message + "".join(refusal.fields.values())


@pytest.mark.parametrize("method", sorted(WITH_MODEL))
async def test_bytes_that_are_no_message_are_an_invalid_argument(method: str) -> None:
    async with serving(ScriptedEngine()) as server:
        for raw in (b"\xff" * 40, b"\x0a\x7fshort", b"\x0a\x03\xff\xfe\xfd", b"\x0b" * 5000):
            call = server.channel.unary_stream(f"/kvserve.v1.CacheAdminService/{method}")
            refusal = await refused(call(raw))
            assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
            assert list(refusal.fields) == ["request"]


@pytest.mark.parametrize("value", [2**31, 2**32 + 100, 2**40 + 5, 2**63 - 1])
async def test_integers_beyond_32_bits_do_not_wrap(value: int) -> None:
    out = bytearray()
    rest = value
    while rest >= 0x80:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    raw = bytes([2 << 3, *out, rest])  # page_size
    engine = ScriptedEngine()
    async with serving(engine) as server:
        call = server.channel.unary_unary("/kvserve.v1.CacheAdminService/ListPrefixes")
        refusal = await refused(call(raw))
    assert (refusal.code, list(refusal.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_size"])
    assert engine.asked == []


async def test_a_server_that_cannot_load_models_says_so() -> None:
    async with serving(ScriptedEngine()) as server:
        for call in (
            server.admin.LoadModel(pb.LoadModelRequest()),
            server.admin.UnloadModel(pb.UnloadModelRequest()),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_CONFIGURED")
        [status] = (await server.admin.ListModels(pb.ListModelsRequest())).models
        assert (status.name, status.state, status.kind) == ("tiny", pb.MODEL_STATE_READY, "generate")
