"""Predict over a real server: what a caller sends, and what comes back."""

from __future__ import annotations

import asyncio
import math
from array import array
from typing import Any

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvserve.v1 import predict_pb2 as pb
from server.engine.fake import FakeEngine
from server.predict.errors import (
    ComputeError,
    ExpiredError,
    ModelInUseError,
    ModelRefusedError,
    ModelTooLargeError,
    ModelUnloadedError,
    OverloadedError,
    PredictError,
    PredictLostError,
    QuarantinedError,
)
from server.predict.interface import PredictState
from server.predict.messages import ModelStatus, Task
from server.rpc.auth import parse_api_keys
from tests.rpc.harness import READY, ScriptedEngine, Server, refused, serving
from tests.rpc.scripted_predict import SIZES, Asked, ScriptedPredict, status

Code = grpc.StatusCode


def texts(*items: str, model: str = "sizes", **fields: Any) -> pb.PredictRequest:
    return pb.PredictRequest(model=model, texts={"items": [{"text": item} for item in items]}, **fields)


def rows(*values: list[float], model: str = "risk", **fields: Any) -> pb.PredictRequest:
    return pb.PredictRequest(model=model, features={"rows": [{"values": row} for row in values]}, **fields)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


async def test_texts_are_classified_in_their_order() -> None:
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        answer = await server.predict.Predict(texts("x" * 99, "x", "x" * 50, request_id="mine"))
    assert (answer.request_id, answer.model, answer.version, answer.policy) == ("mine", "sizes", "1", "")
    first, second, third = (prediction.classification for prediction in answer.predictions)
    assert [first.label, second.label, third.label] == ["long", "short", "middle"]
    assert first.score == pytest.approx(0.6)
    assert [(one.label, one.score) for one in first.scores] == [("long", pytest.approx(0.6))]
    assert [prediction.num_tokens for prediction in answer.predictions] == [101, 3, 52]
    timings = answer.timings
    assert (timings.load_s, timings.tokenize_s, timings.queue_s, timings.compute_s) == (
        0.5,
        0.25,
        0.125,
        0.0625,
    )
    assert (timings.batch_size, timings.batch_tokens) == (7, 70)
    assert 0 < timings.total_s < 10
    [asked] = predict.asked
    assert (asked.model, asked.version, asked.task, asked.truncate, asked.reuse) == (
        "sizes",
        "",
        None,
        False,
        True,
    )


@pytest.mark.parametrize(
    ("top_k", "labels"),
    [
        (0, ["a", "b", "c", "d"]),  # all, in the model's order
        (1, ["c"]),
        (3, ["c", "a", "b"]),  # the equal ones in the model's order
        (10_000, ["c", "a", "b", "d"]),
    ],
)
async def test_top_k_says_which_scores_come(top_k: int, labels: list[str]) -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        request = texts("abccc", model="topics", options={"top_k": top_k})
        [prediction] = (await server.predict.Predict(request)).predictions
    answer = prediction.classification
    assert answer.label == "c"
    assert answer.score == pytest.approx(1.0)
    assert [one.label for one in answer.scores] == labels
    wanted = {"a": 1 / 3, "b": 1 / 3, "c": 1.0, "d": 0.0}
    assert all(one.score == pytest.approx(wanted[one.label]) for one in answer.scores)
    assert list(answer.labels) == ["c"]  # of at least a half


@pytest.mark.parametrize("top_k", [0, 2, 4])
async def test_labels_of_every_kind_arrive_whole(top_k: int) -> None:
    labels = ("", "\N{SNOWMAN}" * 50, "x" * 200, "y" * 127)
    odd = msgspec.structs.replace(SIZES, labels=labels)
    async with serving(ScriptedEngine(), predict=ScriptedPredict([status("sizes", odd)])) as server:
        answer = await server.predict.Predict(texts("x" * 60, options={"top_k": top_k}))
    scores = answer.predictions[0].classification.scores
    wanted = labels if top_k == 0 else ("x" * 200, "", "\N{SNOWMAN}" * 50, "y" * 127)[:top_k]
    assert tuple(one.label for one in scores) == wanted
    assert [one.score for one in scores] == pytest.approx(
        [0.5 if one[:1] == "x" else 1 / 6 for one in wanted]
    )


