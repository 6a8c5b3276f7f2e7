"""Models in bounded memory: loaded once, kept while in use, unloaded least recently used first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvcore.clock import ManualClock, MonotonicClock
from server.predict.catalogue import CatalogueEntry
from server.predict.errors import (
    ModelInUseError,
    ModelRefusedError,
    ModelTooLargeError,
    ModelUnloadedError,
    PredictError,
)
from server.predict.messages import Inputs, ModelInfo, ModelPhase, ModelStatus, Output, ReuseEvent, Task
from server.predict.model import FoundModel, LoadProgress, PredictModel, Prepared
from server.predict.model_cache import ModelCache, ModelLease
from server.predict.options import ModelSpec, SemanticSpec

PATIENCE_S = 20.0


class SizedModel:
    """A model that is nothing but its size, and knows whether it was closed."""

    def __init__(self, num_bytes: int) -> None:
        self.info = ModelInfo(task=Task.CLASSIFY, family="sized", num_bytes=num_bytes)
        self.is_closed = False

    def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
        return []

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        assert not self.is_closed, "used after it was unloaded"
        return []

    def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True


@dataclass
class SizedLoader:
    """Makes models of the sizes given by name; a gate holds loads of a name until it is opened."""

    sizes: dict[str, int]
    gates: dict[str, threading.Event] = field(default_factory=dict)
    refused: dict[str, PredictError | Exception] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    models: list[tuple[str, SizedModel]] = field(default_factory=list)
    embedders: list[PredictModel | None] = field(default_factory=list)
    turn: threading.Lock = field(default_factory=threading.Lock)
    sought: list[str] = field(default_factory=list)
    seeking: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fetch_gates: dict[str, threading.Event] = field(default_factory=dict)
    not_found: dict[str, PredictError | Exception] = field(default_factory=dict)
    found: list[SizedFound] = field(default_factory=list)
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def find(self, spec: ModelSpec, *, on_progress: LoadProgress) -> FoundModel:
        self.sought.append(spec.name)
        self.seeking.release()
        if (gate := self.fetch_gates.get(spec.name)) is not None:
            while not gate.wait(0.01):
                on_progress("fetching", 1, 2)
        if (error := self.not_found.get(spec.name)) is not None:
            raise error
        found = SizedFound(self, spec, self.sizes[spec.name])
        self.found.append(found)
        return found

    def load(self, spec: ModelSpec, on_progress: LoadProgress, embedder: PredictModel | None) -> PredictModel:
        assert self.turn.acquire(blocking=False), "two are built at once"
        try:
            return self._load(spec, on_progress, embedder)
        finally:
            self.turn.release()

    def _load(
        self, spec: ModelSpec, on_progress: LoadProgress, embedder: PredictModel | None
    ) -> PredictModel:
        self.started.append(spec.name)
        self.embedders.append(embedder)
        self.begun.release()
        on_progress("reading", 1, 2)
        if (gate := self.gates.get(spec.name)) is not None:
            assert gate.wait(PATIENCE_S)
        if (error := self.refused.get(spec.name)) is not None:
            raise error
        model = SizedModel(self.sizes[spec.name])
        self.models.append((spec.name, model))
        return model

    def loaded(self) -> list[str]:
        return [name for name, model in self.models if not model.is_closed]


@dataclass(eq=False)
class SizedFound:
    """A model that was found; it knows whether its files were let go of."""

    loader: SizedLoader
    spec: ModelSpec
    num_bytes: int | None
    is_closed: bool = False

    def load(
        self,
        *,
        on_progress: LoadProgress,
        on_reuse_event: Callable[[ReuseEvent], None],
        embedder: PredictModel | None = None,
    ) -> PredictModel:
        assert not self.is_closed, "loaded from files that were let go of"
        return self.loader.load(self.spec, on_progress, embedder)

    def close(self) -> None:
        assert not self.is_closed, "let go of twice"
        self.is_closed = True


def entry(name: str, version: str = "1", kind: str = "folder", **spec: Any) -> CatalogueEntry:
    return CatalogueEntry(ModelSpec(name=name, version=version, source=name, **spec), kind)


@dataclass
class World:
    loader: SizedLoader
    cache: ModelCache

    def ask(self, who: CatalogueEntry) -> Future[ModelLease]:
        answer: Future[ModelLease] = Future()

        def done(lease: ModelLease | PredictError) -> None:
            if isinstance(lease, PredictError):
                answer.set_exception(lease)
            else:
                answer.set_result(lease)

        self.cache.lease(who, done)
        return answer

    def lease(self, name: str) -> ModelLease:
        return self.ask(entry(name)).result(PATIENCE_S)

    def touch(self, *names: str) -> None:
        for name in names:
            self.lease(name).release()

    def operate(self, method: Callable[..., None], *args: Any) -> ModelStatus:
        answer: Future[ModelStatus] = Future()

        def done(status: ModelStatus | PredictError) -> None:
            if isinstance(status, PredictError):
                answer.set_exception(status)
            else:
                answer.set_result(status)

        method(*args, done)
        return answer.result(PATIENCE_S)

    def ask_unload(
        self, *entries: CatalogueEntry, drain_s: float | None = None
    ) -> Future[tuple[ModelStatus, ...]]:
        answer: Future[tuple[ModelStatus, ...]] = Future()

        def done(statuses: tuple[ModelStatus, ...] | PredictError) -> None:
            if isinstance(statuses, PredictError):
                answer.set_exception(statuses)
            else:
                answer.set_result(statuses)

        self.cache.unload(entries, drain_s, done)
        return answer

    def unload(self, *entries: CatalogueEntry, drain_s: float | None = None) -> list[ModelPhase]:
        statuses = self.ask_unload(*entries, drain_s=drain_s).result(PATIENCE_S)
        return [status.phase for status in statuses]


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    worlds = []

    def make(
        sizes: dict[str, int],
        *,
        memory: int | None = None,
        max_models: int | None = None,
        clock: Any = None,
    ) -> World:
        loader = SizedLoader(sizes)
        cache = ModelCache(
            loader,
            memory_bytes=memory,
            max_models=max_models,
            clock=clock or MonotonicClock(),
            find_embedder=entry,
            on_reuse_event=lambda event: None,
        )
        worlds.append(World(loader, cache))
        return worlds[-1]

    yield make
    for world in worlds:
        for gate in (*world.loader.gates.values(), *world.loader.fetch_gates.values()):
            gate.set()
        world.cache.close()
        assert world.loader.loaded() == []
        assert all(found.is_closed for found in world.loader.found)
        assert world.cache.num_bytes == 0


MakeWorld = Callable[..., World]


def test_concurrent_first_requests_load_once(make_world: MakeWorld) -> None:
    world = make_world({"a": 1})
    gate = world.loader.gates["a"] = threading.Event()
    answers = [world.ask(entry("a")) for _ in range(50)]
    gate.set()
    leases = [answer.result(PATIENCE_S) for answer in answers]
    assert world.loader.started == ["a"]
    assert len({id(lease.model) for lease in leases}) == 1
    assert world.cache.status(entry("a")).num_running == 50
    for lease in leases:
        lease.release()
        lease.release()  # idempotent
    assert world.cache.status(entry("a")).num_running == 0


def test_least_recently_used_is_unloaded_to_make_room(make_world: MakeWorld) -> None:
    world = make_world({"a": 40, "b": 40, "c": 40}, memory=100)
    world.touch("a", "b", "a", "c")
    assert sorted(world.loader.loaded()) == ["a", "c"]
    assert world.cache.num_bytes == 80
    assert world.cache.counters.num_evictions == 1
    world.touch("b")
    assert sorted(world.loader.loaded()) == ["b", "c"]


def test_number_of_models_is_bounded_too(make_world: MakeWorld) -> None:
    world = make_world(dict.fromkeys("abcd", 0), max_models=2)
    world.touch("a", "b", "c", "d")
    assert world.loader.loaded() == ["c", "d"]


def test_model_in_use_is_never_unloaded(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.predict.loading.ROOM_WAIT_S", 0.05)
    world = make_world({"a": 60, "b": 60}, memory=100)
    held = world.lease("a")
    with pytest.raises(ModelTooLargeError, match="held by models in use"):
        world.lease("b")
    assert world.loader.loaded() == ["a"]
    held.release()


def test_load_waits_for_models_in_use_to_become_idle(make_world: MakeWorld) -> None:
    world = make_world({"a": 60, "b": 60}, memory=100)
    held = world.lease("a")
    waiting = world.ask(entry("b"))
    assert not waiting.done()
    held.release()
    waiting.result(PATIENCE_S).release()
    assert world.loader.loaded() == ["b"]


def test_model_larger_than_the_memory_is_refused_and_nothing_else_suffers(make_world: MakeWorld) -> None:
    world = make_world({"a": 60, "b": 30, "huge": 101}, memory=100)
    world.touch("a", "b")
    with pytest.raises(ModelTooLargeError, match="larger than the memory"):
        world.lease("huge")
    assert world.loader.loaded() == ["a", "b"]
    assert world.cache.num_bytes == 90
    assert "huge" not in world.loader.started


def test_room_that_cannot_be_made_unloads_nothing(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.predict.loading.ROOM_WAIT_S", 0.05)
    world = make_world({"a": 50, "b": 40, "c": 60}, memory=100)
    held = world.lease("a")
    world.touch("b")
    with pytest.raises(ModelTooLargeError):
        world.lease("c")  # b alone would not be enough
    assert sorted(world.loader.loaded()) == ["a", "b"]
    held.release()


def test_failed_load_is_told_to_all_who_wait_and_not_tried_for_every_call(make_world: MakeWorld) -> None:
    clock = ManualClock()
    world = make_world({"a": 1}, clock=clock)
    world.loader.refused["a"] = ModelRefusedError("no good")
    gate = world.loader.gates["a"] = threading.Event()
    answers = [world.ask(entry("a")) for _ in range(3)]
    gate.set()
    for answer in answers:
        with pytest.raises(ModelRefusedError, match="no good"):
            answer.result(PATIENCE_S)
    with pytest.raises(ModelRefusedError, match="no good") as refused:
        world.lease("a")
    assert refused.value.retry_after_s == 1.0
    assert world.loader.started == ["a"]
    assert world.cache.status(entry("a")).phase is ModelPhase.FAILED

    clock.advance(1.1)
    world.loader.refused.clear()
    world.touch("a")
    assert world.loader.started == ["a", "a"]


def test_unexpected_fault_of_a_loader_tells_clients_nothing(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world({"a": 1})
    world.loader.refused["a"] = OSError("/secret/place")
    with pytest.raises(ModelRefusedError) as refused:
        world.lease("a")
    assert "secret" not in refused.value.reason
    assert "/secret/place" in caplog.text


def test_unloaded_by_an_operator_it_stays_so_until_it_is_loaded_by_one(make_world: MakeWorld) -> None:
    world = make_world({"a": 7})
    world.touch("a")
    assert world.unload(entry("a")) == [ModelPhase.UNLOADED]
    assert world.cache.num_bytes == 0
    with pytest.raises(ModelUnloadedError):
        world.lease("a")
    seen: list[tuple[str, int, int]] = []
    status = world.operate(
        world.cache.load, entry("a"), lambda _status, phase, done, total: seen.append((phase, done, total))
    )
    assert status.phase is ModelPhase.READY
    assert sorted(seen) == [("", 0, 0), ("reading", 1, 2)]
    world.touch("a")


def test_unload_in_use_is_refused_or_drains(make_world: MakeWorld) -> None:
    world = make_world({"a": 1})
    held = world.lease("a")
    with pytest.raises(ModelInUseError):
        world.unload(entry("a"))
    drained = world.ask_unload(entry("a"), drain_s=PATIENCE_S)
    assert world.cache.status(entry("a")).phase is ModelPhase.DRAINING
    with pytest.raises(ModelUnloadedError):
        world.lease("a")
    held.model.run([])  # still there
    held.release()
    [status] = drained.result(PATIENCE_S)
    assert status.phase is ModelPhase.UNLOADED
    assert world.loader.loaded() == []


def test_what_does_not_drain_in_time_goes_on(make_world: MakeWorld) -> None:
    world = make_world({"a": 1})
    held = world.lease("a")
    with pytest.raises(ModelInUseError, match="still run"):
        world.unload(entry("a"), drain_s=0.01)
    assert world.cache.status(entry("a")).phase is ModelPhase.READY
    world.touch("a")
    held.release()


def test_hundred_races_of_load_and_unload_end_well(make_world: MakeWorld) -> None:
    world = make_world(dict.fromkeys("abcde", 30), memory=100)

    def call(index: int) -> str:
        name = "abcde"[index % 5]
        try:
            if index % 7 == 0:
                world.unload(entry(name))
            elif index % 7 == 1:
                world.operate(world.cache.load, entry(name), None)
            else:
                lease = world.lease(name)
                lease.model.run([])  # fails if it was closed under us
                lease.release()
        except (ModelInUseError, ModelUnloadedError, ModelTooLargeError) as error:
            return type(error).__name__
        return "done"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(400)))
    assert results.count("done") > 100
    assert world.cache.num_bytes <= 100
    assert sum(30 for _ in world.loader.loaded()) == world.cache.num_bytes


def test_embedder_is_loaded_with_its_semantic_cache_and_kept(make_world: MakeWorld) -> None:
    world = make_world({"inner": 30, "embedder": 30, "other": 60}, memory=100)
    semantic = entry("inner", semantic=SemanticSpec(embedder="embedder"))
    lease = world.ask(semantic).result(PATIENCE_S)
    [_, embedder] = world.loader.embedders[::-1]
    assert embedder is None  # the embedder has none itself
    assert sorted(world.loader.loaded()) == ["embedder", "inner"]
    lease.release()
    world.touch("embedder")
    world.touch("other")  # unloads the inner model, and with it the hold on the embedder
    assert "other" in world.loader.loaded()
    assert "inner" not in world.loader.loaded()


def test_closed_cache_refuses(make_world: MakeWorld) -> None:
    world = make_world({"a": 1})
    world.touch("a")
    world.cache.close()
    with pytest.raises(PredictError, match="shutting down"):
        world.lease("a")
