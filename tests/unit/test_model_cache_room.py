"""Room for models: who leaves first, who is woken, and models that are larger than their files said."""

from __future__ import annotations

import threading

import pytest

from kvcore.clock import ManualClock
from server.predict import loading
from server.predict.catalogue import CatalogueEntry
from server.predict.errors import ModelRefusedError, ModelTooLargeError, PredictLostError
from server.predict.messages import ModelPhase
from server.predict.model import FoundModel, LoadProgress
from server.predict.options import ModelSpec
from tests.unit.test_model_cache import PATIENCE_S, MakeWorld, SizedFound, World, entry, make_world

__all__ = ["make_world"]


def understate(world: World, name: str, num_bytes: int) -> None:
    """Let the files of a model say less than it takes."""
    find = world.loader.find

    def find_less(spec: ModelSpec, *, on_progress: LoadProgress) -> FoundModel:
        found = find(spec, on_progress=on_progress)
        if spec.name == name and isinstance(found, SizedFound):
            found.num_bytes = num_bytes
        return found

    world.loader.find = find_less  # type: ignore[method-assign]


def test_a_model_was_last_used_when_its_last_lease_ended(make_world: MakeWorld) -> None:
    clock = ManualClock()
    world = make_world({"a": 60, "b": 60, "c": 60}, memory=150, clock=clock)
    held = world.lease("a")
    clock.advance(1.0)
    world.touch("b")
    clock.advance(1.0)
    held.release()
    clock.advance(1.0)
    assert world.cache.status(entry("a")).idle_s == 1.0
    world.touch("c")
    assert world.loader.loaded() == ["a", "c"]


def test_a_load_that_waits_for_room_is_woken_by_the_lease_that_ends(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not found out by chance: it had waited, and would have until it was refused."""
    monkeypatch.setattr(loading, "ROOM_WAIT_S", 10 * PATIENCE_S)
    world, waits = make_world({"a": 60, "b": 60}, memory=100), threading.Event()

    class Watched(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            waits.set()  # the lock is held until it really waits
            return super().wait(timeout)

    shelf = world.cache._shelf
    shelf.changed = Watched(shelf.lock)
    held = world.lease("a")
    waiting = world.ask(entry("b"))
    assert waits.wait(PATIENCE_S)
    held.release()
    waiting.result(PATIENCE_S).release()
    assert world.loader.loaded() == ["b"]


def test_a_model_waits_for_loads_that_have_reserved_before_it_as_long_as_they_take(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused after a while, as if requests held the memory, though it could not be built before."""
    monkeypatch.setattr(loading, "ROOM_WAIT_S", 0.0)
    world, waits = make_world({"slow": 60, "next": 60}, memory=100), threading.Event()

    class Watched(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is None, "it has a limit"
            waits.set()
            return super().wait()

    gate = world.loader.gates["slow"] = threading.Event()
    slow = world.ask(entry("slow"))
    assert world.loader.begun.acquire(timeout=PATIENCE_S)
    shelf = world.cache._shelf
    shelf.changed = Watched(shelf.lock)
    waiting = world.ask(entry("next"))
    assert waits.wait(PATIENCE_S)
    slow.add_done_callback(lambda done: done.result().release())  # idle before anybody looks
    gate.set()
    waiting.result(PATIENCE_S).release()
    assert world.loader.loaded() == ["next"]


def test_two_models_that_turn_out_larger_do_not_wait_for_each_other(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "ROOM_WAIT_S", 0.1)
    world = make_world({"one": 90, "two": 90}, memory=100)
    understate(world, "one", 40)
    understate(world, "two", 40)
    gate = world.loader.gates["one"] = threading.Event()
    one = world.ask(entry("one"))
    assert world.loader.begun.acquire(timeout=PATIENCE_S)
    two = world.ask(entry("two"))
    while world.cache.num_bytes < 80:  # it has reserved, too
        threading.Event().wait(0.001)
    gate.set()
    ends = [answer.exception(PATIENCE_S) for answer in (one, two)]
    assert {type(error) for error in ends} <= {ModelTooLargeError, type(None)}
    for answer, error in zip((one, two), ends, strict=True):
        if error is None:
            answer.result().release()
    assert world.cache.num_bytes in (0, 90)


def test_a_model_counts_with_what_it_takes_and_not_with_what_its_files_said(make_world: MakeWorld) -> None:
    world = make_world({"a": 60, "b": 30}, memory=100)
    understate(world, "a", 10)
    world.touch("a")
    assert world.cache.num_bytes == 60
    world.touch("b")
    assert world.cache.num_bytes == 90
    understate(world, "b", 90)  # now too much rather than too little
    world.unload(entry("b"))
    assert world.operate(world.cache.load, entry("b"), None).phase is ModelPhase.READY
    assert world.cache.num_bytes == 30  # "a" had to go before it was known


def test_room_is_made_again_for_a_model_that_turns_out_larger(make_world: MakeWorld) -> None:
    world = make_world({"idle": 50, "large": 90}, memory=100)
    understate(world, "large", 40)
    world.touch("idle")
    world.touch("large")
    assert (world.loader.loaded(), world.cache.num_bytes) == (["large"], 90)
    assert world.cache.counters.num_evictions == 1


def test_a_model_that_turns_out_too_large_is_closed_and_keeps_nothing(make_world: MakeWorld) -> None:
    world = make_world({"used": 50, "huge": 500}, memory=100)
    understate(world, "huge", 40)
    held = world.lease("used")
    with pytest.raises(ModelTooLargeError, match="larger than the memory"):
        world.lease("huge")
    assert (world.loader.loaded(), world.cache.num_bytes) == (["used"], 50)
    assert world.cache.status(entry("huge")).phase is ModelPhase.FAILED
    held.release()


@pytest.mark.parametrize("ended", ["unloaded", "failed"])
def test_a_version_that_was_withdrawn_and_entered_anew_is_loaded_from_its_new_source(
    make_world: MakeWorld, ended: str
) -> None:
    world = make_world({"m": 10})
    old, new = entry("m"), CatalogueEntry(ModelSpec(name="m", version="1", source="elsewhere"), "folder")
    if ended == "failed":
        world.loader.refused["m"] = ModelRefusedError("it is broken")
        with pytest.raises(ModelRefusedError):
            world.ask(old).result(PATIENCE_S)
        del world.loader.refused["m"]
    else:
        world.ask(old).result(PATIENCE_S).release()
        world.unload(old)
    lease = world.ask(new).result(PATIENCE_S)  # neither held, nor the old one's failure
    assert [found.spec.source for found in world.loader.found] == ["m", "elsewhere"]
    assert lease.entry == new
    lease.release()
    with pytest.raises(RuntimeError, match="released"):
        _ = lease.entry


def test_nothing_is_loaded_once_the_cache_is_closed(make_world: MakeWorld) -> None:
    world = make_world({"m": 10})
    world.cache.close()
    with pytest.raises(PredictLostError):
        world.operate(world.cache.load, entry("m"), None)
    assert world.loader.sought == []