async def test_tokens_numbers_and_vectors() -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        [tagged] = (await server.predict.Predict(texts("aB", model="tagger"))).predictions
        [measured] = (await server.predict.Predict(texts("a b c", model="length"))).predictions
        [embedded] = (await server.predict.Predict(texts("zz", model="letters"))).predictions
        vectors = await server.predict.Embed(
            pb.EmbedRequest(model="letters", inputs=[{"text": "zz"}, {"text": "a", "pair": "b"}])
        )
    assert [(one.label, one.start, one.end, one.part, one.score) for one in tagged.tokens.tokens] == [
        ("lower", 0, 1, 0, 0.75),
        ("upper", 1, 2, 0, 0.75),
    ]
    assert list(measured.regression.values) == [5.0, 2.0]
    assert len(embedded.embedding.values) == 26
    assert max(embedded.embedding.values) == embedded.embedding.values[25]
    assert list(vectors.vectors[0].values) == list(embedded.embedding.values)
    assert math.hypot(*vectors.vectors[1].values) == pytest.approx(1.0)
    assert (vectors.num_tokens, vectors.num_truncated, vectors.version) == (8, 0, "1")
    assert vectors.request_id.startswith("req-")


async def test_rows_of_features_arrive_bit_by_bit() -> None:
    predict = ScriptedPredict()
    values = [[0.0, 1.0, -0.0, 1e-45], [0.1, 2.0, 3.4e38, -1.5]]
    async with serving(ScriptedEngine(), predict=predict) as server:
        answer = await server.predict.Predict(rows(*values))
    assert predict.asked[0].inputs.num_rows == 2
    assert predict.asked[0].inputs.rows == array("f", values[0] + values[1]).tobytes()
    first, second = answer.predictions
    assert first.features.prediction == pytest.approx(sigmoid(1.0))
    assert second.features.prediction == 1.0
    assert [first.cache_hit, second.cache_hit] == [True, False]
    assert answer.policy == "p1,p2"  # rows may fall to several


@pytest.mark.parametrize("width", [1, 31, 32, 33, 4095, 4096])
@pytest.mark.parametrize("num_rows", [1, 2, 5])
async def test_rows_of_every_width_are_cut_from_the_wire_exactly(width: int, num_rows: int) -> None:
    from server.rpc.predict_read import read_predict

    table = [[float(row * width + column) for column in range(width)] for row in range(num_rows)]
    plain = rows(*table)
    with_unknown = pb.PredictRequest.FromString(plain.SerializeToString())
    with_unknown.features.rows[-1].MergeFromString(b"\xfa\x3e\x02hi")
    unpacked = pb.PredictRequest(model="risk")
    one_by_one = b"".join(b"\x0d" + array("f", [value]).tobytes() for value in table[0])
    unpacked.features.rows.add().MergeFromString(one_by_one)
    wanted = array("f", [value for row in table for value in row]).tobytes()
    assert read_predict(plain, max_inputs=8).inputs.rows == wanted
    assert read_predict(with_unknown, max_inputs=8).inputs.rows == wanted
    assert read_predict(unpacked, max_inputs=8).inputs.rows == wanted[: 4 * width]


async def test_options_reach_the_backend() -> None:
    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        long = await server.predict.Predict(
            texts("x" * 500, "x", version="1", options={"truncate": True, "reuse": False})
        )
        assert [one.truncated for one in long.predictions] == [True, False]
        embedded = pb.EmbedRequest(
            model="letters", inputs=[{"text": "x" * 500}, {"text": "x"}], options={"truncate": True}
        )
        assert (await server.predict.Embed(embedded)).num_truncated == 1
        await server.predict.Predict(rows([0, 0, 0, 0]), timeout=5)
    first, second, third = predict.asked
    assert (first.version, first.truncate, first.reuse) == ("1", True, False)
    assert (second.task, second.truncate) == (Task.EMBED, True)
    assert third.deadline_s is not None
    assert 0 < third.deadline_s < 6  # clocks of the transport are coarse


