"""Models in bounded memory, when things happen at the wrong moment: queues, drains, embedders, failures."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from kvcore.clock import ManualClock
from server.predict.catalogue import CatalogueEntry
from server.predict.errors import (
    ModelInUseError,
    ModelRefusedError,
    ModelTooLargeError,
    ModelUnloadedError,
    PredictError,
    PredictLostError,
    UnknownModelError,
)
from server.predict.messages import ModelPhase, ModelStatus
from server.predict.model_cache import ModelCache
from server.predict.options import SemanticSpec
from tests.unit.test_model_cache import PATIENCE_S, MakeWorld, SizedLoader, World, entry, make_world

__all__ = ["make_world"]

SEMANTIC = SemanticSpec(embedder="embedder")


def test_embedder_that_waits_in_the_queue_behind_its_own_users_is_loaded_by_one_of_them(
    make_world: MakeWorld,
) -> None:
    """It used to hang for good: both loader threads waited for a load that no thread was left to do."""
    world = make_world({"one": 1, "two": 1, "embedder": 1, "plain": 1, "other": 1})
    gates = [world.loader.gates.setdefault(name, threading.Event()) for name in ("plain", "other")]
    busy = [world.ask(entry("plain")), world.ask(entry("other"))]
    for _ in busy:
        assert world.loader.begun.acquire(timeout=PATIENCE_S)
    answers = [world.ask(entry(name, semantic=SEMANTIC)) for name in ("one", "two")]
    answers.append(world.ask(entry("embedder")))
    for gate in gates:
        gate.set()
    for answer in (*busy, *answers):
        answer.result(PATIENCE_S).release()
    assert sorted(world.loader.started) == ["embedder", "one", "other", "plain", "two"]


def test_load_goes_on_when_the_drain_of_its_embedder_is_given_up(make_world: MakeWorld) -> None:
    """The thread used to wait for good: nobody told it that the embedder was there again."""
    world = make_world({"inner": 1, "embedder": 1})
    held = world.lease("embedder")
    given_up: Future[ModelStatus | PredictError] = Future()
    world.cache.unload(entry("embedder"), 0.2, given_up.set_result)
    waiting = world.ask(entry("inner", semantic=SEMANTIC))
    assert isinstance(given_up.result(PATIENCE_S), ModelInUseError)
    waiting.result(PATIENCE_S).release()
    held.release()


def test_idle_semantic_cache_and_its_embedder_make_room_together(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that needed the room of both was refused as if requests ran on them."""
    monkeypatch.setattr("server.predict.model_cache.ROOM_WAIT_S", 0.05)
    world = make_world({"inner": 30, "embedder": 30, "large": 80}, memory=100)
    world.ask(entry("inner", semantic=SEMANTIC)).result(PATIENCE_S).release()
    world.touch("large")
    assert world.loader.loaded() == ["large"]
    assert world.cache.status(entry("embedder")).num_running == 0
    assert world.cache.counters.num_evictions == 2


