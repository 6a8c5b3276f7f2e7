"""A stream of predict requests against a scripted server: numbering, outcomes, errors, ends."""

import asyncio
import threading
from typing import Any

import pytest

import kvserve
from kvserve import PredictRequest
from kvserve._grpc_sync import _MAX_OUTGOING, _Outbox
from kvserve.testing import AsyncMockTransport, MockTransport, classified
from kvserve.v1 import predict_pb2 as pb

NO_TEXT: Any = 7
MISTYPED: Any = {"topk": 3}


def answer(request, *, labels=None):
    response = classified(*(labels or (item.text for item in request.texts.items)), model=request.model)
    response.request_id = request.request_id
    return pb.StreamPredictResponse(request_id=request.request_id, response=response)


def refuse(request, **fields):
    return pb.StreamPredictResponse(request_id=request.request_id, error=pb.PredictError(**fields))


def labels_of(outcome):
    return [each.label for each in outcome.result.expect(kvserve.Classification)]


class Reordering:
    """Answers every second request with the one before it, in the other order."""

    def __init__(self):
        self.held = None

    def __call__(self, method, request):
        assert method == "StreamPredict"
        if self.held is None:
            self.held = request
            return []
        first, self.held = self.held, None
        return [answer(request), answer(first)]


def test_outcomes_come_as_they_are_ready_and_say_whose_they_are():
    transport = MockTransport(Reordering())
    with (
        kvserve.Client(transport=transport, api_key="k") as client,
        client.stream_predict(["a", "b", ["c", "d"], "e"], model="m", top_k=2, version="1") as outcomes,
    ):
        got = [(outcome.request_id, labels_of(outcome)) for outcome in outcomes]
    assert got == [("2", ["b"]), ("1", ["a"]), ("4", ["e"]), ("3", ["c", "d"])]
    assert [request.request_id for request in transport.requests] == ["1", "2", "3", "4"]
    assert {(request.model, request.version, request.options.top_k) for request in transport.requests} == {
        ("m", "1", 2)
    }
    assert transport.metadata == [{"authorization": "Bearer k"}]
    assert outcomes.num_open == 0


def test_a_request_may_say_everything_itself():
    transport = MockTransport(lambda method, request: answer(request, labels=["x"]))
    requests = [
        PredictRequest("a", request_id="mine"),
        PredictRequest([("a", "b")], model="other", version="2", truncate=True, top_k=0, reuse=False),
        PredictRequest(features=[[0.5, 1.0]], model="risk"),
    ]
    with (
        kvserve.Client(transport=transport) as client,
        client.stream_predict(requests, model="m", truncate=False) as outcomes,
    ):
        assert [outcome.request_id for outcome in outcomes] == ["mine", "2", "3"]
    first, second, third = transport.requests
    assert first == pb.PredictRequest(
        model="m", texts={"items": [{"text": "a"}]}, options={"truncate": False}, request_id="mine"
    )
    assert second == pb.PredictRequest(
        model="other",
        version="2",
        texts={"items": [{"text": "a", "pair": "b"}]},
        options={"truncate": True, "top_k": 0, "reuse": False},
        request_id="2",
    )
    assert (third.model, list(third.features.rows[0].values)) == ("risk", [0.5, 1.0])


def test_an_error_of_one_request_is_its_outcome():
    def handler(method, request):
        match request.texts.items[0].text:
            case "unknown":
                return refuse(request, code=5, message="no such model", reason="MODEL_NOT_FOUND")
            case "long":
                return refuse(
                    request,
                    code=3,
                    message="texts.items[0].text: has more than 512 tokens",
                    reason="INVALID_ARGUMENT",
                    field="texts.items[0].text",
                )
            case "busy":
                return refuse(request, code=8, message="too much waits", retry_after_s=1.5)
            case "odd":
                return refuse(request, code=77, message="")
            case "short":
                return answer(request, labels=["a", "b"])
        return answer(request)

    names = ["unknown", "fine", "long", "busy", "odd", "short"]
    with (
        kvserve.Client(transport=MockTransport(handler)) as client,
        client.stream_predict([PredictRequest(name, request_id=name) for name in names]) as outcomes,
    ):
        by_id = {outcome.request_id: outcome for outcome in outcomes}
    assert list(by_id) == names
    assert by_id["fine"].error is None
    assert labels_of(by_id["fine"]) == ["fine"]
    unknown = by_id["unknown"].error
    assert (type(unknown), unknown.reason, str(unknown)) == (
        kvserve.NotFound,
        "MODEL_NOT_FOUND",
        "no such model",
    )
    with pytest.raises(kvserve.NotFound):
        by_id["unknown"].result  # noqa: B018
    assert by_id["long"].error.violations == (
        kvserve.FieldViolation("texts.items[0].text", "has more than 512 tokens"),
    )
    assert by_id["busy"].error.retry_after_s == 1.5
    assert type(by_id["odd"].error) is kvserve.Unknown
    assert isinstance(by_id["short"].error, kvserve.Internal)