async def test_labels_are_those_of_the_version_that_answered() -> None:
    new = msgspec.structs.replace(SIZES, labels=("klein", "mittel", "gross"))
    predict = ScriptedPredict([status("sizes", SIZES, version="1"), status("sizes", new, version="2")])
    swapped = asyncio.Event()

    async def swap(asked: Asked) -> None:
        # While version 2 computes, it stops being the latest.
        predict.catalogue.reverse()
        swapped.set()

    predict.before = swap
    async with serving(ScriptedEngine(), predict=predict) as server:
        answer = await server.predict.Predict(texts("x"))
        assert swapped.is_set()
        assert (answer.version, answer.predictions[0].classification.label) == ("2", "klein")
        predict.before = None
        answer = await server.predict.Predict(texts("x"))
        assert (answer.version, answer.predictions[0].classification.label) == ("1", "short")


async def test_a_description_from_before_the_load_does_not_lose_the_answer() -> None:
    class Stale(ScriptedPredict):
        async def describe(self, model: str, version: str = "") -> ModelStatus:
            return msgspec.structs.replace(await super().describe(model, version), info=None)

    async with serving(ScriptedEngine(), predict=Stale()) as server:
        answer = await server.predict.Predict(texts("x"))
    assert answer.predictions[0].classification.label == "short"


async def test_what_is_computed_while_the_process_drains_is_answered() -> None:
    async def drain(asked: Asked) -> None:
        predict.fails = PredictLostError("it is being drained")

    predict = ScriptedPredict()
    async with serving(ScriptedEngine(), predict=predict) as server:
        await server.predict.Predict(texts("x"))
        predict.before = drain
        assert (await server.predict.Predict(texts("x"))).predictions[0].classification.label == "short"
        # Of a version that has never answered nobody knows what its numbers mean.
        refusal = await refused(server.predict.Predict(texts("x", model="topics")))
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "PREDICT_LOST")


async def test_the_only_model_needs_no_name() -> None:
    predict = ScriptedPredict([status("sizes", SIZES, version=version) for version in ("1", "2")])
    async with serving(ScriptedEngine(), predict=predict) as server:
        assert (await server.predict.Predict(texts("x", model=""))).model == "sizes"
        assert (await server.predict.GetPredictModel(pb.GetPredictModelRequest())).name == "sizes"
        predict.catalogue.append(status("other", SIZES))
        for call in (
            server.predict.Predict(texts("x", model="")),
            server.predict.GetPredictModel(pb.GetPredictModelRequest()),
        ):
            refusal = await refused(call)
            assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["model"])


async def test_a_model_is_described_without_being_loaded() -> None:
    predict = ScriptedPredict()
    predict.catalogue.append(status("later", None, version="7", aliases=("canary",)))
    async with serving(ScriptedEngine(), predict=predict) as server:
        ask = server.predict.GetPredictModel
        sizes = await ask(pb.GetPredictModelRequest(model="sizes"))
        letters = await ask(pb.GetPredictModelRequest(model="letters", version="1"))
        later = await ask(pb.GetPredictModelRequest(model="later", version="canary"))
    assert (sizes.task, list(sizes.labels)) == (pb.PREDICT_TASK_CLASSIFY, ["short", "middle", "long"])
    assert (sizes.family, sizes.max_length, sizes.num_bytes, sizes.loaded) == ("bert", 100, 1000, True)
    assert (letters.num_dimensions, letters.pooling, letters.normalized) == (26, "mean", True)
    assert later == pb.PredictModel(name="later", version="7", aliases=["canary"])
    assert predict.asked == []


