"""From texts and rows of features to request messages, and from answers to results."""

import json
import pickle
from array import array
from typing import assert_type

import numpy as np
import pytest

import kvserve
from kvserve._cli.output import plain
from kvserve._predict_convert import vector_from_pb
from kvserve.testing import AsyncMockTransport, MockTransport, classified, embedded
from kvserve.v1 import predict_pb2 as pb


def client_of(handler) -> kvserve.Client:
    return kvserve.Client(transport=MockTransport(handler))


def sent(method, *arguments, **options):
    """Return the one request that this call of the client's sends."""

    def handler(name, request):
        if name == "Embed":
            return embedded(*([0.0] for _ in request.inputs))
        if request.HasField("features"):
            answer = pb.Prediction(features=pb.FeaturePrediction(prediction=0.5))
            return pb.PredictResponse(predictions=[answer for _ in request.features.rows])
        return classified(*("x" for _ in request.texts.items))

    transport = MockTransport(handler)
    with kvserve.Client(transport=transport) as client:
        getattr(client, method)(*arguments, **options)
    [request] = transport.requests
    return request


def rows_sent(rows):
    return [list(row.values) for row in sent("predict_features", rows, model="m").features.rows]


def test_one_text_several_and_pairs():
    assert sent("predict", "one", model="m") == pb.PredictRequest(
        model="m", texts={"items": [{"text": "one"}]}
    )
    several = sent("predict", ["one", ("two", "three")], model="m")
    assert several.texts == pb.TextInputs(items=[{"text": "one"}, {"text": "two", "pair": "three"}])
    generated = sent("predict", (text for text in ("a", "b")), model="m")
    assert [item.text for item in generated.texts.items] == ["a", "b"]
    assert not several.texts.items[0].HasField("pair")


def test_options_that_are_not_given_stay_absent_and_zero_is_zero():
    assert not sent("predict", "x", model="m").HasField("options")
    request = sent(
        "predict", "x", model="m", version="canary", truncate=False, top_k=0, reuse=False, request_id="r"
    )
    assert (request.version, request.request_id) == ("canary", "r")
    assert request.options == pb.PredictOptions(truncate=False, top_k=0, reuse=False)


def test_an_empty_list_is_the_servers_to_judge():
    request = sent("predict", [], model="m")
    assert request.WhichOneof("input") == "texts"
    assert sent("predict_features", [], model="m").WhichOneof("input") == "features"
    assert len(sent("embed", [], model="m").inputs) == 0


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (7, r"texts.items: expected texts or pairs of texts, not int"),
        (b"bytes", r"texts.items: .* not bytes"),
        ({"a": 1}, r"texts.items: .* not dict"),
        (["a", 7], r"texts.items\[1\]: .* not int"),
        ([("a", "b", "c")], r"texts.items\[0\]: .* not tuple of 3"),
        ([("a", 7)], r"texts.items\[0\]: .* not tuple of 2"),
        ([None], r"texts.items\[0\]: .* not NoneType"),
    ],
)
def test_what_is_no_text_is_a_type_error_that_names_its_place(inputs, text):
    with pytest.raises(TypeError, match=text):
        sent("predict", inputs, model="m")


def test_text_that_is_not_unicode_names_its_field():
    with pytest.raises(kvserve.InvalidArgument, match="not valid Unicode") as caught:
        sent("predict", ["fine", "\ud800"], model="m")
    assert [violation.field for violation in caught.value.violations] == ["texts.items[1].text"]
    with pytest.raises(kvserve.InvalidArgument, match=r"^inputs\[0\]"):
        sent("embed", [("fine", "\ud800")], model="m")


ROWS = [[0.5, 1.0, -2.0], [4.0, 8.0, 16.0]]


class Tensor:
    """What numpy can make an array of, but no buffer itself."""

    def __init__(self, values):
        self.values = values

    def __array__(self):
        return np.asarray(self.values)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        tuple(map(tuple, ROWS)),
        (row for row in ROWS),
        np.array(ROWS),
        np.array(ROWS, dtype=np.float32),
        np.array(ROWS, dtype=np.float32)[:, ::1][::1],
        np.asfortranarray(ROWS),
        [np.array(row, dtype=np.float32) for row in ROWS],
        [array("d", row) for row in ROWS],
        memoryview(array("d", [*ROWS[0], *ROWS[1]])).cast("B").cast("d", (2, 3)),
        Tensor(ROWS),
        [Tensor(row) for row in ROWS],
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_come_from_whatever_holds_numbers(rows):
    assert rows_sent(rows) == ROWS