def test_a_request_that_no_message_can_hold_is_an_outcome_and_the_others_go_on():
    requests = ["a", "\ud800", PredictRequest("x" * 9000, request_id="big"), "b"]
    with (
        kvserve.Client(
            transport=MockTransport(lambda method, request: answer(request)), max_message_bytes=5000
        ) as client,
        client.stream_predict(requests, model="m") as outcomes,
    ):
        by_id = {outcome.request_id: outcome for outcome in outcomes}
    assert set(by_id) == {"1", "2", "big", "4"}
    assert [violation.field for violation in by_id["2"].error.violations] == ["texts.items[0].text"]
    assert "max_message_bytes" in str(by_id["big"].error)
    assert labels_of(by_id["4"]) == ["b"]


def test_what_the_callers_requests_raise_ends_the_iteration():
    def requests():
        yield "a"
        raise LookupError("no more lines")

    transport = MockTransport(lambda method, request: [])
    with (
        kvserve.Client(transport=transport) as client,
        client.stream_predict(requests(), model="m") as outcomes,
        pytest.raises(LookupError, match="no more lines"),
    ):
        list(outcomes)
    with (
        kvserve.Client(transport=transport) as client,
        client.stream_predict([NO_TEXT], model="m") as outcomes,
        pytest.raises(TypeError, match="expected texts"),
    ):
        list(outcomes)
    with (
        kvserve.Client(transport=transport) as client,
        client.stream_predict([PredictRequest("a", request_id="x")] * 2, model="m") as outcomes,
        pytest.raises(ValueError, match="'x' names an open request already"),
    ):
        list(outcomes)
    with (
        kvserve.Client(transport=transport) as client,
        client.stream_predict([PredictRequest()], model="m") as outcomes,
        pytest.raises(TypeError, match="exactly one of texts, features; got none"),
    ):
        list(outcomes)


def test_an_error_of_the_call_ends_the_iteration():
    def handler(method, request):
        if request.texts.items[0].text == "b":
            raise kvserve.Unavailable("the server is shutting down")
        return answer(request)

    with (
        kvserve.Client(transport=MockTransport(handler)) as client,
        client.stream_predict(["a", "b", "c"], model="m") as outcomes,
    ):
        read = iter(outcomes)
        assert next(read).request_id == "1"
        with pytest.raises(kvserve.Unavailable, match="shutting down"):
            next(read)


def test_answers_to_nothing_and_missing_answers_are_errors():
    def stranger(method, request):
        return pb.StreamPredictResponse(request_id="stranger")

    with (
        kvserve.Client(transport=MockTransport(stranger)) as client,
        client.stream_predict(["a"], model="m") as outcomes,
        pytest.raises(kvserve.Internal, match="'stranger', which names no open request"),
    ):
        list(outcomes)
    with (
        kvserve.Client(transport=MockTransport(lambda method, request: [])) as client,
        client.stream_predict(["a"], model="m") as outcomes,
        pytest.raises(kvserve.Internal, match="with 1 requests open"),
    ):
        list(outcomes)


