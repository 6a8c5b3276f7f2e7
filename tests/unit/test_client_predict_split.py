"""Lists that are too long for one call: how they are cut, driven and put together again."""

import asyncio

import pytest

import kvserve
from kvserve.testing import AsyncMockTransport, MockTransport, classified, embedded
from kvserve.v1 import predict_pb2 as pb


def echo(method, request):
    """Answer each text with itself as the label."""
    return classified(*(item.text for item in request.texts.items), version="7")


def texts(count):
    return [f"text {position}" for position in range(count)]


def labels(result):
    return [prediction.label for prediction in result]


def sizes(transport):
    return [len(request.texts.items) for request in transport.requests]


def test_a_list_that_fits_takes_one_call():
    transport = MockTransport(echo)
    with kvserve.Client(transport=transport) as client:
        result = client.predict(texts(256), model="m")
    assert (labels(result), result.num_calls, sizes(transport)) == (texts(256), 1, [256])
    assert transport.requests[0].version == ""


def test_a_longer_list_begins_with_a_short_call_that_says_the_version_for_the_rest():
    transport = MockTransport(echo)
    with kvserve.Client(transport=transport) as client:
        result = client.predict(texts(9000), model="m", version="canary", request_id="r", top_k=3)
    assert labels(result) == texts(9000)
    assert sizes(transport) == [256, 4096, 4096, 552]
    assert [request.version for request in transport.requests] == ["canary", "7", "7", "7"]
    assert [request.request_id for request in transport.requests] == ["r", "r-2", "r-3", "r-4"]
    assert {request.options.top_k for request in transport.requests} == {3}
    assert (result.num_calls, result.version) == (4, "7")


def test_rows_of_features_have_small_answers_and_need_no_short_call():
    def handler(method, request):
        answers = [pb.FeaturePrediction(prediction=row.values[0] / 8192) for row in request.features.rows]
        return pb.PredictResponse(predictions=[pb.Prediction(features=answer) for answer in answers])

    transport = MockTransport(handler)
    with kvserve.Client(transport=transport) as client:
        result = client.predict_features([[float(row)] for row in range(5000)], model="m")
    assert [len(request.features.rows) for request in transport.requests] == [4096, 904]
    assert [prediction.prediction for prediction in result] == [row / 8192 for row in range(5000)]


def test_requests_stay_below_the_size_of_a_message():
    transport = MockTransport(echo)
    long = ["x" * 900 + f" {position}" for position in range(50)]
    with kvserve.Client(transport=transport, max_message_bytes=10_000) as client:
        result = client.predict(long, model="m")
    assert labels(result) == long
    assert max(request.ByteSize() for request in transport.requests) <= 10_000
    assert sizes(transport)[0] == 10


def test_answers_stay_below_the_size_of_a_message():
    answers = []

    def handler(method, request):
        answers.append(embedded(*([float(len(item.text))] * 500 for item in request.inputs)))
        return answers[-1]

    transport = MockTransport(handler)
    with kvserve.Client(transport=transport, max_message_bytes=600_000) as client:
        result = client.embed(["x" * (position % 7) for position in range(1000)], model="m")
    assert [vector[0] for vector in result] == [position % 7 for position in range(1000)]
    assert max(answer.ByteSize() for answer in answers[1:]) <= 300_000
    assert result.num_tokens == 8000


def test_an_answer_that_is_too_large_is_asked_for_in_halves():
    def handler(method, request):
        if len(request.texts.items) > 3:
            raise kvserve.ResourceExhausted("too large", reason="RESPONSE_TOO_LARGE")
        return echo(method, request)

    transport = MockTransport(handler)
    with kvserve.Client(transport=transport) as client:
        result = client.predict(texts(10), model="m")
    assert labels(result) == texts(10)
    assert sizes(transport) == [10, 5, 2, 2, 1, 2, 2, 1]


def test_one_answer_that_is_too_large_is_an_error():
    def handler(method, request):
        raise kvserve.ResourceExhausted("Received message larger than max (9 vs. 5)")

    with (
        kvserve.Client(transport=MockTransport(handler)) as client,
        pytest.raises(kvserve.ResourceExhausted, match="larger than max"),
    ):
        client.predict(texts(4), model="m")


def test_other_exhaustion_is_no_reason_to_ask_again():
    def handler(method, request):
        raise kvserve.ResourceExhausted("the queue is full", reason="QUEUE_FULL", retry_after_s=1.0)

    transport = MockTransport(handler)
    with kvserve.Client(transport=transport) as client, pytest.raises(kvserve.ResourceExhausted):
        client.predict(texts(4), model="m")
    assert len(transport.requests) == 1


def test_an_input_that_no_call_can_hold_is_refused_before_anything_is_sent():
    transport = MockTransport(echo)
    with kvserve.Client(transport=transport, max_message_bytes=1000) as client:
        with pytest.raises(
            kvserve.InvalidArgument, match=r"texts.items\[2\]: has \d+ bytes; max_mess"
        ) as caught:
            client.predict(["a", "b", "x" * 2000], model="m")
        assert [violation.field for violation in caught.value.violations] == ["texts.items[2]"]
    assert transport.requests == []


