"""The predict process put together: loaders of every kind, and the real process over real models."""

from __future__ import annotations

import asyncio
import os
import signal
from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvcore.clock import MonotonicClock
from server.predict.errors import ModelRefusedError, UnknownModelError, WrongTaskError
from server.predict.interface import PredictState
from server.predict.messages import (
    GetReuse,
    Inputs,
    LoadModel,
    ModelPhase,
    OpProgress,
    ReuseEvent,
    SetAlias,
    Task,
    TextItem,
    UnloadModel,
)
from server.predict.options import FeatureSpec, ModelSpec, PredictOptions, SemanticSpec
from server.predict.process import PredictProcess
from server.predict_main import Loader
from tests.model.predict_models import make_model

TEXTS = Inputs(texts=(TextItem("the quiet river reads a letter"), TextItem("a doctor", "the market")))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model root: "mood" in the catalogue, "better" for whoever names it as a source."""
    root = tmp_path_factory.mktemp("models")
    make_model("bert", root / "mood" / "1")
    make_model("bert", root / "better", seed=1)
    make_model("minilm-like", root / "similar")
    return root


def no_progress(phase: str, num_done: int, num_total: int) -> None:
    """Tell nobody."""


def no_event(event: ReuseEvent) -> None:
    """Tell nobody."""


def loader_of(root: Path) -> Loader:
    return Loader(PredictOptions(model_root=str(root), device="cpu"), clock=MonotonicClock())


def test_a_folder_is_checked_once_for_its_size_and_its_load(root: Path, monkeypatch: pytest.MonkeyPatch):
    loader = loader_of(root)
    resolved: list[str] = []
    resolve = loader._sources.resolve

    def counting(spec, *, on_progress):
        resolved.append(spec.name)
        return resolve(spec, on_progress=on_progress)

    monkeypatch.setattr(loader._sources, "resolve", counting)
    spec = ModelSpec(name="mood", source="mood/1", dtype="float32")
    found = loader.find(spec, on_progress=no_progress)
    model = found.load(on_progress=no_progress, on_reuse_event=no_event)
    assert model.info.task is Task.CLASSIFY
    assert found.num_bytes is not None
    assert 0 < model.info.num_bytes <= found.num_bytes
    model.close()
    found.close()
    assert resolved == ["mood"]


def test_a_folder_that_changes_between_its_check_and_its_load_is_refused(tmp_path: Path):
    make_model("bert", tmp_path / "mood")
    loader = loader_of(tmp_path)
    spec = ModelSpec(name="mood", source="mood")
    found = loader.find(spec, on_progress=no_progress)
    (tmp_path / "mood" / "added.json").write_text("{}")
    with pytest.raises(ModelRefusedError, match="changed"):
        found.load(on_progress=no_progress, on_reuse_event=no_event)


def test_rows_of_features_need_no_source_and_have_no_size_before(tmp_path: Path):
    loader = loader_of(tmp_path)
    spec = ModelSpec(name="risk", features=FeatureSpec())
    found = loader.find(spec, on_progress=no_progress)
    assert found.num_bytes is None
    model = found.load(on_progress=no_progress, on_reuse_event=no_event)
    assert (model.info.task, model.info.num_features) == (Task.FEATURES, 32)
    model.close()


@pytest.fixture
async def process(root: Path) -> AsyncIterator[PredictProcess]:
    options = PredictOptions(
        models=(
            ModelSpec(name="risk", features=FeatureSpec()),
            ModelSpec(name="careful", source="mood/1", semantic=SemanticSpec(embedder="similar")),
        ),
        model_root=str(root),
        num_threads=1,
    )
    process = PredictProcess(options, log_level="warning")
    await asyncio.wait_for(process.start(), 300)
    yield process
    await process.stop(grace_s=0)


@pytest.mark.slow
async def test_a_process_serves_texts_and_rows_and_comes_back_as_it_was(process: PredictProcess):
    mood, risk = await asyncio.gather(
        process.predict("mood", TEXTS),
        process.predict("risk", Inputs(rows=array("f", [0.5] * 32).tobytes(), num_rows=1)),
    )
    assert len(mood.outputs) == 2
    assert sum(array("f", mood.outputs[0].values)) == pytest.approx(1.0, abs=1e-5)
    assert 0.0 <= array("f", risk.outputs[0].values)[0] <= 1.0
    steps = [step async for step in process.load(LoadModel("mood", source="better"))]
    assert isinstance(steps[0], OpProgress)
    await process.set_alias(SetAlias("mood", "stable", "1"))
    await process.unload(UnloadModel("risk"))
    better = await process.predict("mood", TEXTS)
    assert (better.version, better.outputs[0].values == mood.outputs[0].values) == ("2", False)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.wait_for(process.wait_state(PredictState.DEAD), 60)
    await asyncio.wait_for(process.wait_state(PredictState.READY), 300)
    assert {model.phase for model in (await process.models()).models} == {ModelPhase.UNLOADED}
    assert (await process.predict("mood", TEXTS)).outputs == better.outputs
    assert (await process.predict("mood", TEXTS, version="stable")).outputs == mood.outputs
    assert (await process.describe("risk")).held


@pytest.mark.slow
async def test_a_semantic_cache_is_wrapped_around_a_text_model(process: PredictProcess):
    plain = await process.predict("mood", TEXTS)
    for _ in range(2):
        wrapped = await process.predict("careful", TEXTS)
        for one, other in zip(wrapped.outputs, plain.outputs, strict=True):
            assert array("f", one.values) == pytest.approx(array("f", other.values), abs=1e-5)
    report = await process.reuse(GetReuse("careful"))
    assert report.kind == "semantic"
    assert sum(policy.num_lookups for policy in report.policies) == 4
    with pytest.raises(WrongTaskError):
        await process.reuse(GetReuse("mood"))


@pytest.mark.slow
async def test_what_cannot_be_loaded_is_told_without_a_path(process: PredictProcess, root: Path):
    with pytest.raises(ModelRefusedError) as caught:
        [step async for step in process.load(LoadModel("other", source="nowhere"))]
    assert str(root) not in caught.value.reason
    with pytest.raises(UnknownModelError):
        await process.predict("nothing", TEXTS)
    assert len((await process.predict("mood", TEXTS)).outputs) == 2