def test_requests_can_be_sent_one_by_one():
    with (
        kvserve.Client(transport=MockTransport(lambda method, request: answer(request))) as client,
        client.stream_predict(model="m") as outcomes,
    ):
        read = iter(outcomes)
        assert outcomes.send("a") == "1"
        assert labels_of(next(read)) == ["a"]
        assert outcomes.send(PredictRequest("b", request_id="mine")) == "mine"
        with pytest.raises(ValueError, match="'mine' names an open request"):
            outcomes.send(PredictRequest("c", request_id="mine"))
        with pytest.raises(kvserve.InvalidArgument, match="Unicode"):
            outcomes.send("\ud800")
        outcomes.end_sending()
        outcomes.end_sending()
        assert [outcome.request_id for outcome in read] == ["mine"]
        with pytest.raises(kvserve.MisuseError, match="no more requests"):
            outcomes.send("late")


def test_misuse_is_told():
    with kvserve.Client(transport=MockTransport(lambda method, request: answer(request))) as client:
        stream = client.stream_predict(["a"], model="m")
        with pytest.raises(kvserve.MisuseError, match="open the stream first"):
            iter(stream)
        with stream:
            with pytest.raises(kvserve.MisuseError, match="sends the requests that"):
                stream.send("b")
            with pytest.raises(kvserve.MisuseError, match="only once"), stream:
                pass
        with pytest.raises(TypeError, match="a request_id belongs into a PredictRequest"):
            client.stream_predict(["a"], model="m", request_id="x")
        with pytest.raises(TypeError, match=r"stream_predict\(\) got .*'topk'; did you mean 'top_k'"):
            client.stream_predict(["a"], model="m", **MISTYPED)


async def test_async_requests_may_come_from_an_async_source():
    async def requests():
        for text in ("a", "b"):
            await asyncio.sleep(0)
            yield text

    transport = AsyncMockTransport(Reordering())
    async with (
        kvserve.AsyncClient(transport=transport) as client,
        client.stream_predict(requests(), model="m") as outcomes,
    ):
        got = [(outcome.request_id, labels_of(outcome)) async for outcome in outcomes]
    assert got == [("2", ["b"]), ("1", ["a"])]


async def test_leaving_the_block_ends_the_call_and_the_source():
    closed = asyncio.Event()

    async def requests():
        try:
            yield "a"
            await asyncio.Event().wait()
        finally:
            closed.set()

    transport = AsyncMockTransport(lambda method, request: answer(request))
    async with kvserve.AsyncClient(transport=transport) as client:
        async with client.stream_predict(requests(), model="m") as outcomes:
            async for outcome in outcomes:
                assert outcome.request_id == "1"
                break
        assert closed.is_set()
        assert transport.streams[0].is_cancelled


async def test_async_sending_one_by_one_and_what_a_source_raises():
    transport = AsyncMockTransport(lambda method, request: answer(request))
    async with kvserve.AsyncClient(transport=transport) as client:
        async with client.stream_predict(model="m") as outcomes:
            assert await outcomes.send("a") == "1"
            await outcomes.end_sending()
            assert [labels_of(outcome) async for outcome in outcomes] == [["a"]]
        async with client.stream_predict(iter([NO_TEXT]), model="m") as outcomes:
            with pytest.raises(TypeError, match="expected texts"):
                [outcome async for outcome in outcomes]
        async with client.stream_predict(["a", "\ud800"], model="m") as outcomes:
            errors = {outcome.request_id: outcome.error async for outcome in outcomes}
        assert errors["1"] is None
        assert isinstance(errors["2"], kvserve.InvalidArgument)


def test_a_writer_waits_for_the_wire_and_is_let_go_when_the_call_is_over():
    outbox = _Outbox()
    for number in range(_MAX_OUTGOING):
        assert outbox.put(number)
    results = []
    writer = threading.Thread(
        target=lambda: results.extend([outbox.put("next"), outbox.put("last")]), daemon=True
    )
    writer.start()
    sender = iter(outbox)
    assert results == []
    assert next(sender) == 0
    assert [next(sender) for _ in range(_MAX_OUTGOING - 1)] == list(range(1, _MAX_OUTGOING))
    assert next(sender) == "next"
    writer.join(60)
    assert results == [True, True]
    outbox.close()
    assert list(sender) == []
    assert not outbox.put("late")