def test_embedder_in_use_by_others_too_is_not_unloaded_with_its_semantic_cache(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.predict.model_cache.ROOM_WAIT_S", 0.05)
    world = make_world({"inner": 30, "embedder": 30, "large": 80}, memory=100)
    world.ask(entry("inner", semantic=SEMANTIC)).result(PATIENCE_S).release()
    held = world.lease("embedder")
    with pytest.raises(PredictError, match="held by models in use"):
        world.lease("large")
    assert sorted(world.loader.loaded()) == ["embedder", "inner"]
    held.release()


def test_embedder_is_let_go_of_though_all_loader_threads_are_busy(make_world: MakeWorld) -> None:
    """Its release used to wait for a loader thread, and whoever waited for its room with it."""
    world = make_world({"inner": 1, "embedder": 1, "one": 1, "two": 1})
    semantic = entry("inner", semantic=SEMANTIC)
    world.ask(semantic).result(PATIENCE_S).release()
    gates = [world.loader.gates.setdefault(name, threading.Event()) for name in ("one", "two")]
    answers = [world.ask(entry(name)) for name in ("one", "two")]
    world.operate(world.cache.unload, semantic, None)
    assert world.cache.status(entry("embedder")).num_running == 0
    for gate in gates:
        gate.set()
    for answer in answers:
        answer.result(PATIENCE_S).release()


def test_embedder_that_an_operator_unloaded_stays_so(make_world: MakeWorld) -> None:
    world = make_world({"inner": 1, "embedder": 1})
    world.touch("embedder")
    world.operate(world.cache.unload, entry("embedder"), None)
    with pytest.raises(ModelUnloadedError, match="embedder"):
        world.ask(entry("inner", semantic=SEMANTIC)).result(PATIENCE_S)
    assert world.cache.status(entry("embedder")).phase is ModelPhase.UNLOADED


def test_embedder_that_failed_before_says_so_no_more_once_it_is_loaded(make_world: MakeWorld) -> None:
    clock = ManualClock()
    world = make_world({"inner": 1, "embedder": 1}, clock=clock)
    world.loader.refused["embedder"] = ModelRefusedError("no good")
    with pytest.raises(ModelRefusedError, match="no good"):
        world.lease("embedder")
    world.loader.refused.clear()
    clock.advance(2.0)
    world.ask(entry("inner", semantic=SEMANTIC)).result(PATIENCE_S).release()
    status = world.cache.status(entry("embedder"))
    assert (status.phase, status.fault) == (ModelPhase.READY, "")


def test_operator_load_that_fails_leaves_an_unloaded_model_unloaded(make_world: MakeWorld) -> None:
    clock = ManualClock()
    world = make_world({"a": 1}, clock=clock)
    world.touch("a")
    world.operate(world.cache.unload, entry("a"), None)
    world.loader.refused["a"] = ModelRefusedError("no good")
    with pytest.raises(ModelRefusedError, match="no good"):
        world.operate(world.cache.load, entry("a"), None)
    clock.advance(100.0)
    with pytest.raises(ModelUnloadedError):
        world.lease("a")
    assert world.loader.started == ["a", "a"]
    assert world.cache.status(entry("a")).held


def test_calls_wait_for_an_operators_load_of_an_unloaded_model(make_world: MakeWorld) -> None:
    world = make_world({"a": 1})
    world.operate(world.cache.unload, entry("a"), None)
    gate = world.loader.gates["a"] = threading.Event()
    loaded: Future[ModelStatus | PredictError] = Future()
    world.cache.load(entry("a"), None, loaded.set_result)
    assert not world.cache.status(entry("a")).held
    call = world.ask(entry("a"))
    gate.set()
    call.result(PATIENCE_S).release()
    assert isinstance(loaded.result(PATIENCE_S), ModelStatus)


def test_model_that_an_operator_has_just_loaded_is_not_the_first_to_go(make_world: MakeWorld) -> None:
    clock = ManualClock()
    world = make_world({"a": 40, "b": 40, "c": 40}, memory=100, clock=clock)
    world.touch("a")
    world.operate(world.cache.unload, entry("a"), None)
    clock.advance(10.0)
    world.touch("b")
    clock.advance(10.0)
    world.operate(world.cache.load, entry("a"), None)
    world.touch("c")
    assert sorted(world.loader.loaded()) == ["a", "c"]


def test_whoever_waits_when_the_cache_closes_is_told(make_world: MakeWorld) -> None:
    """A load that had not begun, and a drain, used to stay without an answer."""
    world = make_world(dict.fromkeys(("one", "two", "late", "used"), 1))
    held = world.lease("used")
    drained: Future[ModelStatus | PredictError] = Future()
    world.cache.unload(entry("used"), PATIENCE_S, drained.set_result)
    gates = [world.loader.gates.setdefault(name, threading.Event()) for name in ("one", "two")]
    begun = [world.ask(entry(name)) for name in ("one", "two")]
    for _ in ("used", *begun):  # both loader threads are at work, not only asked to be
        assert world.loader.begun.acquire(timeout=PATIENCE_S)
    late = world.ask(entry("late"))
    loaded: Future[ModelStatus | PredictError] = Future()
    world.cache.load(entry("late"), None, loaded.set_result)
    closing = threading.Thread(target=world.cache.close)
    closing.start()
    with pytest.raises(PredictLostError):
        late.result(PATIENCE_S)
    assert isinstance(loaded.result(PATIENCE_S), PredictLostError)
    assert isinstance(drained.result(PATIENCE_S), PredictLostError)
    for gate in gates:
        gate.set()
    closing.join(PATIENCE_S)
    for answer in begun:
        answer.result(PATIENCE_S).release()
    held.release()
    assert world.loader.started == ["used", "one", "two"] or world.loader.started == ["used", "two", "one"]


def test_drain_that_ended_does_not_end_the_next_one(make_world: MakeWorld) -> None:
    """Its timer may be on its way when the last request ends."""
    world = make_world({"a": 1})
    held = world.lease("a")
    first: Future[ModelStatus | PredictError] = Future()
    world.cache.unload(entry("a"), PATIENCE_S, first.set_result)
    timer = world.cache._slots[entry("a").key].drain_timer
    assert timer is not None
    held.release()
    assert isinstance(first.result(PATIENCE_S), ModelStatus)
    world.operate(world.cache.load, entry("a"), None)
    held = world.lease("a")
    second: Future[ModelStatus | PredictError] = Future()
    world.cache.unload(entry("a"), PATIENCE_S, second.set_result)
    timer.function(*timer.args)
    assert not second.done()
    held.release()
    assert isinstance(second.result(PATIENCE_S), ModelStatus)


def test_embedder_that_is_not_in_the_catalogue_does_not_make_its_user_unknown() -> None:
    """Calls used to be told that the model that they named was not served here."""

    def find(name: str) -> CatalogueEntry:
        raise UnknownModelError("no such model is served here")

    loader = SizedLoader({"inner": 1})
    cache = ModelCache(
        loader,
        memory_bytes=None,
        max_models=None,
        clock=ManualClock(),
        find_embedder=find,
        on_reuse_event=lambda event: None,
    )
    with pytest.raises(ModelRefusedError, match="embedder"):
        World(loader, cache).ask(entry("inner", semantic=SEMANTIC)).result(PATIENCE_S)
    cache.close()


def test_load_that_failed_for_now_is_tried_again_when_it_said(make_world: MakeWorld) -> None:
    """Its error used to stand for up to a minute, and to tell callers to come again all the while."""
    clock = ManualClock()
    world = make_world({"a": 1}, clock=clock)
    world.loader.refused["a"] = ModelTooLargeError("held by models in use", retry_after_s=5.0)
    for _ in range(8):
        with pytest.raises(ModelTooLargeError):
            world.lease("a")
        clock.advance(5.1)
    assert world.loader.started == ["a"] * 8
    with pytest.raises(ModelTooLargeError):
        world.lease("a")
    clock.advance(3.0)
    with pytest.raises(ModelTooLargeError) as refused:
        world.lease("a")
    assert refused.value.retry_after_s == pytest.approx(2.0)


def test_load_for_which_there_is_no_thread_can_be_tried_again(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model used to count as being loaded for good."""
    world = make_world({"a": 1})

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(world.cache._pool, "submit", refuse)
        with pytest.raises(RuntimeError):
            world.ask(entry("a"))
    world.touch("a")
    assert world.cache.status(entry("a")).num_running == 0


def test_load_may_fail_any_number_of_times(make_world: MakeWorld) -> None:
    """From the 1,025th failure on the delay was no number any more, and nobody was told of the failure."""
    world = make_world({"a": 1}, clock=ManualClock())
    world.loader.refused["a"] = ModelRefusedError("no good")
    with pytest.raises(ModelRefusedError):
        world.lease("a")
    world.cache._slots[entry("a").key].num_failures = 2000
    with pytest.raises(ModelRefusedError):
        world.operate(world.cache.load, entry("a"), None)


def test_one_who_cannot_take_the_answer_does_not_keep_it_from_the_others(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world({"a": 1})
    gate = world.loader.gates["a"] = threading.Event()

    def break_down(answer: object) -> None:
        raise ZeroDivisionError

    world.cache.load(entry("a"), None, break_down)
    told: Future[ModelStatus | PredictError] = Future()
    world.cache.load(entry("a"), None, told.set_result)
    gate.set()
    assert isinstance(told.result(PATIENCE_S), ModelStatus)
    assert "ZeroDivisionError" in caplog.text
