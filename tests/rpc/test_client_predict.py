"""The client's predict half against the real front end, over gRPC; models are small honest computations."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest
import pytest_asyncio

import kvserve
from kvserve import PredictRequest
from server.predict.errors import ComputeError, ModelTooLargeError, OverloadedError
from server.predict.messages import CallStats
from server.rpc.auth import parse_api_keys
from tests.rpc.harness import ScriptedEngine, serving
from tests.rpc.scripted_predict import ScriptedPredict

NOTICED_S = 60.0
RISK_ROWS = [[0.0, 1.0, 0.5, 0.25], [1.0, 0.0, -0.5, 0.5]]


@pytest.fixture
def backend():
    return ScriptedPredict()


def value_of(outcome):
    return int(outcome.result.expect(kvserve.Regression)[0].values[0])


@asynccontextmanager
async def served(backend, **options):
    async with (
        serving(ScriptedEngine(), predict=backend) as server,
        kvserve.AsyncClient(f"127.0.0.1:{server.port}", timeout_s=20, retry=None, **options) as client,
    ):
        yield client


@pytest_asyncio.fixture
async def client(backend):
    async with served(backend) as running:
        yield running


async def test_each_task_answers_with_its_kind(client, backend):
    sizes = await client.predict(["abc", "x" * 40, "y" * 90], model="sizes", output=kvserve.Classification)
    assert [each.label for each in sizes] == ["short", "middle", "long"]
    assert (sizes.model, sizes.version, sizes[0].num_tokens, sizes.num_calls) == ("sizes", "1", 5, 1)
    assert sizes[0].scores == (kvserve.LabelScore("short", pytest.approx(0.6)),)
    assert sizes.timings.batch_size == 7
    assert sizes.timings.total_s > 0
    every = await client.predict("abc", model="sizes", top_k=0, output=kvserve.Classification)
    assert [each.label for each in every[0].scores] == ["short", "middle", "long"]
    topics = await client.predict("aaab", model="topics", output=kvserve.Classification)
    assert topics[0].labels == ("a",)
    [tagged] = await client.predict("aB", model="tagger", output=kvserve.TokenClassification)
    assert [(token.label, token.start, token.end) for token in tagged.tokens] == [
        ("lower", 0, 1),
        ("upper", 1, 2),
    ]
    [length] = await client.predict([("a b", "cd")], model="length", output=kvserve.Regression)
    assert length.values == (5.0, 1.0)
    [vector] = await client.predict("zebra", model="letters", output=kvserve.Embedding)
    assert (await client.embed("zebra", model="letters"))[0] == vector.vector
    with pytest.raises(kvserve.InvalidArgument, match="model: answers with Classification"):
        await client.predict("x", model="sizes", output=kvserve.Regression)


async def test_vectors_and_rows_reach_numpy_and_come_from_it(client, backend):
    result = await client.embed(["abba", "zz"], model="letters")
    matrix = np.asarray(result.vectors)
    assert matrix.shape == (2, 26)
    assert matrix.dtype == np.float32
    assert np.allclose(np.linalg.norm(matrix, axis=1), 1.0, atol=1e-6)
    rows = np.array(RISK_ROWS, dtype=np.float64)
    predicted = await client.predict_features(rows, model="risk")
    expected = 1 / (1 + np.exp(-rows.sum(axis=1)))
    assert [each.prediction for each in predicted] == pytest.approx(expected.tolist(), rel=1e-6)
    assert [each.cache_hit for each in predicted] == [True, False]
    assert predicted.num_cache_hits == 1
    assert (await client.predict_features(RISK_ROWS, model="risk", reuse=False))[0] == predicted[0]
    assert [asked.reuse for asked in backend.asked[-2:]] == [True, False]


async def test_a_model_is_described_and_unknown_ones_are_not_found(client):
    info = await client.predict_model("letters")
    assert (info.task, info.num_dimensions, info.pooling, info.loaded) == (
        kvserve.PredictTask.EMBED,
        26,
        "mean",
        True,
    )
    for call in (
        client.predict_model("nobody"),
        client.predict("x", model="nobody"),
        client.embed("x", model="nobody"),
        client.predict("x", model="sizes", version="9"),
    ):
        with pytest.raises(kvserve.NotFound) as caught:
            await call
        assert caught.value.reason == "MODEL_NOT_FOUND"


async def test_bad_input_names_its_field(client):
    cases = (
        (client.predict(["a", "x" * 200], model="sizes"), "texts.items[1].text"),
        (client.predict([("a", "x" * 200)], model="sizes"), "texts.items[0].pair"),
        (client.embed(["a", "b", "x" * 200], model="letters"), "inputs[2].text"),
        (client.predict_features([[1.0] * 3], model="risk"), "features.rows[0].values"),
        (client.predict_features([[1.0] * 4, [1.0] * 5], model="risk"), "features.rows[1].values"),
        (
            client.predict_features([[1.0, 2.0, 3.0, float("nan")]], model="risk"),
            "features.rows[0].values[3]",
        ),
        (client.predict_features([[1.0, 2.0, 3.0, 1e300]], model="risk"), "features.rows[0].values[3]"),
        (client.predict([], model="sizes"), "texts.items"),
        (client.predict("x", model="sizes", top_k=-1), "options.top_k"),
        (client.predict("x", model="risk"), "model"),
        (client.embed("x", model="sizes"), "model"),
        (client.predict("x"), "model"),
    )
    for call, field in cases:
        with pytest.raises(kvserve.InvalidArgument) as caught:
            await call
        assert [violation.field for violation in caught.value.violations] == [field]
        assert field in str(caught.value)
    assert (await client.predict("x" * 200, model="sizes", truncate=True))[0].truncated


async def test_a_long_list_takes_several_calls_of_the_version_that_answered_first(client, backend):
    texts = ["x" * (position % 100) for position in range(6000)]
    result = await client.predict(texts, model="length", output=kvserve.Regression)
    assert [int(each.values[0]) for each in result] == [len(text) for text in texts]
    assert result.num_calls == 3
    assert [asked.version for asked in backend.asked] == ["", "1", "1"]
    assert [len(asked.inputs.texts) for asked in backend.asked] == [256, 4096, 1648]
    with pytest.raises(kvserve.InvalidArgument) as caught:
        await client.predict(["x"] * 5000 + ["x" * 200], model="length")
    assert caught.value.violations[0].field == "texts.items[5000].text"


async def test_rows_by_the_ten_thousand(client):
    rows = np.random.default_rng(7).standard_normal((10_000, 4)).astype(np.float32)
    result = await client.predict_features(rows, model="risk")
    expected = 1 / (1 + np.exp(-rows.astype(np.float64).sum(axis=1)))
    assert np.allclose([each.prediction for each in result], expected, atol=1e-6)
    assert result.num_calls == 3
    policies = {f"p{int(row[1])}" for row in rows}
    assert sorted(result.policy.split(",")) == sorted(policies)


async def test_answers_larger_than_a_message_are_asked_for_in_parts(backend):
    # 26 numbers are more than 104 bytes: of 200 at once, an answer of 20 kB and more.
    async with served(backend, max_message_bytes=15_000) as client:
        result = await client.embed(["abc"] * 200, model="letters")
    assert len(result) == 200
    assert result.num_calls > 1
    assert len(backend.asked[0].inputs.texts) == 200


@pytest.mark.parametrize(
    ("error", "error_type", "reason"),
    [
        (OverloadedError("too much waits", retry_after_s=2.5), kvserve.ResourceExhausted, "QUEUE_FULL"),
        (ModelTooLargeError("does not fit"), kvserve.ResourceExhausted, "MODEL_TOO_LARGE"),
        (ComputeError("gave no numbers"), kvserve.Internal, "NUMERICAL"),
    ],
)
async def test_errors_of_models_are_typed_in_calls_and_in_streams(client, backend, error, error_type, reason):
    async def fail(asked):
        raise error

    backend.before = fail
    with pytest.raises(error_type) as caught:
        await client.predict("x", model="sizes")
    async with client.stream_predict(["x"], model="sizes") as outcomes:
        [outcome] = [outcome async for outcome in outcomes]
    for failed in (caught.value, outcome.error):
        assert type(failed) is error_type
        assert (failed.reason, error.reason in failed.message) == (reason, True)
    assert outcome.error.retry_after_s == caught.value.retry_after_s


async def test_a_lost_process_is_unavailable(client, backend):
    await backend.stop(grace_s=0)
    with pytest.raises(kvserve.Unavailable):
        await client.predict("x", model="sizes")


async def test_a_stream_answers_out_of_order_and_goes_on_after_errors(client, backend):
    gate = asyncio.Event()

    async def before(asked):
        if asked.inputs.texts and asked.inputs.texts[0].text == "slow":
            await gate.wait()

    backend.before = before
    requests = [
        PredictRequest("slow", request_id="slow"),
        PredictRequest("quick", request_id="quick"),
        PredictRequest("x" * 200, request_id="long"),
        PredictRequest("x", request_id="nobody", model="nobody"),
        PredictRequest(features=RISK_ROWS, request_id="rows", model="risk"),
    ]
    got = {}
    async with client.stream_predict(requests, model="sizes") as outcomes:
        async for outcome in outcomes:
            got[outcome.request_id] = outcome
            if len(got) == 4:
                assert "slow" not in got
                gate.set()
    assert got["quick"].result.expect(kvserve.Classification)[0].label == "short"
    assert got["slow"].result.model == "sizes"
    assert len(got["rows"].result) == 2
    assert isinstance(got["nobody"].error, kvserve.NotFound)
    assert got["long"].error.violations[0].field == "texts.items[0].text"
    assert list(got)[-1] == "slow"


async def test_a_stream_of_many_requests_is_answered_completely(client, backend):
    async def source():
        for number in range(2000):
            yield PredictRequest("x" * (number % 100), request_id=f"n{number}")

    got = {}
    async with client.stream_predict(source(), model="length") as outcomes:
        async for outcome in outcomes:
            got[outcome.request_id] = value_of(outcome)
    assert got == {f"n{number}": number % 100 for number in range(2000)}
    assert outcomes.num_open == 0


async def test_requests_and_answers_can_take_turns(client):
    async with client.stream_predict(model="length") as outcomes:
        read = aiter(outcomes)
        for number in range(1, 20):
            assert await outcomes.send("x" * number) == str(number)
            outcome = await anext(read)
            assert (outcome.request_id, value_of(outcome)) == (str(number), number)
        await outcomes.end_sending()
        with pytest.raises(StopAsyncIteration):
            await anext(read)


@pytest.mark.parametrize("how", ["block", "break", "task"])
async def test_however_a_stream_is_left_the_server_stops_computing(client, backend, how):
    arrived = asyncio.Event()

    async def hang(asked):
        if asked.inputs.texts[0].text == "hang":
            arrived.set()
            await asyncio.Event().wait()

    backend.before = hang
    requests = ["quick", "hang"]

    async def run():
        async with client.stream_predict(requests, model="sizes") as outcomes:
            async for _ in outcomes:
                await arrived.wait()
                if how == "break":
                    break
                if how == "block":
                    raise KeyError("left")
                await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await asyncio.wait_for(arrived.wait(), NOTICED_S)
    if how == "task":
        task.cancel()
    [ended] = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), NOTICED_S)
    assert type(ended) is {"block": KeyError, "break": type(None), "task": asyncio.CancelledError}[how]
    async with asyncio.timeout(NOTICED_S):
        while backend.num_open_calls:
            await asyncio.sleep(0)
    assert backend.num_cancelled == 1


async def test_cancelling_a_list_ends_its_calls_at_the_server(client, backend):
    running = asyncio.Event()

    async def hang(asked):
        if asked.version:
            if backend.num_open_calls == 2:
                running.set()
            await asyncio.Event().wait()

    backend.before = hang
    task = asyncio.create_task(client.predict(["x"] * 6000, model="sizes"))
    await asyncio.wait_for(running.wait(), NOTICED_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(NOTICED_S):
        while backend.num_open_calls:
            await asyncio.sleep(0)
    assert backend.num_cancelled == 2


async def test_a_deadline_ends_a_call_and_a_stream(client, backend):
    async def hang(asked):
        await asyncio.Event().wait()

    backend.before = hang
    with pytest.raises(kvserve.DeadlineExceeded):
        await client.predict("x", model="sizes", timeout_s=0.2)
    async with client.stream_predict(["x"], model="sizes", timeout_s=0.2) as outcomes:
        with pytest.raises(kvserve.DeadlineExceeded):
            [outcome async for outcome in outcomes]


async def test_nobody_listens():
    async with kvserve.AsyncClient("127.0.0.1:1", retry=None, timeout_s=5) as client:
        with pytest.raises(kvserve.Unavailable):
            await client.predict("x", model="m")
        async with client.stream_predict(["x"], model="m") as outcomes:
            with pytest.raises(kvserve.Unavailable):
                [outcome async for outcome in outcomes]
        async with client.stream_predict(model="m") as outcomes:
            await outcomes.send("x")  # That the call has ended is the iteration's to say.
            with pytest.raises(kvserve.Unavailable):
                [outcome async for outcome in outcomes]


async def test_the_blocking_client_does_all_of_it(backend):
    backend.stats_of_calls = CallStats(batch_size=3)

    def story(target):
        with kvserve.Client(target, timeout_s=20) as client:
            long = client.predict(["x" * (n % 100) for n in range(6000)], model="length")
            rows = client.predict_features(np.array(RISK_ROWS), model="risk")
            vectors = client.embed(["a", "b"], model="letters")
            info = client.predict_model("sizes")
            with client.stream_predict(("x" * (n % 100) for n in range(500)), model="length") as outcomes:
                streamed = {int(outcome.request_id): value_of(outcome) for outcome in outcomes}
            turns = []
            with client.stream_predict(model="length") as outcomes:
                read = iter(outcomes)
                for number in range(5):
                    outcomes.send("x" * number)
                    turns.append(value_of(next(read)))
                outcomes.end_sending()
                assert list(read) == []
            with pytest.raises(kvserve.InvalidArgument) as caught:
                client.predict(["x"] * 300 + ["x" * 200], model="length")
            return long, rows, vectors, info, streamed, turns, caught.value

    async with serving(ScriptedEngine(), predict=backend) as server:
        answers = await asyncio.to_thread(story, f"127.0.0.1:{server.port}")
    long, rows, vectors, info, streamed, turns, error = answers
    assert [each.values[0] for each in long] == [n % 100 for n in range(6000)]
    assert (len(rows), len(vectors), info.task) == (2, 2, kvserve.PredictTask.CLASSIFY)
    assert streamed == {n + 1: n % 100 for n in range(500)}
    assert turns == [0, 1, 2, 3, 4]
    assert error.violations[0].field == "texts.items[300].text"


async def test_leaving_a_blocking_stream_ends_it_at_the_server(backend):
    arrived = asyncio.Event()

    async def hang(asked):
        arrived.set()
        await asyncio.Event().wait()

    backend.before = hang

    def story(target, loop_waits):
        with kvserve.Client(target, timeout_s=20) as client:
            with client.stream_predict(model="sizes") as outcomes:
                outcomes.send("x")
                loop_waits()
            # Whoever writes into what has ended is not blocked, however much it is.
            for _ in range(100):
                outcomes.send("y")
            with pytest.raises(kvserve.Cancelled):
                list(outcomes)

    async with serving(ScriptedEngine(), predict=backend) as server:
        loop = asyncio.get_running_loop()

        def loop_waits():
            asyncio.run_coroutine_threadsafe(arrived.wait(), loop).result(NOTICED_S)

        await asyncio.to_thread(story, f"127.0.0.1:{server.port}", loop_waits)
        async with asyncio.timeout(NOTICED_S):
            while backend.num_open_calls:
                await asyncio.sleep(0)
    assert backend.num_cancelled == 1


async def test_an_api_key_is_asked_for(backend):
    keys = parse_api_keys([{"tenant": "acme", "key": "acme-key-1234567890", "scopes": ["predict"]}])
    async with serving(ScriptedEngine(), predict=backend, keys=keys) as server:
        target = f"127.0.0.1:{server.port}"
        async with kvserve.AsyncClient(target, api_key="wrong", retry=None) as client:
            with pytest.raises(kvserve.Unauthenticated):
                await client.predict("x", model="sizes")
            async with client.stream_predict(["x"], model="sizes") as outcomes:
                with pytest.raises(kvserve.Unauthenticated):
                    [outcome async for outcome in outcomes]


async def test_a_request_id_that_the_server_refuses_is_the_error_of_its_request(client):
    requests = [PredictRequest("x", request_id="y" * 200), PredictRequest("x", request_id="fine")]
    async with client.stream_predict(requests, model="sizes") as outcomes:
        by_id = {outcome.request_id: outcome.error async for outcome in outcomes}
    assert by_id["fine"] is None
    assert by_id["y" * 200].violations[0].field == "request_id"
