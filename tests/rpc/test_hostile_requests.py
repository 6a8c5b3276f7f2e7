"""What a hostile or careless client may send, and the answer: a clear error that names the field."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import pytest

from kvserve.v1 import generate_pb2 as pb
from server.engine.fake import FakeEngine, fake_ready
from server.rpc.interceptor import CallLimits
from tests.rpc.harness import READY, ScriptedEngine, refused, request, serving

NAN, INF = math.nan, math.inf

# Each row: the parameters, and the only field that is at fault.
PARAMETERS: list[tuple[dict[str, Any], str]] = [
    *[({"max_new_tokens": value}, "max_new_tokens") for value in (0, -1, 1025, 2**31 - 1, -(2**31))],
    *[({"min_new_tokens": value}, "min_new_tokens") for value in (-1, 1025, 2**31 - 1)],
    ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens"),
    ({"min_new_tokens": 200}, "min_new_tokens"),
    *[({"temperature": value}, "temperature") for value in (-1, -1e-30, 100.1, 1e30, NAN, INF, -INF)],
    *[({"top_k": value}, "top_k") for value in (-1, -5, -(2**31))],
    *[({"top_p": value}, "top_p") for value in (0, -0.0, -0.5, 1.1, NAN, INF)],
    *[({"min_p": value}, "min_p") for value in (-0.1, 1.1, NAN, -INF)],
    *[({"repetition_penalty": value}, "repetition_penalty") for value in (0, -1, 10.5, 1e30, NAN, INF)],
    *[({"presence_penalty": value}, "presence_penalty") for value in (-2.1, 2.1, 1e30, -1e30, NAN)],
    *[({"frequency_penalty": value}, "frequency_penalty") for value in (-2.1, 2.1, 1e30, NAN, INF)],
    *[({"seed": value}, "seed") for value in (-1, -(2**63))],
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["ok", "x" * 257]}, "stop[1]"),
    ({"stop": ["\N{SNOWMAN}" * 86]}, "stop[0]"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1, 3072]}, "stop_token_ids[1]"),
    ({"stop_token_ids": [1, 2, 1]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
    ({"logit_bias": [{"token_id": -1}]}, "logit_bias[0].token_id"),
    ({"logit_bias": [{"token_id": 3072}]}, "logit_bias[0].token_id"),
    *[({"logit_bias": [{"token_id": 1, "bias": b}]}, "logit_bias[0].bias") for b in (-101, 101, NAN, INF)],
    ({"logit_bias": [{"token_id": 1}, {"token_id": 1}]}, "logit_bias"),
    ({"logit_bias": [{"token_id": i} for i in range(1025)]}, "logit_bias"),
    *[({"logprobs": value}, "logprobs") for value in (-1, 21, 129, 10**6)],
    *[({"n": value}, "n") for value in (0, -1, 65, 10**9)],
]

REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"token_ids": None}, "input"),
    ({"token_ids": {"ids": []}}, "token_ids.ids"),
    ({"token_ids": {"ids": [1, 2, -1]}}, "token_ids.ids[2]"),
    ({"token_ids": {"ids": [3072]}}, "token_ids.ids[0]"),
    ({"token_ids": {"ids": [1] * 1024}}, "token_ids.ids"),
    ({"token_ids": {"ids": [1] * 100_000}}, "token_ids.ids"),
    ({"token_ids": None, "text": ""}, "text"),
    ({"token_ids": None, "text": "word " * 2000}, "text"),
    ({"token_ids": None, "text": "x" * (1 << 20)}, "text"),
    ({"token_ids": None, "chat": {}}, "chat.messages"),
    ({"token_ids": None, "chat": {"messages": [{"content": "no role"}]}}, "chat.messages[0].role"),
    ({"token_ids": None, "chat": {"messages": [{"role": "a\nb"}]}}, "chat.messages[0].role"),
    ({"token_ids": None, "chat": {"messages": [{"role": "<|end|>"}]}}, "chat.messages[0].role"),
    ({"token_ids": None, "chat": {"messages": [{"role": "stranger", "content": "x"}]}}, "chat"),
    ({"token_ids": None, "chat": {"messages": [{"role": "user"}] * 5000}}, "chat.messages"),
    ({"token_ids": None, "chat": {"messages": [{"role": "user", "content": "x " * 2000}]}}, "chat"),
    *[
        ({"request_id": bad}, "request_id")
        for bad in ("a\0b", "a\nb", "a\u202eb", "\x1b[31m", "a\u200fb", "x" * 129)
    ],
    *[({"model": bad}, "model") for bad in ("a\0b", "../x", "/etc", "..%2f", "a b", "x" * 10_240, "a\u202e")],
    *[({"priority": bad}, "priority") for bad in (-101, 101, 2**31 - 1)],
    *[
        ({"cache": {"lifetime": {"seconds": s, "nanos": n}}}, "cache.lifetime")
        for s, n in (
            (0, 0),
            (-1, 0),
            (10**12, 0),
            (1, -1),
            (0, 2_000_000_000),
            (0, -5),
            (-(2**63), 0),
            (2**63 - 1, 0),
        )
    ],
]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        *[({"parameters": parameters}, f"parameters.{field}") for parameters, field in PARAMETERS],
        *REQUESTS,
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else None,
)
async def test_bad_field_is_named_and_nothing_reaches_the_engine(fields: dict[str, Any], field: str) -> None:
    engine = ScriptedEngine()
    async with serving(engine) as server:
        for call in (server.stub.Generate, server.stub.StreamGenerate):
            refusal = await refused(call(request(**fields)))
            assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
            assert list(refusal.fields) == [field]
            assert refusal.reason == "INVALID_ARGUMENT"
            assert field in refusal.message
    assert engine.submitted == []
    assert server.front_end.num_active_calls == 0


async def test_all_violations_are_reported_together() -> None:
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(
            server.stub.Generate(
                request(
                    token_ids={"ids": [-1]},
                    request_id="\n",
                    priority=999,
                    parameters={
                        "top_p": NAN,
                        "n": 0,
                        "stop": [""],
                        "logit_bias": [{"token_id": -1, "bias": NAN}],
                    },
                    cache={"lifetime": {}},
                )
            )
        )
    assert list(refusal.fields) == [
        "request_id",
        "priority",
        "token_ids.ids[0]",
        "parameters.top_p",
        "parameters.stop[0]",
        "parameters.logit_bias[0].token_id",
        "parameters.logit_bias[0].bias",
        "parameters.n",
        "cache.lifetime",
    ]


async def test_error_texts_do_not_echo_what_was_sent() -> None:
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(server.stub.Generate(request(model="\x1b[31msecret", request_id="secret\n")))
    assert "secret" not in refusal.message + "".join(refusal.fields.values())


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * 40,
        b"\x12\x7fshort",
        b"\x12\x03\xff\xfe\xfd",  # text that is not UTF-8
        pb.GenerateRequest(text="hello").SerializeToString()[:-2],
        b"\x0b" * 5000,  # groups within groups
    ],
)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate", "Tokenize", "Detokenize"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(raw: bytes, method: str) -> None:
    async with serving(ScriptedEngine()) as server:
        call = server.channel.unary_unary(f"/kvserve.v1.GenerateService/{method}")
        refusal = await refused(call(raw))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refusal.fields) == ["request"]
    assert "Error" not in refusal.message


@pytest.mark.parametrize("value", [2**31, 2**32, 2**32 + 5, 2**40 + 5, 2**63 - 1])
async def test_integers_beyond_32_bits_do_not_wrap(value: int) -> None:
    field = 1 << 3  # max_new_tokens
    raw = b"\x1a\x04\x0a\x02\x05\x06" + _message(5, bytes([field]) + _varint(value))
    packed = _message(3, _message(1, _varint(5) + _varint(value)))
    async with serving(FakeEngine(ready=READY)) as server:
        call = server.channel.unary_unary("/kvserve.v1.GenerateService/Generate")
        refusal = await refused(call(raw))
        assert (refusal.code, list(refusal.fields)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            ["parameters.max_new_tokens"],
        )
        refusal = await refused(call(packed))
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert next(iter(refusal.fields)).startswith("token_ids.ids")


async def test_unknown_fields_are_ignored() -> None:
    raw = request(parameters={"max_new_tokens": 2}).SerializeToString() + _message(1000, b"x" * (1 << 20))
    async with serving(FakeEngine(ready=READY)) as server:
        answer = await server.channel.unary_unary("/kvserve.v1.GenerateService/Generate")(raw)
    assert len(pb.GenerateResponse.FromString(answer).samples[0].token_ids) == 2


async def test_million_empty_messages_cost_little() -> None:
    raw = _message(5, b"\x72\x00" * 1_000_000)  # logit_bias
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(server.channel.unary_unary("/kvserve.v1.GenerateService/Generate")(raw))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "parameters.logit_bias" in refusal.fields


async def test_oversized_message_is_refused() -> None:
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(server.stub.Generate(pb.GenerateRequest(text="x" * (4 << 20))))
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream"])
async def test_call_without_a_message_is_an_invalid_argument(kind: str) -> None:
    async with serving(ScriptedEngine()) as server:
        method = "Generate" if kind == "stream_unary" else "StreamGenerate"
        for _ in range(20):
            call = getattr(server.channel, kind)(f"/kvserve.v1.GenerateService/{method}")()
            await call.done_writing()
            refusal = await refused(call)
            assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert server.front_end.num_active_calls == 0


async def test_call_with_two_messages_is_an_invalid_argument() -> None:
    raw = request().SerializeToString()
    async with serving(ScriptedEngine()) as server:
        call = server.channel.stream_unary("/kvserve.v1.GenerateService/Generate")()
        await call.write(raw)
        await call.write(raw)
        await call.done_writing()
        refusal = await refused(call)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_call_whose_message_never_comes_ends_by_itself() -> None:
    async with serving(ScriptedEngine(), limits=CallLimits(receive_timeout_s=0.05)) as server:
        calls = [server.channel.stream_unary("/kvserve.v1.GenerateService/Generate")() for _ in range(20)]
        for call in calls:
            await call.wait_for_connection()
        refusals = [await refused(call) for call in calls]
        assert {refusal.code for refusal in refusals} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert server.front_end.num_active_calls == 0


async def test_unknown_method_is_unimplemented() -> None:
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(server.channel.unary_unary("/kvserve.v1.GenerateService/Train")(b""))
    assert refusal.code is grpc.StatusCode.UNIMPLEMENTED


async def test_badly_named_model_is_reported_with_everything_else() -> None:
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(server.stub.Generate(request(model="../x", priority=1000)))
        assert list(refusal.fields) == ["model", "priority"]
        for call in (
            server.stub.Tokenize(pb.TokenizeRequest(model="../x", text="x")),
            server.stub.Detokenize(pb.DetokenizeRequest(model="../x")),
            server.stub.GetModelInfo(pb.GetModelInfoRequest(model="../x")),
        ):
            assert list((await refused(call)).fields) == ["model"]


async def test_every_field_can_be_at_fault_at_once() -> None:
    bad = {
        **dict.fromkeys(("max_new_tokens", "min_new_tokens", "top_k", "seed", "logprobs", "n"), -1),
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), NAN),
        **dict.fromkeys(("presence_penalty", "frequency_penalty"), INF),
        "stop": [""] * 16,
        "stop_token_ids": [-1, -1],
        "logit_bias": [{"token_id": -1, "bias": NAN}] * 2,
    }
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(
            server.stub.Generate(
                request(
                    model="a b",
                    request_id="\n",
                    priority=1000,
                    token_ids={"ids": [-1]},
                    parameters=bad,
                    cache={"lifetime": {}},
                )
            )
        )
    named = {field.removeprefix("parameters.").partition("[")[0] for field in refusal.fields}
    assert named == {*bad, "model", "request_id", "priority", "token_ids.ids", "cache.lifetime"}


async def test_unknown_model_is_not_found() -> None:
    async with serving(ScriptedEngine()) as server:
        for call in (
            server.stub.Generate(request(model="other/model")),
            server.stub.Tokenize(pb.TokenizeRequest(model="other", text="x")),
            server.stub.Detokenize(pb.DetokenizeRequest(model="other")),
            server.stub.GetModelInfo(pb.GetModelInfoRequest(model="other")),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_what_can_never_fit_the_pool_is_refused_at_once() -> None:
    engine = ScriptedEngine(
        ready=fake_ready(vocab_size=3072, max_model_length=1024, num_blocks=4, block_size=16)
    )
    async with serving(engine) as server:
        refusal = await refused(server.stub.Generate(request(parameters={"max_new_tokens": 63})))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KV_POOL_TOO_SMALL")
        assert engine.submitted == []
        fitting = server.stub.Generate(request(parameters={"max_new_tokens": 62}))
        while not engine.submitted:
            await asyncio.sleep(0)
        fitting.cancel()


async def test_tokenizer_methods_validate_too() -> None:
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(server.stub.Tokenize(pb.TokenizeRequest()))
        assert list(refusal.fields) == ["input"]
        refusal = await refused(server.stub.Tokenize(pb.TokenizeRequest(chat={"messages": [{"role": " "}]})))
        assert list(refusal.fields) == ["chat.messages[0].role"]
        refusal = await refused(server.stub.Detokenize(pb.DetokenizeRequest(token_ids=[0, 1, 5000])))
        assert list(refusal.fields) == ["token_ids[2]"]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _message(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body