def test_rows_of_whole_numbers_and_strided_ones():
    assert rows_sent(np.arange(4, dtype=np.int64).reshape(2, 2)) == [[0.0, 1.0], [2.0, 3.0]]
    assert rows_sent(np.arange(8.0).reshape(2, 4)[:, ::2]) == [[0.0, 2.0], [4.0, 6.0]]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([0.5, 1.0], r"features.rows\[0\]: expected a row of numbers, not float; one row is \[row\]"),
        (np.zeros(3), r"features.rows: has 1 dimensions, expected a matrix; one row is \[row\]"),
        (np.zeros((1, 1, 1)), r"has 3 dimensions"),
        ([np.zeros((2, 2))], r"features.rows\[0\]: has 2 dimensions, expected a row"),
        (np.zeros((2, 2), dtype=np.float16), r"format 'e'; convert them to float32"),
        (np.array([["a"]], dtype=object), r"format 'O'; convert"),
        (np.array([["2026-01-01"]], dtype="M8[D]"), r"features.rows: .*; convert it to float32"),
        ("abc", r"features.rows: expected rows of numbers, not str"),
        (["abc"], r"features.rows\[0\]: expected a row of numbers, not str"),
        ([b"\x01"], r"features.rows\[0\]: .* not bytes"),
        ({"a": [1]}, r"features.rows: .* not dict"),
        ([{"a": 1}], r"features.rows\[0\]: .* not dict"),
        ([["a"]], r"features.rows\[0\].values"),
        ([[None]], r"features.rows\[0\].values"),
        (5, r"features.rows: expected .* not int"),
    ],
)
def test_what_is_no_row_is_a_type_error_that_names_its_place(rows, text):
    with pytest.raises(TypeError, match=text):
        sent("predict_features", rows, model="m")


def answering(**output):
    answer = pb.Prediction(**output)
    return pb.PredictResponse(request_id="r", model="m", version="3", policy="main", predictions=[answer])


def test_every_kind_of_prediction_has_its_class():
    outputs = {
        "classification": pb.Classification(
            label="b", score=0.75, scores=[pb.LabelScore(label="b", score=0.75)], labels=["b", "c"]
        ),
        "tokens": pb.TokenClassification(
            tokens=[pb.TokenLabel(label="X", score=0.5, start=1, end=3, part=1)]
        ),
        "regression": pb.Regression(values=[0.5, -1.0]),
        "embedding": pb.Vector(values=[0.25, 0.5]),
        "features": pb.FeaturePrediction(prediction=0.25),
    }
    facts = {"num_tokens": 7, "truncated": True, "cache_hit": True}
    expected = {
        "classification": kvserve.Classification(
            label="b", score=0.75, scores=(kvserve.LabelScore("b", 0.75),), labels=("b", "c"), **facts
        ),
        "tokens": kvserve.TokenClassification(
            tokens=(kvserve.TokenLabel(label="X", score=0.5, start=1, end=3, part=1),), **facts
        ),
        "regression": kvserve.Regression(values=(0.5, -1.0), **facts),
        "embedding": kvserve.Embedding(vector=array("f", [0.25, 0.5]), **facts),
        "features": kvserve.FeaturePrediction(prediction=0.25, **facts),
    }
    assert set(outputs) == {field.name for field in pb.Prediction.DESCRIPTOR.oneofs[0].fields}
    for name, output in outputs.items():
        response = answering(**{name: output}, **facts)
        with client_of(lambda method, request, response=response: response) as client:
            result = client.predict("x", model="m")
        assert list(result) == [expected[name]]
        assert (result.num_tokens, result.num_truncated, result.num_cache_hits) == (7, 1, 1)
        assert (result.model, result.version, result.policy, result.request_id) == ("m", "3", "main", "r")


def test_an_expected_kind_is_checked():
    with client_of(lambda method, request: classified("good")) as client:
        result = client.predict("x", model="m", output=kvserve.Classification)
        assert result[0].label == "good"
        assert result[:] == result.predictions
        with pytest.raises(
            kvserve.InvalidArgument, match="answers with Classification, not with Regression"
        ) as e:
            client.predict("x", model="m", output=kvserve.Regression)
    assert e.value.violations[0].field == "model"