ERRORS: list[tuple[PredictError, Code, str, float | None]] = [
    (ModelRefusedError("its files are not safetensors"), Code.FAILED_PRECONDITION, "MODEL_REFUSED", None),
    (ModelTooLargeError("it takes 2 GB of 1 GB"), Code.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE", None),
    (ModelInUseError("requests run on it"), Code.FAILED_PRECONDITION, "MODEL_BUSY", None),
    (ModelUnloadedError("it was unloaded"), Code.FAILED_PRECONDITION, "MODEL_NOT_LOADED", None),
    (OverloadedError("too much waits", retry_after_s=0.25), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.25),
    (OverloadedError("too much waits"), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 1.0),
    (PredictLostError("it is started again"), Code.UNAVAILABLE, "PREDICT_LOST", 1.0),
    (ExpiredError("the deadline passed"), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", None),
    (ComputeError("the numbers are none"), Code.INTERNAL, "NUMERICAL", None),
    (QuarantinedError("the process has died of it"), Code.INTERNAL, "QUARANTINED", None),
]


@pytest.mark.parametrize(
    ("error", "code", "reason", "retry_after_s"), ERRORS, ids=lambda value: str(value)[:20]
)
async def test_errors_of_predict_have_their_status(
    error: PredictError, code: Code, reason: str, retry_after_s: float | None
) -> None:
    async def fail(asked: Asked) -> None:
        raise error

    async with serving(ScriptedEngine(), predict=ScriptedPredict(before=fail)) as server:
        refusal = await refused(server.predict.Predict(texts("x")))
    assert (refusal.code, refusal.reason, refusal.message) == (code, reason, error.reason)
    assert refusal.retry_after_s == retry_after_s
    # Of what time alone does not change clients are told not to try again.
    never = "-1" if code is Code.RESOURCE_EXHAUSTED or reason == "QUARANTINED" else None
    expected = never if retry_after_s is None else str(round(retry_after_s * 1000))
    assert refusal.pushback_ms == expected


@pytest.mark.parametrize("error", [PredictError("x at /secret/path"), RuntimeError("/secret/path")])
async def test_unexpected_errors_tell_a_reference_alone(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(asked: Asked) -> None:
        raise error

    async with serving(ScriptedEngine(), predict=ScriptedPredict(before=fail)) as server:
        refusal = await refused(server.predict.Predict(texts("x", request_id="r-1")))
        stream = server.predict.StreamPredict()
        await stream.write(texts("x", request_id="r-2"))
        streamed = (await stream.read()).error
        stream.cancel()
    assert (refusal.code, refusal.reason) == (Code.INTERNAL, "INTERNAL")
    assert (streamed.code, streamed.reason) == (Code.INTERNAL.value[0], "INTERNAL")
    for text in (refusal.message, streamed.message):
        assert text.startswith("internal error; reference ")
        reference = text.removeprefix("internal error; reference ")
        assert reference in {getattr(record, "request_id", None) for record in caplog.records}


async def test_what_is_unknown_or_of_another_task() -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        for call in (
            server.predict.Predict(texts("x", model="nobody")),
            server.predict.Predict(texts("x", version="9")),
            server.predict.Embed(pb.EmbedRequest(model="nobody", inputs=[{"text": "x"}])),
            server.predict.GetPredictModel(pb.GetPredictModelRequest(model="nobody")),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
        for call in (
            server.predict.Predict(texts("x", model="risk")),
            server.predict.Predict(rows([1, 2, 3, 4], model="sizes")),
            server.predict.Embed(pb.EmbedRequest(model="sizes", inputs=[{"text": "x"}])),
        ):
            refusal = await refused(call)
            assert (refusal.code, list(refusal.fields)) == (Code.INVALID_ARGUMENT, ["model"])


async def test_a_running_calls_id_is_taken_for_its_tenant_alone() -> None:
    keys = parse_api_keys(
        [
            {"tenant": name, "key": f"{name}-key-0123456789", "scopes": ["predict"]}
            for name in ("alice", "bob")
        ]
    )
    gate = asyncio.Event()
    predict = ScriptedPredict(before=lambda asked: gate.wait())  # type: ignore[arg-type,return-value]

    def call(server: Server, name: str, request_id: str = "r") -> Any:
        metadata = (("authorization", f"Bearer {name}-key-0123456789"),)
        return server.predict.Predict(texts("x", request_id=request_id), metadata=metadata)

    async with serving(ScriptedEngine(), predict=predict, keys=keys) as server:
        running = [
            call(server, "alice"),
            call(server, "bob"),
            call(server, "alice", ""),
            call(server, "alice", ""),
        ]
        while len(predict.asked) < 4:
            await asyncio.sleep(0)
        refusal = await refused(call(server, "alice"))
        assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
        gate.set()
        await asyncio.gather(*running)
        await call(server, "alice")  # free again
    alice, bob = {asked.tenant for asked in predict.asked[:4]}
    assert alice
    assert bob
    assert alice != bob


async def test_a_call_that_is_given_up_is_cancelled_behind() -> None:
    predict = ScriptedPredict(before=lambda asked: asyncio.Event().wait())  # type: ignore[arg-type,return-value]
    async with serving(ScriptedEngine(), predict=predict) as server:
        call = server.predict.Predict(texts("x"))
        while predict.num_open_calls == 0:
            await asyncio.sleep(0)
        call.cancel()
        late = await refused(server.predict.Predict(texts("x"), timeout=0.5))
        assert late.code is Code.DEADLINE_EXCEEDED
        async with asyncio.timeout(60):
            while predict.num_open_calls:
                await asyncio.sleep(0)
        assert predict.num_cancelled == 2


async def test_answers_beyond_the_message_limit_are_refused() -> None:
    labels = tuple(f"label {index}" for index in range(2000))
    many = msgspec.structs.replace(SIZES, labels=labels)
    async with serving(ScriptedEngine(), predict=ScriptedPredict([status("sizes", many)])) as server:
        whole = texts(*["x"] * 1000, options={"top_k": 0})
        refusal = await refused(server.predict.Predict(whole))
        assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE")
        best = await server.predict.Predict(texts(*["x"] * 1000))
        assert len(best.predictions) == 1000
        assert best.predictions[0].classification.label == "label 19"


async def test_a_server_without_predict_says_so() -> None:
    async with serving(ScriptedEngine()) as server:
        stream = server.predict.StreamPredict()
        await stream.write(texts("x", request_id="r"))
        for call in (
            server.predict.Predict(texts("x")),
            server.predict.Embed(pb.EmbedRequest(model="m", inputs=[{"text": "x"}])),
            server.predict.GetPredictModel(pb.GetPredictModelRequest(model="m")),
            stream,
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_CONFIGURED")


async def test_health_and_reflection_follow_predict() -> None:
    predict = ScriptedPredict(state=PredictState.LOADING)
    async with serving(FakeEngine(ready=READY), predict=predict) as server:
        watch = server.health.Watch(health_pb2.HealthCheckRequest(service="kvserve.v1.PredictService"))
        answers = aiter(watch)
        async with asyncio.timeout(60):
            # Before the server has reported it for the first time it is unknown.
            while (await anext(answers)).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                pass
            refusal = await refused(server.predict.Predict(texts("x")))
            assert (refusal.code, refusal.retry_after_s) == (Code.UNAVAILABLE, 0.5)
            predict.state = PredictState.READY
            assert (await anext(answers)).status == health_pb2.HealthCheckResponse.SERVING
            await server.predict.Predict(texts("x"))
        watch.cancel()
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        reflected = stub.ServerReflectionInfo(iter([asked]))
        names = {service.name for service in (await anext(aiter(reflected))).list_services_response.service}
        assert "kvserve.v1.PredictService" in names
        reflected.cancel()
    assert predict.stopped_with == 0.0


async def test_answers_are_counted() -> None:
    async with serving(ScriptedEngine(), predict=ScriptedPredict()) as server:
        await server.predict.Predict(texts("abc", "de"))
        await server.predict.Predict(rows([0, 1, 2, 3], [1, 1, 1, 1]))
        labels = {"model": "sizes", "version": "1", "task": "classify"}
        assert server.sample("kvserve_predict_inputs_total", labels) == 2
        assert server.sample("kvserve_predict_tokens_total", labels) == 9
        labels = {"model": "risk", "version": "1", "task": "features"}
        assert server.sample("kvserve_predict_cache_hits_total", labels) == 1
