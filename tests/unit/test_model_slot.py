"""Loading and unloading a model while the server runs, over an engine that is there at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.engine.admin_messages import CacheEvents, ReadStats
from server.engine.errors import EngineStartError, EngineUnavailableError, ModelBusyError
from server.engine.fake import FakeEngine
from server.engine.interface import Engine, EngineState, ModelControl, ModelState
from server.engine.messages import Admitted, Failed, FailureKind, Finished, Refused
from server.engine.model_slot import ModelSlot
from tests.fakes import spec_of

ENDLESS = 10**9


class QuickEngine(FakeEngine):
    """Starts when its factory lets it, and fails to when told so."""

    def __init__(self, factory: Factory) -> None:
        super().__init__()
        self._factory = factory
        self.given_up = False
        self.num_stops = 0

    @property
    def is_given_up(self) -> bool:
        return self.given_up

    async def start(self) -> None:
        await self._factory.gate.wait()
        if self._factory.failures:
            raise self._factory.failures.pop()
        await super().start()

    async def stop(self, *, grace_s: float) -> None:
        self.num_stops += 1
        await super().stop(grace_s=grace_s)


class Factory:
    """Makes engines, and holds their start back while ``gate`` is not set."""

    def __init__(self) -> None:
        self.made: list[QuickEngine] = []
        self.failures: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()

    def __call__(self) -> QuickEngine:
        self.made.append(QuickEngine(self))
        return self.made[-1]

    @property
    def alive(self) -> list[QuickEngine]:
        return [engine for engine in self.made if engine.state is not EngineState.DEAD]


@pytest.fixture
async def factory() -> Factory:
    return Factory()


@pytest.fixture
async def slot(factory: Factory) -> AsyncIterator[ModelSlot]:
    slot = ModelSlot(factory)
    yield slot
    factory.gate.set()
    await slot.stop(grace_s=0)
    assert slot.state is EngineState.DEAD
    assert factory.alive == []
    assert len(asyncio.all_tasks()) == 1


async def events_of(engine: Engine, max_new_tokens: int = 4) -> list[Any]:
    return [event async for ready in engine.submit(spec_of([1, 2], max_new_tokens)) for event in ready]


async def spin() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_it_is_an_engine_and_a_model_control(slot: ModelSlot):
    engine: Engine = slot
    control: ModelControl = slot
    assert (slot.state, control.report().state) == (EngineState.UNLOADED, ModelState.UNLOADED)
    assert (engine.ready, engine.stats) == (None, None)
    await engine.start()
    assert (slot.state, control.report().state) == (EngineState.READY, ModelState.READY)
    assert isinstance((await events_of(slot))[-1], Finished)


async def test_unloading_ends_the_engine_and_loading_starts_another(slot: ModelSlot, factory: Factory):
    await slot.load()
    await slot.unload()
    assert factory.made[0].state is EngineState.DEAD
    assert (slot.state, slot.ready, slot.report().state) == (EngineState.UNLOADED, None, ModelState.UNLOADED)
    [refused] = await events_of(slot)
    assert isinstance(refused, Refused)
    assert refused.kind is FailureKind.NOT_LOADED
    with pytest.raises(EngineUnavailableError) as caught:
        await slot.administer(ReadStats())
    assert caught.value.kind is FailureKind.NOT_LOADED
    await slot.unload()  # as it is already
    await slot.load()
    assert len(factory.made) == 2
    assert isinstance((await events_of(slot))[-1], Finished)


async def test_concurrent_loads_are_one_load(slot: ModelSlot, factory: Factory):
    factory.gate.clear()
    loads = [asyncio.create_task(slot.load()) for _ in range(20)]
    await spin()
    assert (slot.state, slot.report().state) == (EngineState.LOADING, ModelState.LOADING)
    with pytest.raises(ModelBusyError):
        await slot.unload(drain_s=1.0)
    factory.gate.set()
    await asyncio.gather(*loads)
    await slot.load()
    assert len(factory.made) == 1


async def test_a_load_goes_on_when_the_one_who_asked_leaves(slot: ModelSlot, factory: Factory):
    factory.gate.clear()
    load = asyncio.create_task(slot.load())
    await spin()
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    factory.gate.set()
    await slot.wait_state(EngineState.READY)
    assert len(factory.made) == 1


async def test_a_failed_load_leaves_the_fault_and_can_be_tried_again(slot: ModelSlot, factory: Factory):
    factory.failures.append(EngineStartError("there is not enough memory"))
    with pytest.raises(EngineStartError, match="not enough memory"):
        await slot.load()
    report = slot.report()
    assert (report.state, report.fault) == (ModelState.FAILED, "there is not enough memory")
    assert slot.state is EngineState.UNLOADED
    await slot.load()
    assert (slot.report().state, slot.report().fault) == (ModelState.READY, "")


@pytest.mark.parametrize(
    "error",
    [
        EngineStartError("/srv/secret/model: no such folder"),
        EngineStartError("RuntimeError: CUDA\nstack"),
        EngineStartError("x" * 1000),
        OSError(2, "No such file", "/srv/secret"),
    ],
)
async def test_the_fault_that_clients_see_holds_no_path_and_no_internals(
    slot: ModelSlot, factory: Factory, error: Exception
):
    factory.failures.append(error)
    with pytest.raises(type(error)):
        await slot.load()
    assert slot.report().fault == "the model could not be loaded; the server's log says why"
    await slot.unload()
    assert slot.report().state is ModelState.UNLOADED


async def test_a_model_in_use_is_not_unloaded_unless_its_requests_may_finish(
    slot: ModelSlot, factory: Factory
):
    await slot.load()
    running = asyncio.create_task(events_of(slot, 2000))
    await spin()
    with pytest.raises(ModelBusyError, match="requests are running"):
        await slot.unload()
    assert (slot.state, slot.report().num_requests) == (EngineState.READY, 1)
    unload = asyncio.create_task(slot.unload(drain_s=60.0))
    await spin()
    assert (slot.state, slot.report().state) == (EngineState.UNLOADED, ModelState.DRAINING)
    [refused] = await events_of(slot)
    assert refused.kind is FailureKind.NOT_LOADED
    again = asyncio.create_task(slot.unload())
    events = await running
    assert (type(events[0]), type(events[-1])) == (Admitted, Finished)
    await asyncio.gather(unload, again)
    assert factory.made[0].num_stops == 1


async def test_what_does_not_finish_in_the_time_given_is_ended(slot: ModelSlot):
    await slot.load()
    running = asyncio.create_task(events_of(slot, ENDLESS))
    await spin()
    await slot.unload(drain_s=0.0)
    last = (await running)[-1]
    assert isinstance(last, Failed)
    assert last.kind is FailureKind.DRAINING


async def test_loading_waits_for_an_unloading_to_end(slot: ModelSlot, factory: Factory):
    await slot.load()
    running = asyncio.create_task(events_of(slot, 2000))
    await spin()
    unload = asyncio.create_task(slot.unload(drain_s=60.0))
    await spin()
    load = asyncio.create_task(slot.load())
    await spin()
    assert len(factory.made) == 1
    await asyncio.gather(running, unload, load)
    assert len(factory.made) == 2
    assert slot.state is EngineState.READY


async def test_whoever_waits_for_a_state_sees_it_over_engines(slot: ModelSlot):
    await slot.load()
    unloaded = asyncio.create_task(slot.wait_state(EngineState.UNLOADED))
    dead = asyncio.create_task(slot.wait_state(EngineState.DEAD))
    await slot.unload()
    await unloaded
    ready = asyncio.create_task(slot.wait_state(EngineState.READY))
    await slot.load()
    await ready
    await slot.unload()
    await slot.stop(grace_s=0)
    await dead


async def test_an_engine_that_was_given_up_can_be_loaded_again(slot: ModelSlot, factory: Factory):
    await slot.load()
    factory.made[0].lose()
    assert slot.report().state is ModelState.LOADING
    assert slot.report().fault == "the engine was lost and is being restarted"
    factory.made[0].given_up = True
    assert slot.report().state is ModelState.FAILED
    await slot.load()
    assert factory.made[0].num_stops == 1
    assert slot.report().state is ModelState.READY


async def test_loading_an_engine_that_restarts_by_itself_waits_for_it(slot: ModelSlot, factory: Factory):
    await slot.load()
    factory.made[0].lose()
    load = asyncio.create_task(slot.load())
    await spin()
    assert not load.done()
    factory.made[0].recover()
    await load
    assert len(factory.made) == 1


async def test_a_watch_goes_on_with_the_next_engine(slot: ModelSlot):
    watch = slot.watch()
    first = asyncio.ensure_future(anext(watch))
    await spin()
    await slot.load()
    assert await first == CacheEvents(0, [])
    await slot.unload()
    second = asyncio.ensure_future(anext(watch))
    await spin()
    assert not second.done()
    await slot.load()
    assert await second == CacheEvents(0, [])
    await slot.stop(grace_s=0)
    assert [m async for m in watch] == []


async def test_stopping_ends_a_load_and_refuses_the_next(slot: ModelSlot, factory: Factory):
    factory.gate.clear()
    load = asyncio.create_task(slot.load())
    await spin()
    await slot.stop(grace_s=0)
    with pytest.raises(EngineStartError, match="shutting down"):
        await load
    with pytest.raises(EngineStartError, match="shutting down"):
        await slot.load()
    with pytest.raises(ModelBusyError, match="shutting down"):
        await slot.unload()
    [refused] = await events_of(slot)
    assert refused.kind is FailureKind.DRAINING


async def test_100_races_of_loading_unloading_and_generating_end_well(slot: ModelSlot, factory: Factory):
    draw = random.Random(20)
    await slot.load()

    async def race() -> str:
        for _ in range(draw.randrange(4)):
            await asyncio.sleep(0)
        match draw.randrange(5):
            case 0:
                await slot.load()
                return "loaded"
            case 1:
                try:
                    await slot.unload()
                except ModelBusyError:
                    return "busy"
                return "unloaded"
            case 2:
                try:
                    await slot.unload(drain_s=30.0)
                except ModelBusyError:
                    return "busy"
                return "drained"
            case _:
                last = (await events_of(slot, 20))[-1]
                assert isinstance(last, Finished | Refused)
                if isinstance(last, Refused):
                    assert last.kind in (FailureKind.NOT_LOADED, FailureKind.ENGINE_LOST)
                return type(last).__name__

    seen: list[str] = []
    for _ in range(100):
        seen += await asyncio.gather(*(race() for _ in range(8)))
        assert len(factory.alive) <= 1
    assert set(seen) == {"loaded", "unloaded", "drained", "busy", "Finished", "Refused"}
    await slot.load()
    assert isinstance((await events_of(slot))[-1], Finished)
