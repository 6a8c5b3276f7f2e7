"""Models in bounded memory, over a real server: who is loaded, who has to go, versions, sources."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import kvserve
from kvserve import AsyncClient, ModelState
from server.predict.options import ModelSpec
from server.worker.predict import text_model_bytes
from tests.e2e.predict_server import PredictServer, check_tells_no_path, predict_server, until
from tests.model.predict_models import make_model, sample_texts
from tests.model.predict_support import load

TEXTS = sample_texts(6, seed=51, max_words=6)
MANY = sample_texts(4096, seed=52, max_words=8)
SAME_SIZE = ("ant", "bee", "cat", "dog")
"""Of which two fit into the memory."""


@dataclass(frozen=True)
class Yard:
    """The server, and what its models answer when they are alone."""

    server: PredictServer
    root: Path
    memory: int


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    base = tmp_path_factory.mktemp("yard")
    root = base / "root"
    for seed, name in enumerate((*SAME_SIZE, "fox/1", "fox/2", "depot/far/guest")):
        make_model("bert", root / name, seed=seed)
    make_model("bert", root / "whale", hidden_size=256, intermediate_size=1024)
    shutil.copytree(root / "ant", base / "outside")
    (root / "way-out").symlink_to(base / "outside", target_is_directory=True)
    taken = load(root / "ant").info.num_bytes
    reserved = _most_bytes(root / "ant")
    memory = taken + reserved + taken // 2
    assert 2 * taken + reserved > memory, "three would fit"
    assert _most_bytes(root / "whale") > memory
    with predict_server("--model-root", str(root), "--model-memory", str(memory)) as running:
        yield Yard(running, root, memory)


def _most_bytes(folder: Path) -> int:
    """Return what is reserved for a model before it is read."""
    return text_model_bytes(folder, root=folder, spec=ModelSpec(name="m", source="m"))


@pytest.fixture
async def client(yard: Yard) -> AsyncIterator[AsyncClient]:
    async with yard.server.client() as client:
        yield client


async def scores(client: AsyncClient, model: str, **options: Any) -> tuple[str, list[float]]:
    """Return the version that answered, and its numbers."""
    result = await client.predict(TEXTS, model=model, top_k=0, output=kvserve.Classification, **options)
    return result.version, [score.score for each in result for score in each.scores]


def near(wanted: tuple[str, list[float]]) -> Any:
    """Return what equals answers of the same version in another batch."""
    return wanted[0], pytest.approx(wanted[1], abs=1e-6)


async def status(client: AsyncClient, name: str, version: str = "1") -> kvserve.ModelStatus:
    [found] = [m for m in await client.models.list() if (m.name, m.version) == (name, version)]
    return found


async def states(client: AsyncClient, *names: str) -> list[ModelState]:
    return [(await status(client, name)).state for name in names]


# ---- memory ----


async def test_least_recently_used_model_makes_room_and_comes_back_as_it_was(
    yard: Yard, client: AsyncClient
) -> None:
    first = {name: await scores(client, name) for name in ("ant", "bee")}
    assert await states(client, "ant", "bee") == [ModelState.READY] * 2
    await scores(client, "ant")
    await scores(client, "cat")
    assert await states(client, "ant", "bee", "cat") == [
        ModelState.READY,
        ModelState.UNLOADED,
        ModelState.READY,
    ]
    listed = await client.models.list()
    assert listed.predict_memory == yard.memory
    assert listed.predict_bytes == sum(model.num_bytes for model in listed) <= yard.memory
    again = await scores(client, "bee")
    assert again[1] == pytest.approx(first["bee"][1], abs=1e-6)
    assert await states(client, "ant", "bee", "cat") == [
        ModelState.UNLOADED,
        ModelState.READY,
        ModelState.READY,
    ]
    assert len({tuple(values) for _, values in first.values()}) == 2


async def test_first_requests_that_come_together_load_once(yard: Yard, client: AsyncClient) -> None:
    metric = yard.server.metric
    await scores(client, "ant")
    # Snapshots are a second apart: wait for the one that knows the last call, and so all loads before it.
    num_calls = (await status(client, "ant")).num_requests
    await until(lambda: metric("calls_total", model="ant") == num_calls)
    num_loads = metric("model_loads_total")
    assert await states(client, "dog") == [ModelState.UNLOADED]
    results = await asyncio.gather(*(scores(client, "dog") for _ in range(24)))
    for result in results:
        assert result == near(results[0])
    await until(lambda: metric("calls_total", model="dog") == 24)
    assert metric("model_loads_total") == num_loads + 1
    assert metric("model_loaded", model="dog") == 1


async def test_model_larger_than_the_memory_is_refused_and_nobody_else_suffers(
    yard: Yard, client: AsyncClient
) -> None:
    wanted = [await scores(client, name) for name in ("ant", "bee")]
    asking: list[Any] = [scores(client, name) for name in 8 * ("ant", "bee", "whale")]
    results = await asyncio.gather(*asking, return_exceptions=True)
    for index, result in enumerate(results):
        if index % 3 == 2:
            assert isinstance(result, kvserve.ResourceExhausted), result
            assert result.reason == "MODEL_TOO_LARGE"
            assert "larger than the memory" in result.message
            check_tells_no_path(result, yard.root)
        else:
            assert result[1] == pytest.approx(wanted[index % 3][1], abs=1e-6)
    assert await states(client, "ant", "bee", "whale") == [
        ModelState.READY,
        ModelState.READY,
        ModelState.FAILED,
    ]
    assert (await status(client, "whale")).num_bytes == 0


async def test_model_in_use_is_unloaded_only_when_its_calls_have_ended(client: AsyncClient) -> None:
    wanted = await scores(client, "ant")

    async def ask_until_refused() -> tuple[int, kvserve.Error]:
        num_answered = 0
        while True:
            try:
                result = await client.predict(MANY, model="ant")
            except kvserve.Error as error:
                return num_answered, error
            assert len(result) == len(MANY)
            num_answered += 1

    asking = [asyncio.create_task(ask_until_refused()) for _ in range(6)]

    async def is_in_use() -> bool:
        return (await status(client, "ant")).running_requests >= 3

    await until(is_in_use)
    with pytest.raises(kvserve.FailedPrecondition) as busy:
        await client.models.unload("ant")
    assert busy.value.reason == "MODEL_BUSY"
    assert (await status(client, "ant")).state is ModelState.READY
    drained = await client.models.unload("ant", drain_s=60)
    assert drained.state is ModelState.UNLOADED
    assert drained.running_requests == 0
    # What ran was answered, what came was refused: nothing was lost, and nothing loaded it again.
    for _, error in await asyncio.gather(*asking):
        assert isinstance(error, kvserve.FailedPrecondition)
        assert error.reason == "MODEL_NOT_LOADED"
    assert (await status(client, "ant")).state is ModelState.UNLOADED
    with pytest.raises(kvserve.FailedPrecondition):
        await scores(client, "ant")
    assert (await client.models.load("ant")).status.state is ModelState.READY
    assert await scores(client, "ant") == near(wanted)


# ---- versions ----


async def test_versions_stand_side_by_side_under_aliases(yard: Yard, client: AsyncClient) -> None:
    alone = {}
    for version in ("1", "2"):
        alone[version] = await scores(client, "fox", version=version)
    assert alone["1"][1] != pytest.approx(alone["2"][1], abs=1e-3)
    assert (await scores(client, "fox"))[0] == "2"
    assert (await scores(client, "fox", version="latest"))[0] == "2"
    await client.models.set_alias("fox", "stable", "1")
    assert await scores(client, "fox", version="stable") == alone["1"]
    versions = await client.models.set_alias("fox", "latest", "1")
    assert [version.aliases for version in versions] == [("latest", "stable"), ()]
    assert (await scores(client, "fox"))[0] == "1"
    for alias in ("latest", "stable"):
        await client.models.set_alias("fox", alias, None)
    assert (await scores(client, "fox"))[0] == "2"
    with pytest.raises(kvserve.NotFound):
        await scores(client, "fox", version="stable")
    with pytest.raises(kvserve.NotFound):
        await client.models.set_alias("fox", "stable", "3")


async def test_canary_gets_its_share_of_the_calls_that_name_no_version(client: AsyncClient) -> None:
    alone = {version: await scores(client, "fox", version=version) for version in ("1", "2")}
    one, two = await client.models.set_alias("fox", "canary", "1", traffic_share=0.25)
    assert (one.traffic_share, two.traffic_share) == (0.25, 0.75)
    seen: Counter[str] = Counter()
    for _ in range(20):
        for version, values in await asyncio.gather(*(scores(client, "fox") for _ in range(20))):
            seen[version] += 1
            assert values == pytest.approx(alone[version][1], abs=1e-5)
    # 100 of 400 are expected; five standard deviations to either side.
    assert 56 <= seen["1"] <= 144
    assert seen.total() == 400
    assert {(await scores(client, "fox", version="canary"))[0] for _ in range(10)} == {"1"}
    assert {(await scores(client, "fox", version="latest"))[0] for _ in range(10)} == {"2"}
    with pytest.raises(kvserve.InvalidArgument) as caught:
        await client.models.set_alias("fox", "other", "2", traffic_share=0.8)
    assert caught.value.violations[0].field == "traffic_share"
    await client.models.set_alias("fox", "canary", None)
    assert {(await scores(client, "fox"))[0] for _ in range(10)} == {"2"}


# ---- sources over RPC ----


async def test_model_below_the_root_is_added_at_run_time(yard: Yard, client: AsyncClient) -> None:
    async with client.models.load("guest", source="depot/far/guest") as steps:
        seen = [step async for step in steps]
    assert seen[-1].done
    assert (seen[-1].status.state, seen[-1].status.version) == (ModelState.READY, "1")
    assert seen[-1].status.source_kind == "folder"
    assert {step.phase for step in seen[:-1]} <= {"", "checking", "reading", "building"}
    first = await scores(client, "guest")
    second = (await client.models.load("guest", source="ant")).status
    assert second.version == "2"
    assert (await scores(client, "guest"))[0] == "2"
    assert await scores(client, "guest", version="1") == near(first)
    vectors = (await client.models.load("vectors", source="ant", task="embed", pooling="cls")).status
    assert vectors.task is kvserve.PredictTask.EMBED
    assert (await client.embed(TEXTS, model="vectors")).num_dimensions == 32


@pytest.mark.parametrize(
    "source",
    [
        "../outside",
        "ant/../../outside",
        "/etc",
        "./ant",
        "~/models",
        "ant/",
        "ant//x",
        "%2e%2e/outside",
        "..\\outside",
        "file:///etc",
        "ant\0/x",
        "hf:owner/name",
        "hf:owner/name@main",
        "hf:../../outside@0123456789abcdef0123456789abcdef01234567",
        "models:/../1",
        "models:/churn/1",
        "way-out",
        "nowhere",
        "depot",
    ],
)
async def test_source_that_leads_elsewhere_is_refused(yard: Yard, client: AsyncClient, source: str) -> None:
    wanted = await scores(client, "ant")
    with pytest.raises((kvserve.InvalidArgument, kvserve.FailedPrecondition)) as caught:
        await client.models.load("trick", source=source)
    error = caught.value
    if isinstance(error, kvserve.InvalidArgument):
        assert [violation.field for violation in error.violations] == ["source"]
    else:
        assert error.reason == "MODEL_REFUSED"
    check_tells_no_path(error, yard.root, yard.root.parent)
    with pytest.raises(kvserve.NotFound):
        await client.predict(["a"], model="trick")
    assert "trick" not in {model.name for model in await client.models.list()}
    assert await scores(client, "ant") == near(wanted)


async def test_version_that_cannot_be_loaded_does_not_take_the_place_of_the_latest(
    client: AsyncClient,
) -> None:
    wanted = await scores(client, "bee")
    for source in ("nowhere", "way-out"):
        with pytest.raises(kvserve.FailedPrecondition):
            await client.models.load("bee", source=source)
        assert await scores(client, "bee") == near(wanted)
    # Its number is free again.
    added = (await client.models.load("bee", version="2", source="cat")).status
    assert (added.state, added.version) == (ModelState.READY, "2")
    assert (await scores(client, "bee"))[1] == pytest.approx((await scores(client, "cat"))[1], abs=1e-6)


async def test_added_version_is_there_again_after_the_process_was_lost(
    yard: Yard, client: AsyncClient
) -> None:
    await client.models.load("ghost", version="1", source="ant")
    await client.models.load("ghost", version="2", source="dog")
    await client.models.set_alias("ghost", "old", "1")
    wanted = {version: await scores(client, "ghost", version=version) for version in ("", "old")}
    assert [version for version, _ in wanted.values()] == ["2", "1"]
    lost = yard.server.process.predict()
    os.kill(lost.pid, signal.SIGKILL)

    async def is_back() -> bool:
        try:
            await client.models.list()
        except kvserve.Unavailable:
            return False
        return not lost.is_running() or lost.status() == psutil.STATUS_ZOMBIE

    await until(is_back, timeout_s=60)
    for version, before in wanted.items():
        assert await scores(client, "ghost", version=version) == near(before)


@pytest.mark.parametrize("name", ["../ant", "a/b", "latest\n", ".hidden", "", "x" * 200])
async def test_name_that_is_none_is_refused(client: AsyncClient, name: str) -> None:
    with pytest.raises((kvserve.InvalidArgument, ValueError)) as caught:
        await client.models.load(name, source="ant")
    if isinstance(caught.value, kvserve.InvalidArgument):
        assert caught.value.violations[0].field == "model"