def test_type_checkers_know_what_is_expected():
    with client_of(lambda method, request: classified("good")) as client:
        anything = client.predict("x", model="m")
        assert_type(anything, kvserve.PredictResult[kvserve.Prediction])
        certain = client.predict("x", model="m", output=kvserve.Classification)
        assert_type(certain[0], kvserve.Classification)
        assert_type(anything.expect(kvserve.Classification), kvserve.PredictResult[kvserve.Classification])
        assert anything.expect(kvserve.Classification) == certain


def test_an_answer_that_breaks_the_contract_is_an_error():
    with (
        client_of(lambda method, request: classified("a", "b")) as client,
        pytest.raises(kvserve.Internal, match="1 inputs were answered with 2 outputs"),
    ):
        client.predict("x", model="m")
    with (
        client_of(lambda method, request: pb.PredictResponse(predictions=[pb.Prediction()])) as client,
        pytest.raises(kvserve.Internal, match="of a kind that this client doesn't know"),
    ):
        client.predict("x", model="m")
    with client_of(lambda method, request: embedded()) as client, pytest.raises(kvserve.Internal):
        client.embed("x", model="m")


@pytest.mark.parametrize("length", [0, 1, 31, 32, 384, 5000])
def test_vectors_are_read_as_they_are(length):
    values = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    message = pb.Vector(values=values.tolist())
    assert vector_from_pb(message) == array("f", values)
    # Fields of a later version come after the ones known here, and change nothing.
    newer = pb.Vector.FromString(message.SerializeToString() + b"\x12\x04abcd")
    assert vector_from_pb(newer) == array("f", values)


def test_vectors_are_arrays_to_numpy_and_numbers_to_json():
    timings = pb.PredictTimings(load_s=0.5, total_s=1.0, batch_size=7)

    def handler(method, request):
        answer = embedded([1.0, 0.0], [0.0, 0.5], model="minilm", version="2")
        answer.timings.CopyFrom(timings)
        return answer

    with client_of(handler) as client:
        result = client.embed(["a", "b"], model="minilm")
    assert np.array_equal(np.asarray(result.vectors), np.array([[1.0, 0.0], [0.0, 0.5]], dtype=np.float32))
    assert np.asarray(result[0]).dtype == np.float32
    assert (len(result), result.num_dimensions, result.num_tokens, result.version) == (2, 2, 16, "2")
    assert result.timings == kvserve.PredictTimings(load_s=0.5, total_s=1.0, batch_size=7)
    assert json.loads(json.dumps(plain(result)))["vectors"] == [[1.0, 0.0], [0.0, 0.5]]
    assert pickle.loads(pickle.dumps(result)) == result


def test_a_model_is_described():
    message = pb.PredictModel(
        name="m",
        version="1",
        task=pb.PREDICT_TASK_CLASSIFY,
        labels=["a", "b"],
        max_length=512,
        aliases=["latest"],
    )
    transport = MockTransport(lambda method, request: message)
    with kvserve.Client(transport=transport) as client:
        info = client.predict_model("m", version="latest")
        assert (info.task, info.labels, info.aliases, info.loaded) == (
            kvserve.PredictTask.CLASSIFY,
            ("a", "b"),
            ("latest",),
            False,
        )
        message.task = pb.PREDICT_TASK_UNSPECIFIED
        assert client.predict_model("m").task is None
        message.task = 99  # type: ignore[assignment]
        assert client.predict_model("m").task is kvserve.PredictTask.OTHER
    assert transport.requests[0] == pb.GetPredictModelRequest(model="m", version="latest")


def test_arguments_cover_the_contract():
    options = set(pb.PredictOptions.DESCRIPTOR.fields_by_name)
    assert set(kvserve.PredictOptions.__annotations__) == options | {"version", "request_id", "timeout_s"}
    with pytest.raises(TypeError, match=r"embed\(\) got .* 'truncated'; did you mean 'truncate'"):
        sent("embed", "x", model="m", truncated=True)


async def test_the_async_client_takes_the_same_arguments_and_gives_the_same_results():
    def handler(method, request):
        return embedded([1.0]) if method == "Embed" else classified("a", "b")

    transport, other = AsyncMockTransport(handler), MockTransport(handler)
    async with kvserve.AsyncClient(transport=transport) as client:
        with kvserve.Client(transport=other) as blocking:
            assert await client.predict(["x", "y"], model="m", top_k=2) == blocking.predict(
                ["x", "y"], model="m", top_k=2
            )
            assert await client.embed("x", model="m") == blocking.embed("x", model="m")
    assert transport.requests == other.requests