def test_errors_name_the_place_in_the_callers_list():
    def handler(method, request):
        for position, item in enumerate(request.texts.items):
            if item.text == "text 300":
                field = f"texts.items[{position}].text"
                fields = [field, f"texts.items[{position + 1}].text"]
                raise kvserve.InvalidArgument(
                    f"{field}: is too long (and 1 more)",
                    violations=[kvserve.FieldViolation(each, "is too long") for each in fields],
                    reason="INVALID_ARGUMENT",
                )
        return echo(method, request)

    with (
        kvserve.Client(transport=MockTransport(handler)) as client,
        pytest.raises(kvserve.InvalidArgument) as caught,
    ):
        client.predict(texts(400), model="m")
    assert caught.value.message == "texts.items[300].text: is too long (and 1 more)"
    assert [each.field for each in caught.value.violations] == [
        "texts.items[300].text",
        "texts.items[301].text",
    ]
    assert caught.value.reason == "INVALID_ARGUMENT"


def test_parts_of_different_versions_are_an_error():
    versions = iter("123")

    def handler(method, request):
        return classified(*(item.text for item in request.texts.items), version=next(versions))

    with (
        kvserve.Client(transport=MockTransport(handler)) as client,
        pytest.raises(kvserve.Internal, match="different versions"),
    ):
        client.predict(texts(400), model="m")


def test_timings_of_the_whole():
    def handler(method, request):
        answer = echo(method, request)
        scale = len(request.texts.items)
        answer.timings.CopyFrom(
            pb.PredictTimings(
                load_s=scale,
                tokenize_s=1,
                queue_s=scale,
                compute_s=2,
                total_s=900,
                batch_size=scale,
                batch_tokens=3,
            )
        )
        return answer

    with kvserve.Client(transport=MockTransport(handler)) as client:
        one, several = client.predict("x", model="m").timings, client.predict(texts(300), model="m").timings
    assert one.total_s == 900
    assert (several.load_s, several.queue_s, several.batch_size, several.batch_tokens) == (256, 256, 256, 3)
    assert (several.tokenize_s, several.compute_s) == (2, 4)
    assert several.total_s < 900


class Gated(AsyncMockTransport):
    """Answers when told; counts how many calls run."""

    def __init__(self, handler, gate):
        super().__init__(handler)
        self.gate = gate
        self.num_running = self.max_running = self.num_cancelled = 0

    async def unary(self, call):
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await self.gate(call)
            return await super().unary(call)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1


async def test_the_first_call_goes_alone_and_then_four_at_a_time():
    running = []

    async def gate(call):
        await asyncio.sleep(0)
        running.append(transport.num_running)

    transport = Gated(echo, gate)
    async with kvserve.AsyncClient(transport=transport) as client:
        result = await client.predict(texts(256 + 4096 * 6), model="m")
    assert labels(result) == texts(256 + 4096 * 6)
    assert running[0] == 1
    assert transport.max_running == 4


async def test_answers_may_come_in_any_order():
    done = {start: asyncio.Event() for start in (256, 4352, 8448)}

    async def gate(call):
        start = int(call.request.texts.items[0].text.split()[1])
        if start == 256:
            await done[4352].wait()
        if start == 4352:
            await done[8448].wait()
        if start in done:
            done[start].set()

    async with kvserve.AsyncClient(transport=Gated(echo, gate)) as client:
        result = await client.predict(texts(9000), model="m")
    assert labels(result) == texts(9000)


async def test_an_error_ends_the_calls_that_still_run():
    async def gate(call):
        start = int(call.request.texts.items[0].text.split()[1])
        if start == 256:
            raise kvserve.Unavailable("gone")
        if start:
            await asyncio.Event().wait()

    transport = Gated(echo, gate)
    async with kvserve.AsyncClient(transport=transport) as client:
        with pytest.raises(kvserve.Unavailable, match="gone"):
            await client.predict(texts(9000), model="m")
    assert (transport.num_cancelled, transport.num_running) == (2, 0)


async def test_cancelling_the_task_ends_all_of_its_calls():
    waiting = asyncio.Event()

    async def gate(call):
        start = int(call.request.texts.items[0].text.split()[1])
        if start == 8448:
            waiting.set()
        if start:
            await asyncio.Event().wait()

    transport = Gated(echo, gate)
    async with kvserve.AsyncClient(transport=transport) as client:
        task = asyncio.create_task(client.predict(texts(9000), model="m"))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (transport.num_cancelled, transport.num_running) == (3, 0)


def test_the_deadline_is_of_the_whole_list(monkeypatch):
    now_s = 100.0
    timeouts = []

    def handler(method, request):
        nonlocal now_s
        now_s += 2.0
        return echo(method, request)

    class Timed(MockTransport):
        def start(self, call):
            timeouts.append(call.timeout_s)
            return super().start(call)

    client = kvserve.Client(transport=Timed(handler))
    monkeypatch.setattr(client._predict_calls, "_clock", lambda: now_s)
    client.predict(texts(300), model="m", timeout_s=5.0)
    assert timeouts == [5.0, 3.0]
    with pytest.raises(kvserve.DeadlineExceeded, match=r"not all inputs were answered within 2 s"):
        client.predict(texts(300), model="m", timeout_s=2.0)
