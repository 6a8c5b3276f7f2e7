"""Models in bounded memory, when things happen at the wrong moment: queues, drains, embedders, failures."""

from __future__ import annotations

import random
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

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
from server.predict.loading import NUM_FETCHERS, NUM_LOADERS
from server.predict.messages import ModelPhase, ModelStatus
from server.predict.model_cache import ModelCache
from server.predict.options import SemanticSpec
from tests.unit.test_model_cache import (
    PATIENCE_S,
    MakeWorld,
    SizedLoader,
    SizedModel,
    World,
    entry,
    make_world,
)

__all__ = ["make_world"]

SEMANTIC = SemanticSpec(embedder="embedder")


def test_embedder_that_waits_in_the_queue_behind_its_own_users_is_loaded(make_world: MakeWorld) -> None:
    """It used to hang for good: all loader threads waited for a load that no thread was left to do."""
    users = [f"user-{number}" for number in range(2 * NUM_LOADERS)]
    world = make_world(dict.fromkeys([*users, "embedder", "plain"], 1))
    gate = world.loader.gates["plain"] = threading.Event()
    answers = [world.ask(entry("plain"))]
    assert world.loader.begun.acquire(timeout=PATIENCE_S)
    answers += [world.ask(entry(name, semantic=SEMANTIC)) for name in users]
    answers.append(world.ask(entry("embedder")))
    gate.set()
    for answer in answers:
        answer.result(PATIENCE_S).release()
    assert world.loader.started[:2] == ["plain", "embedder"]
    assert sorted(world.loader.started[2:]) == users
    assert world.cache.status(entry("embedder")).num_running == len(users)


def test_load_goes_on_when_the_drain_of_its_embedder_is_given_up(make_world: MakeWorld) -> None:
    """The thread used to wait for good: nobody told it that the embedder was there again."""
    world = make_world({"inner": 1, "embedder": 1})
    held = world.lease("embedder")
    given_up = world.ask_unload(entry("embedder"), drain_s=0.2)
    waiting = world.ask(entry("inner", semantic=SEMANTIC))
    with pytest.raises(ModelInUseError):
        given_up.result(PATIENCE_S)
    waiting.result(PATIENCE_S).release()
    held.release()


