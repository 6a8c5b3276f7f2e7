"""Keys, scopes, tenants' salts; health and reflection."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvserve.v1 import generate_pb2 as pb
from server.engine.fake import FakeEngine
from server.engine.messages import Admitted, Finish, Finished, RequestTimings, RequestUsage, Submit, Tokens
from server.engine.streams import Event
from server.rpc.auth import ApiKeyError, Authenticator, parse_api_keys
from tests.rpc.harness import READY, ScriptedEngine, refused, request, serving

Code = grpc.StatusCode
KEYS = parse_api_keys(
    [
        {"tenant": "alice", "key": "alice-key-0123456789"},
        {"tenant": "bob", "key": "bob-key-0123456789", "scopes": ["generate", "admin"]},
        {"tenant": "keeper", "key": "keeper-key-0123456789", "scopes": ["admin"]},
    ]
)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def ends_at_once(submit: Submit) -> list[Event]:
    usage = RequestUsage(3, 0, 0, 0, 3, 1)
    return [
        Admitted(submit.key, 0),
        Tokens(submit.key, 0, [61], finish=Finish.LENGTH),
        Finished(submit.key, usage, RequestTimings(0, 0, 0, 0)),
    ]


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer "),),
        (("authorization", "alice-key-0123456789"),),
        (("authorization", "Basic alice-key-0123456789"),),
        bearer("alice-key-012345678"),
        bearer("x" * 6000),
        bearer("alice-key-0123456789") + bearer("alice-key-0123456789"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate", "Tokenize", "Detokenize", "GetModelInfo"])
async def test_without_a_good_key_no_method_answers(
    metadata: tuple[tuple[str, str], ...], method: str
) -> None:
    engine = ScriptedEngine(ends_at_once)
    async with serving(engine, keys=KEYS) as server:
        call = server.channel.unary_unary(f"/kvserve.v1.GenerateService/{method}")
        refusal = await refused(call(request().SerializeToString(), metadata=metadata))
    assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert "key-0" not in refusal.message
    assert engine.submitted == []


async def test_refused_before_the_message_is_read() -> None:
    async with serving(ScriptedEngine(), keys=KEYS) as server:
        calls = [server.channel.stream_unary("/kvserve.v1.GenerateService/Generate")() for _ in range(100)]
        codes = {(await refused(call)).code for call in calls}  # none of them ever sends a message
    assert codes == {Code.UNAUTHENTICATED}


async def test_tenants_get_salts_of_their_own_that_do_not_change() -> None:
    engine = ScriptedEngine(ends_at_once)
    async with serving(engine, keys=KEYS) as server:
        for key in ("alice-key-0123456789", "bob-key-0123456789", "alice-key-0123456789"):
            await server.stub.Generate(request(), metadata=bearer(key))
    alice, bob, again = (submit.spec.salt for submit in engine.submitted)
    assert alice == again
    assert alice
    assert alice != bob
    assert "alice" not in alice


async def test_key_without_the_scope_is_denied() -> None:
    async with serving(ScriptedEngine(), keys=KEYS) as server:
        refusal = await refused(server.stub.Generate(request(), metadata=bearer("keeper-key-0123456789")))
    assert refusal.code is Code.PERMISSION_DENIED


async def test_request_ids_belong_to_their_tenant() -> None:
    async with serving(FakeEngine(ready=READY, step_s=0.01), keys=KEYS) as server:
        running = server.stub.StreamGenerate(
            request(request_id="same", parameters={"max_new_tokens": 900}),
            metadata=bearer("alice-key-0123456789"),
        )
        await running.read()
        await server.stub.Generate(
            request(request_id="same", parameters={"max_new_tokens": 1}),
            metadata=bearer("bob-key-0123456789"),
        )
        running.cancel()


async def test_without_keys_everybody_may_call() -> None:
    engine = ScriptedEngine(ends_at_once)
    async with serving(engine) as server:
        await server.stub.Generate(request(), metadata=bearer("whatever"))
    assert engine.submitted[0].spec.salt == ""


def test_admin_service_needs_the_admin_scope() -> None:
    authenticator = Authenticator(KEYS)
    method = "/kvserve.v1.CacheAdminService/Inspect"
    assert authenticator.authenticate(bearer("keeper-key-0123456789"), method).tenant == "keeper"
    with pytest.raises(Exception, match="lacks the scope admin"):
        authenticator.authenticate(bearer("alice-key-0123456789"), method)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "must be a list"),
        ([], "must be a list"),
        (["x"], "not a mapping"),
        ([{"key": "k" * 16}], "tenant"),
        ([{"tenant": "a\n", "key": "k" * 16}], "tenant"),
        ([{"tenant": "a"}], "either key or key_sha256"),
        ([{"tenant": "a", "key": "k" * 16, "key_sha256": "00" * 32}], "either key or key_sha256"),
        ([{"tenant": "a", "key": "secret"}], "at least 16"),
        ([{"tenant": "a", "key_sha256": "zz"}], "64 hexadecimal"),
        ([{"tenant": "a", "key": "k" * 16, "scopes": ["root"]}], "scopes"),
        ([{"tenant": "a", "key": "k" * 16, "role": "x"}], "unknown role"),
        ([{"tenant": "a", "key": "k" * 16}, {"tenant": "b", "key": "k" * 16}], "twice"),
    ],
)
def test_bad_keys_files_say_what_is_wrong_without_showing_keys(entries: object, message: str) -> None:
    with pytest.raises(ApiKeyError, match=message) as caught:
        parse_api_keys(entries)
    assert "secret" not in str(caught.value)
    assert "kkkk" not in str(caught.value)


def test_key_may_be_given_as_its_digest() -> None:
    import hashlib

    digest = hashlib.sha256(b"alice-key-0123456789").hexdigest()
    (by_digest,) = parse_api_keys([{"tenant": "alice", "key_sha256": digest}])
    assert by_digest.digest == KEYS[0].digest
    assert digest not in repr(by_digest)


async def test_health_follows_the_engine_and_needs_no_key() -> None:
    engine = FakeEngine(ready=READY)
    serving_status = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    async with serving(engine, keys=KEYS, started=False) as server:
        watch = server.health.Watch(health_pb2.HealthCheckRequest(service="kvserve.v1.GenerateService"))
        seen: list[int] = []

        async def turned_to(status: int) -> None:
            async with asyncio.timeout(60):
                while not seen or seen[-1] != status:
                    seen.append((await watch.read()).status)

        await turned_to(not_serving)
        await engine.start()
        await turned_to(serving_status)
        engine.lose()
        await turned_to(not_serving)
        engine.recover()
        await turned_to(serving_status)
        overall = await server.health.Check(health_pb2.HealthCheckRequest())
        assert overall.status == serving_status
        stopping = asyncio.create_task(server.front_end.shut_down(grace_s=600))
        await turned_to(not_serving)
        async with asyncio.timeout(60):  # the watcher does not hold the grace
            await stopping


async def test_health_of_an_unknown_service_is_not_found() -> None:
    async with serving(ScriptedEngine()) as server:
        stub = health_pb2_grpc.HealthStub(server.channel)
        refusal = await refused(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert refusal.code is Code.NOT_FOUND


async def test_reflection_names_the_service_and_needs_a_key() -> None:
    wanted = [reflection_pb2.ServerReflectionRequest(list_services="")]
    async with serving(ScriptedEngine()) as server:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        async for answer in stub.ServerReflectionInfo(iter(wanted)):
            names = [service.name for service in answer.list_services_response.service]
    assert "kvserve.v1.GenerateService" in names
    async with serving(ScriptedEngine(), keys=KEYS) as server:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        refusal = await refused(stub.ServerReflectionInfo(iter(wanted)))
    assert refusal.code is Code.UNAUTHENTICATED


async def test_model_info_with_a_key() -> None:
    async with serving(ScriptedEngine(), keys=KEYS) as server:
        info = await server.stub.GetModelInfo(
            pb.GetModelInfoRequest(), metadata=bearer("alice-key-0123456789")
        )
    assert info.vocab_size == 3072
