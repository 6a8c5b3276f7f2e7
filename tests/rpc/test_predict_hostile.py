"""What a hostile or careless client may send to Predict: a clear error that names the field."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import grpc
import pytest

from kvserve.v1 import predict_pb2 as pb
from server.rpc.interceptor import CallLimits
from server.rpc.predict_read import read_predict
from server.rpc.wire import find_overflow
from tests.rpc.harness import ScriptedEngine, refused, serving
from tests.rpc.scripted_predict import ScriptedPredict

Code = grpc.StatusCode
NAN, INF = math.nan, math.inf
GOOD_ROW = {"values": [0.0, 1.0, 2.0, 3.0]}
METHODS = ("Predict", "Embed", "GetPredictModel")
PATH = "/kvserve.v1.PredictService"


def with_rows(*rows: list[float]) -> dict[str, Any]:
    return {"model": "risk", "features": {"rows": [{"values": row} for row in rows]}}


def with_texts(*items: dict[str, str]) -> dict[str, Any]:
    return {"model": "sizes", "texts": {"items": list(items)}}


OK = with_texts({"text": "x"})
NAMES = ("a\0b", "../x", "/etc", "..%2f", "a b", "x" * 10_240, "a\u202e", "a\nb")

# Each row: a request, and the only field that is at fault.
PREDICT: list[tuple[dict[str, Any], str]] = [
    ({"model": "sizes"}, "input"),
    ({"model": "sizes", "texts": {}}, "texts.items"),
    ({"model": "risk", "features": {}}, "features.rows"),
    (with_rows([]), "features.rows[0].values"),
    (with_rows([], [1, 2]), "features.rows[0].values"),
    (with_rows([1, 2, 3, 4], []), "features.rows[1].values"),
    (with_rows([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3]), "features.rows[2].values"),
    (with_rows([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3]), "features.rows[1].values"),
    (with_rows([1, 2, 3]), "features.rows[0].values"),  # the model's own number
    (with_rows([1, 2, 3, 4, 5] * 1000), "features.rows[0].values"),
    *[
        (with_rows([1, 2, 3, 4], [0, 0, 0, 0], [1, 2, 3, bad]), "features.rows[2].values[3]")
        for bad in (NAN, INF)
    ],
    (with_rows([-INF, NAN, INF, 0]), "features.rows[0].values[0]"),
    (with_rows([0, 1e39, 0, 0]), "features.rows[0].values[1]"),  # infinite as a float
    (with_rows(*[[1, 2, 3, 4]] * 4097), "features.rows"),
    (with_texts(*[{"text": "x"}] * 4097), "texts.items"),
    (with_texts({"text": "x" * ((1 << 20) + 1)}), "texts.items[0].text"),
    (with_texts({"text": "x"}, {"text": "x", "pair": "x" * ((1 << 20) + 1)}), "texts.items[1].pair"),
    (with_texts(*[{"text": "x"}] * 3, {"text": "x" * 101}), "texts.items[3].text"),  # the model's own limit
    (with_texts({"text": "x", "pair": "x" * 101}), "texts.items[0].pair"),
    *[(OK | {"options": {"top_k": bad}}, "options.top_k") for bad in (-1, 10_001, 2**31 - 1, -(2**31))],
    *[(OK | {"model": bad}, "model") for bad in NAMES],
    *[(OK | {"version": bad}, "version") for bad in (*NAMES, ".", "..", ".hidden", "v/1", "C:x")],
    *[
        (OK | {"request_id": bad}, "request_id")
        for bad in ("a\0b", "a\nb", "a\u202eb", "\x1b[31m", "x" * 129)
    ],
]
EMBED: list[tuple[dict[str, Any], str]] = [
    ({"model": "letters"}, "inputs"),
    ({"model": "letters", "inputs": [{"text": "x"}] * 4097}, "inputs"),
    ({"model": "letters", "inputs": [{"text": "x" * 101}, {"text": "x"}]}, "inputs[0].text"),
    ({"model": "letters", "inputs": [{"text": "x"}, {"text": "x" * ((1 << 20) + 1)}]}, "inputs[1].text"),
    ({"model": "../x", "inputs": [{"text": "x"}]}, "model"),
    ({"model": "letters", "version": "..", "inputs": [{"text": "x"}]}, "version"),
    ({"model": "letters", "request_id": "\n", "inputs": [{"text": "x"}]}, "request_id"),
]


@pytest.mark.parametrize(("fields", "field"), PREDICT, ids=lambda value: str(value)[:50])
async def test_bad_field_is_named(fields: dict[str, Any], field: str) -> None:
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        request = pb.PredictRequest(**fields)
        refusal = await refused(server.predict.Predict(request))
        assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, [field])
        assert refusal.reason == "INVALID_ARGUMENT"
        stream = server.predict.StreamPredict()
        if not request.request_id:
            request.request_id = "1"
        await stream.write(request)
        error = (await stream.read()).error
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT.value[0], field)
        stream.cancel()
        assert (await server.predict.Predict(pb.PredictRequest(**OK))).predictions
    assert server.front_end.num_active_calls == 0
    assert predict.num_open_calls == 0


@pytest.mark.parametrize(("fields", "field"), EMBED, ids=lambda value: str(value)[:50])
async def test_bad_field_of_embed_is_named(fields: dict[str, Any], field: str) -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        refusal = await refused(server.predict.Embed(pb.EmbedRequest(**fields)))
    assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, [field])


async def test_all_violations_are_reported_together_and_nothing_is_echoed() -> None:
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        request = pb.PredictRequest(
            model="\x1b[31msecret",
            version="secret secret",
            request_id="secret\n",
            options={"top_k": -5},
            features={"rows": [{"values": [1, NAN]}]},
        )
        refusal = await refused(server.predict.Predict(request))
    assert list(refusal.fields) == [
        "model",
        "version",
        "request_id",
        "options.top_k",
        "features.rows[0].values[1]",
    ]
    assert "secret" not in refusal.message + "".join(refusal.fields.values())
    assert predict.asked == []


@pytest.mark.parametrize("value", [2**31, 2**32, 2**32 + 5, 2**40 + 5, 2**63 - 1])
async def test_integers_beyond_32_bits_do_not_wrap(value: int) -> None:
    raw = pb.PredictRequest(**OK).SerializeToString() + _message(5, b"\x10" + _varint(value))
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        refusal = await refused(server.channel.unary_unary(f"{PATH}/Predict")(raw))
    assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["options.top_k"])


async def test_of_two_inputs_the_last_counts() -> None:
    # Proto3 says so of a oneof; both at once cannot be told from one after the other.
    rows = pb.PredictRequest(**with_rows([0, 0, 0, 0])).SerializeToString()
    raw = pb.PredictRequest(**OK).SerializeToString() + rows
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        answer = await server.channel.unary_unary(f"{PATH}/Predict")(raw)
    assert pb.PredictResponse.FromString(answer).predictions[0].features.prediction == 0.5


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * 40,
        b"\x0a\x7fshort",
        b"\x0a\x03\xff\xfe\xfd",  # text that is not UTF-8
        pb.PredictRequest(model="sizes").SerializeToString()[:-2],
        b"\x0b" * 5000,  # groups within groups
    ],
)
@pytest.mark.parametrize("method", METHODS)
async def test_bytes_that_are_no_message_are_an_invalid_argument(raw: bytes, method: str) -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        refusal = await refused(server.channel.unary_unary(f"{PATH}/{method}")(raw))
    assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["request"])


async def test_calls_with_no_message_two_or_a_late_one() -> None:
    raw = pb.PredictRequest(**OK).SerializeToString()
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        none, two = [server.channel.stream_unary(f"{PATH}/Predict")() for _ in range(2)]
        await none.done_writing()
        await two.write(raw)
        await two.write(raw)
        await two.done_writing()
        codes = [(await refused(call)).code for call in (none, two)]
    assert server.front_end.num_active_calls == 0
    limits = CallLimits(receive_timeout_s=0.05)
    async with serving(ScriptedEngine(), predict=ScriptedPredict(), limits=limits) as server:
        late = server.channel.stream_unary(f"{PATH}/Predict")()
        await late.wait_for_connection()
        codes.append((await refused(late)).code)
    assert codes == [Code.INVALID_ARGUMENT, Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED]
    assert server.front_end.num_active_calls == 0


@pytest.mark.parametrize(
    ("path", "raw", "field"),
    [
        ("Predict", b"\x22%b" % (b"\x0a\x00" * 1_000_000), "features.rows"),
        ("Predict", b"\x1a%b" % (b"\x0a\x00" * 1_000_000), "texts.items"),
        ("Embed", b"\x1a\x00" * 1_000_000, "inputs"),
    ],
)
async def test_a_million_empty_inputs_cost_little(path: str, raw: bytes, field: str) -> None:
    raw = b"\x0a\x05sizes" + (raw if path == "Embed" else raw[:1] + _varint(len(raw) - 1) + raw[1:])
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3):
            refusal = await refused(server.channel.unary_unary(f"{PATH}/{path}")(raw))
            assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, [field])
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    # Some for this client's own copies: they are not parsed at all.
    assert grown_kb < 30 * 1024


async def test_a_million_rows_with_a_list_each_are_too_many() -> None:
    row = b"\x0a\x02\x0a\x00"  # as small as a row with a list in it gets
    raw = b"\x0a\x04risk\x22" + _varint(len(row) * 1_000_000) + row * 1_000_000
    assert len(raw) < 4 << 20
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        refusal = await refused(server.channel.unary_unary(f"{PATH}/Predict")(raw))
    assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["features.rows"])


def test_a_large_array_of_floats_is_not_walked_number_by_number() -> None:
    # Floats in one row, an option that could overflow, and bytes that do not come out as they came.
    request = pb.PredictRequest(**with_rows([1.5] * 1_000_000), options={"top_k": 3})
    raw = request.SerializeToString() + pb.PredictRequest(model="risk").SerializeToString()
    parsed = pb.PredictRequest.FromString(raw)
    assert parsed.SerializeToString() != raw
    started_s = time.process_time()
    assert find_overflow(parsed, raw) is None
    ask = read_predict(parsed, max_inputs=4096)
    used_s = time.process_time() - started_s
    assert len(ask.inputs.rows) == 4_000_000
    # One by one, a million Python numbers take more than a second.
    assert used_s < 0.5


def test_rows_without_integers_are_not_walked_either() -> None:
    rows = pb.PredictRequest(model="risk", features={"rows": [{}] * 500_000}).SerializeToString()
    raw = rows + _message(5, b"\x10" + _varint(2**32 + 5))  # behind all of them
    assert find_overflow(pb.PredictRequest.FromString(raw), raw) == "options.top_k"


async def test_unknown_fields_are_ignored() -> None:
    raw = pb.PredictRequest(**OK).SerializeToString() + _message(1000, b"x" * (1 << 20))
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        answer = await server.channel.unary_unary(f"{PATH}/Predict")(raw)
        large = await refused(server.channel.unary_unary(f"{PATH}/Predict")(raw * 5))
    assert len(pb.PredictResponse.FromString(answer).predictions) == 1
    assert large.code is Code.RESOURCE_EXHAUSTED


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _message(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body