def test_idle_semantic_cache_and_its_embedder_make_room_together(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that needed the room of both was refused as if requests ran on them."""
    monkeypatch.setattr("server.predict.loading.ROOM_WAIT_S", 0.05)
    world = make_world({"inner": 30, "embedder": 30, "large": 80}, memory=100)
    world.ask(entry("inner", semantic=SEMANTIC)).result(PATIENCE_S).release()
    world.touch("large")
    assert world.loader.loaded() == ["large"]
    assert world.cache.status(entry("embedder")).num_running == 0
    assert world.cache.counters.num_evictions == 2


def test_embedder_in_use_by_others_too_is_not_unloaded_with_its_semantic_cache(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.predict.loading.ROOM_WAIT_S", 0.05)
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
    world.unload(semantic)
    assert world.cache.status(entry("embedder")).num_running == 0
    for gate in gates:
        gate.set()
    for answer in answers:
        answer.result(PATIENCE_S).release()


def test_embedder_that_an_operator_unloaded_stays_so(make_world: MakeWorld) -> None:
    world = make_world({"inner": 1, "embedder": 1})
    world.touch("embedder")
    world.unload(entry("embedder"))
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
    world.unload(entry("a"))
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
    world.unload(entry("a"))
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
    world.unload(entry("a"))
    clock.advance(10.0)
    world.touch("b")
    clock.advance(10.0)
    world.operate(world.cache.load, entry("a"), None)
    world.touch("c")
    assert sorted(world.loader.loaded()) == ["a", "c"]


def test_whoever_waits_when_the_cache_closes_is_told(make_world: MakeWorld) -> None:
    """A load that had not begun, and a drain, used to stay without an answer."""
    names = ("one", "two", "three", "four", "five", "used")
    world = make_world(dict.fromkeys(names, 1))
    held = world.lease("used")
    drained = world.ask_unload(entry("used"), drain_s=PATIENCE_S)
    gate = world.loader.gates["one"] = threading.Event()
    begun = world.ask(entry("one"))
    for _ in ("used", "one"):
        assert world.loader.begun.acquire(timeout=PATIENCE_S)
    # They wait for their turn to be built, in a thread, and in the queue for one.
    late = [world.ask(entry(name)) for name in ("two", "three", "four", "five")]
    loaded: Future[ModelStatus | PredictError] = Future()
    world.cache.load(entry("five"), None, loaded.set_result)
    closing = threading.Thread(target=world.cache.close)
    closing.start()
    for answer in late:
        with pytest.raises(PredictLostError):
            answer.result(PATIENCE_S)
    assert isinstance(loaded.result(PATIENCE_S), PredictLostError)
    with pytest.raises(PredictLostError):
        drained.result(PATIENCE_S)
    gate.set()
    closing.join(PATIENCE_S)
    begun.result(PATIENCE_S).release()
    held.release()
    assert world.loader.started == ["used", "one"]


def test_drain_that_ended_does_not_end_the_next_one(make_world: MakeWorld) -> None:
    """Its timer may be on its way when the last request ends."""
    world = make_world({"a": 1})
    held = world.lease("a")
    first = world.ask_unload(entry("a"), drain_s=PATIENCE_S)
    [drain] = world.cache._shelf.slots[entry("a").key].drains
    assert drain.timer is not None
    held.release()
    first.result(PATIENCE_S)
    world.operate(world.cache.load, entry("a"), None)
    held = world.lease("a")
    second = world.ask_unload(entry("a"), drain_s=PATIENCE_S)
    drain.timer.function(*drain.timer.args)
    assert not second.done()
    held.release()
    second.result(PATIENCE_S)


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
        patched.setattr(world.cache._loading._loaders, "submit", refuse)
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
    world.cache._shelf.slots[entry("a").key].num_failures = 2000
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


# -- stages: what waits for the network holds up nobody else ----------------------------------------


def test_local_model_never_waits_behind_downloads(make_world: MakeWorld) -> None:
    names = [f"far-{number}" for number in range(NUM_FETCHERS + 2)]
    world = make_world(dict.fromkeys([*names, "near"], 1))
    world.loader.fetch_gates.update({name: threading.Event() for name in names})
    far = [
        world.ask(entry(name, kind=kind)) for name, kind in zip(names, ["hub", "mlflow"] * 9, strict=False)
    ]
    for _ in range(NUM_FETCHERS):
        assert world.loader.seeking.acquire(timeout=PATIENCE_S)
    world.touch("near")
    assert not any(answer.done() for answer in far)
    for gate in world.loader.fetch_gates.values():
        gate.set()
    for answer in far:
        answer.result(PATIENCE_S).release()
    assert sorted(world.loader.sought) == sorted(["near", *names])


def test_same_download_is_fetched_and_loaded_once_for_all_who_wait(make_world: MakeWorld) -> None:
    world = make_world({"far": 1})
    gate = world.loader.fetch_gates["far"] = threading.Event()
    steps: list[str] = []
    loaded: Future[ModelStatus | PredictError] = Future()
    world.cache.load(
        entry("far", kind="mlflow"), lambda _s, phase, _d, _t: steps.append(phase), loaded.set_result
    )
    answers = [world.ask(entry("far", kind="mlflow")) for _ in range(10)]
    gate.set()
    for answer in answers:
        answer.result(PATIENCE_S).release()
    assert isinstance(loaded.result(PATIENCE_S), ModelStatus)
    assert (world.loader.sought, world.loader.started) == (["far"], ["far"])
    assert steps[-1] == "reading"
    assert set(steps) <= {"", "fetching", "reading"}


def test_models_are_built_one_at_a_time(make_world: MakeWorld) -> None:
    world = make_world({"one": 1, "two": 1})
    gate = world.loader.gates["one"] = threading.Event()
    one = world.ask(entry("one"))
    assert world.loader.begun.acquire(timeout=PATIENCE_S)
    two = world.ask(entry("two"))
    for _ in range(2):  # it is found meanwhile
        assert world.loader.seeking.acquire(timeout=PATIENCE_S)
    assert not two.done()
    gate.set()
    for answer in (one, two):
        answer.result(PATIENCE_S).release()
    assert sorted(world.loader.started) == ["one", "two"]


def test_model_that_waits_for_room_does_not_keep_others_from_loading(make_world: MakeWorld) -> None:
    world = make_world({"used": 60, "large": 60, "small": 10}, memory=100)
    held = world.lease("used")
    waiting = world.ask(entry("large"))
    for _ in range(2):
        assert world.loader.seeking.acquire(timeout=PATIENCE_S)
    world.touch("small")
    assert not waiting.done()
    held.release()
    waiting.result(PATIENCE_S).release()


def test_download_is_given_up_when_the_cache_closes(make_world: MakeWorld) -> None:
    """The server's end used to wait for it, however many minutes it had to go."""
    world = make_world({"far": 1})
    world.loader.fetch_gates["far"] = threading.Event()  # never opened
    answer = world.ask(entry("far", kind="hub"))
    assert world.loader.seeking.acquire(timeout=PATIENCE_S)
    world.cache.close()
    with pytest.raises(PredictLostError):
        answer.result(PATIENCE_S)


@pytest.mark.parametrize("kind", ["folder", "mlflow"])
def test_load_that_fails_at_any_stage_keeps_no_memory_no_files_and_no_embedder(
    make_world: MakeWorld, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.predict.loading.ROOM_WAIT_S", 0.05)
    sizes = {"lost": 30, "spoiled": 30, "huge": 500, "crowded": 80, "embedder": 30}
    world = make_world(sizes, memory=100)
    world.loader.not_found["lost"] = ModelRefusedError("not there")
    world.loader.refused["spoiled"] = OSError("disk")
    for name in ("lost", "spoiled", "huge", "crowded"):
        with pytest.raises(PredictError):
            world.ask(entry(name, kind=kind, semantic=SEMANTIC)).result(PATIENCE_S)
        assert world.cache.status(entry("embedder")).num_running == 0
        assert world.cache.num_bytes in (0, 30)
        assert all(found.is_closed for found in world.loader.found if found.spec.name != "embedder")


def test_failed_load_leaves_nothing_of_what_it_had_read(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that is kept for later calls used to keep all that the load had in its hands: the weights."""
    world = make_world({"a": 1})
    read: list[weakref.ref[SizedModel]] = []
    plain = world.loader._load

    def fail_late(*arguments: Any) -> NoReturn:
        weights = SizedModel(1)
        ring: list[Any] = [weights]
        ring.append(ring)  # as models are
        read.append(weakref.ref(weights))
        plain(*arguments)
        raise ModelRefusedError("its files changed") from ValueError("why")

    monkeypatch.setattr(world.loader, "_load", fail_late)
    told: Future[ModelStatus | PredictError] = Future()
    world.cache.load(entry("a"), None, told.set_result)
    assert isinstance(told.result(PATIENCE_S), ModelRefusedError)
    assert [weights() for weights in read] == [None]
    with pytest.raises(ModelRefusedError, match="its files changed"):
        world.lease("a")  # from what is kept
    for _name, model in world.loader.models:
        model.close()


def test_failed_embedder_fails_those_that_wait_for_it(make_world: MakeWorld) -> None:
    world = make_world({"one": 1, "two": 1, "embedder": 1})
    world.loader.refused["embedder"] = ModelRefusedError("no good")
    answers = [world.ask(entry(name, semantic=SEMANTIC)) for name in ("one", "two")]
    for answer in answers:
        with pytest.raises(ModelRefusedError, match="no good"):
            answer.result(PATIENCE_S)
    assert set(world.loader.started) == {"embedder"}
    assert all(found.is_closed for found in world.loader.found)


def test_thread_that_cannot_be_had_for_the_next_stage_fails_the_load(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world({"inner": 1, "embedder": 1}, clock=ManualClock())
    gate = world.loader.gates["embedder"] = threading.Event()
    answer = world.ask(entry("inner", semantic=SEMANTIC))
    assert world.loader.begun.acquire(timeout=PATIENCE_S)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(world.cache._loading._loaders, "submit", refuse)
        gate.set()
        with pytest.raises(ModelRefusedError, match="log says why"):
            answer.result(PATIENCE_S)
    assert world.cache.status(entry("embedder")).num_running == 0
    world.operate(world.cache.load, entry("inner", semantic=SEMANTIC), None)


# -- several versions at once -----------------------------------------------------------------------


def test_all_versions_are_unloaded_at_one_moment(make_world: MakeWorld) -> None:
    world = make_world({"m": 10})
    versions = [entry("m", version) for version in "123"]
    leases = [world.ask(version).result(PATIENCE_S) for version in versions]
    unloaded = world.ask_unload(*versions, drain_s=PATIENCE_S)
    for version, lease in zip(versions, leases, strict=True):
        with pytest.raises(ModelUnloadedError):  # from the beginning on, of every version
            world.ask(versions[-1]).result(PATIENCE_S)
        assert world.loader.loaded() == ["m"] * 3
        assert world.cache.status(version).phase is ModelPhase.DRAINING
        lease.release()
    statuses = unloaded.result(PATIENCE_S)
    assert [(status.version, status.phase, status.held) for status in statuses] == [
        (version, ModelPhase.UNLOADED, True) for version in "123"
    ]
    assert world.loader.loaded() == []


def test_one_version_that_is_still_used_keeps_all_of_them(make_world: MakeWorld) -> None:
    """Those before it used to be unloaded all the same, and those after it as well."""
    world = make_world({"m": 10})
    versions = [entry("m", version) for version in "1234"]
    held = [world.ask(version).result(PATIENCE_S) for version in versions[:3]]
    held[1].release()
    with pytest.raises(ModelInUseError, match="requests run on versions 1, 3; no version was unloaded"):
        world.unload(*versions)
    with pytest.raises(ModelInUseError, match="requests still run on versions 1, 3; no version was unloaded"):
        world.unload(*versions, drain_s=0.01)
    assert [world.cache.status(version).phase.value for version in versions] == ["ready"] * 3 + ["unloaded"]
    for version in versions:  # also the one that was not loaded
        world.ask(version).result(PATIENCE_S).release()
    for lease in (held[0], held[2]):
        lease.release()


def test_version_that_is_being_loaded_keeps_all_of_them(make_world: MakeWorld) -> None:
    world = make_world({"m": 10})
    world.ask(entry("m", "1")).result(PATIENCE_S).release()
    gate = world.loader.gates["m"] = threading.Event()
    loading = world.ask(entry("m", "2"))
    with pytest.raises(ModelInUseError, match="version 2 is being loaded"):
        world.unload(entry("m", "1"), entry("m", "2"), drain_s=PATIENCE_S)
    assert world.cache.status(entry("m", "1")).phase is ModelPhase.READY
    gate.set()
    loading.result(PATIENCE_S).release()


def test_nothing_is_loaded_while_versions_are_drained(make_world: MakeWorld) -> None:
    world = make_world({"m": 10})
    used, cold = entry("m", "1"), entry("m", "2")
    held = world.ask(used).result(PATIENCE_S)
    unloaded = world.ask_unload(used, cold, drain_s=PATIENCE_S)
    for version in (used, cold):
        with pytest.raises(ModelInUseError, match="being unloaded"):
            world.operate(world.cache.load, version, None)
        with pytest.raises(ModelUnloadedError):
            world.ask(version).result(PATIENCE_S)
    held.release()
    unloaded.result(PATIENCE_S)
    assert world.loader.started == ["m"]


def test_semantic_cache_and_its_embedder_of_one_name_are_unloaded_together(make_world: MakeWorld) -> None:
    world = make_world({"embedder": 1})
    inner, embedder = entry("embedder", "2", semantic=SEMANTIC), entry("embedder")
    world.ask(inner).result(PATIENCE_S).release()
    with pytest.raises(ModelInUseError, match="embeds for the semantic cache of embedder"):
        world.unload(embedder)
    assert world.unload(embedder, inner) == [ModelPhase.UNLOADED] * 2
    assert world.loader.loaded() == []


def test_drains_that_share_a_version_end_each_in_its_own_way(make_world: MakeWorld) -> None:
    world = make_world({"m": 10})
    first, second = entry("m", "1"), entry("m", "2")
    of_first, of_second = (world.ask(version).result(PATIENCE_S) for version in (first, second))
    alone = world.ask_unload(first, drain_s=PATIENCE_S)
    both = world.ask_unload(first, second, drain_s=PATIENCE_S)
    of_first.release()
    assert [status.phase for status in alone.result(PATIENCE_S)] == [ModelPhase.UNLOADED]
    assert not both.done()
    of_second.release()
    assert [status.phase for status in both.result(PATIENCE_S)] == [ModelPhase.UNLOADED] * 2


def test_version_in_two_drains_goes_on_only_when_both_were_given_up(make_world: MakeWorld) -> None:
    world = make_world({"m": 10})
    held = world.ask(entry("m")).result(PATIENCE_S)
    patient = world.ask_unload(entry("m"), drain_s=PATIENCE_S)
    with pytest.raises(ModelInUseError):
        world.unload(entry("m"), entry("m", "2"), drain_s=0.01)
    assert world.cache.status(entry("m")).phase is ModelPhase.DRAINING
    held.release()
    assert [status.phase for status in patient.result(PATIENCE_S)] == [ModelPhase.UNLOADED]


def test_idle_version_of_a_drain_makes_room_for_others(make_world: MakeWorld) -> None:
    world = make_world({"m": 40, "other": 60}, memory=100)
    held = world.ask(entry("m", "1")).result(PATIENCE_S)
    world.ask(entry("m", "2")).result(PATIENCE_S).release()
    unloaded = world.ask_unload(entry("m", "1"), entry("m", "2"), drain_s=PATIENCE_S)
    world.touch("other")
    assert sorted(world.loader.loaded()) == ["m", "other"]
    held.release()
    assert [status.phase for status in unloaded.result(PATIENCE_S)] == [ModelPhase.UNLOADED] * 2


def test_drain_without_a_thread_for_its_clock_changes_nothing(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model used to be drained for good."""
    world = make_world({"m": 1})
    held = world.ask(entry("m")).result(PATIENCE_S)

    def refuse(_: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Timer, "start", refuse)
        with pytest.raises(RuntimeError):
            world.ask_unload(entry("m"), drain_s=PATIENCE_S)
    assert world.cache.status(entry("m")).phase is ModelPhase.READY
    world.ask(entry("m")).result(PATIENCE_S).release()
    held.release()


def test_hundred_races_over_versions_downloads_and_embedders_end_well(make_world: MakeWorld) -> None:
    """Nothing is closed under a call, nothing is left held, and no group is ever half unloaded for good."""
    draw = random.Random(7)
    world = make_world({"m": 20, "embedder": 20, "s": 20, "far": 20}, memory=110)
    entries = [
        *(entry("m", version) for version in "123"),
        entry("embedder"),
        entry("s", semantic=SEMANTIC),
        entry("far", kind="mlflow"),
    ]
    plans = [(draw.randrange(10), draw.choice(entries), draw.choice([None, 0.005, 1.0])) for _ in range(400)]

    def act(plan: tuple[int, CatalogueEntry, float | None]) -> str:
        kind, chosen, drain_s = plan
        try:
            match kind:
                case 0:
                    world.unload(*entries[:3], drain_s=drain_s)
                case 1:
                    world.unload(chosen, drain_s=drain_s)
                case 2 | 3:
                    world.operate(world.cache.load, chosen, None)
                case _:
                    lease = world.ask(chosen).result(PATIENCE_S)
                    lease.model.run([])
                    lease.release()
        except (ModelInUseError, ModelUnloadedError, ModelTooLargeError) as error:
            return type(error).__name__
        return "done"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(act, plans))
    assert results.count("done") > 100
    shelf = world.cache._shelf
    for slot in shelf.slots.values():
        assert [slot.drains, slot.after_drains, slot.waiting, slot.listeners, slot.is_queued] == [
            *([], [], [], []),
            False,
        ]
        assert slot.phase in (ModelPhase.READY, ModelPhase.UNLOADED, ModelPhase.FAILED)
        held = sum(
            other.embedder is not None and other.embedder.slot is slot for other in shelf.slots.values()
        )
        assert slot.num_leases == held
        assert (slot.found is not None) == (slot.model is not None) == (slot.num_bytes == 20)


def test_load_that_waits_for_its_turn_says_so_at_once(make_world: MakeWorld) -> None:
    world = make_world({"one": 1, "two": 1})
    gate = world.loader.gates["one"] = threading.Event()
    one = world.ask(entry("one"))
    assert world.loader.begun.acquire(timeout=PATIENCE_S)
    seen: list[tuple[str, ModelPhase]] = []
    loaded: Future[ModelStatus | PredictError] = Future()
    world.cache.load(
        entry("two"), lambda now, phase, _d, _t: seen.append((phase, now.phase)), loaded.set_result
    )
    assert seen == [("", ModelPhase.LOADING)]
    gate.set()
    one.result(PATIENCE_S).release()
    assert isinstance(loaded.result(PATIENCE_S), ModelStatus)
