"""A place for one model's engine: loaded, unloaded and loaded again while the server runs.

::

              load()                          unload()
    UNLOADED --------> LOADING ----> READY -----------> DRAINING ----> UNLOADED
       ^                  |  start failed                  running requests may finish, new ones are refused
       `---- FAILED <-----'

To whoever wants to generate, a model is UNLOADED from the moment that its unloading begins. There is one
load or unload at a time; callers who want what is going on already wait for it together, and it goes on
when they leave. Everything happens on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Protocol

from server.engine.admin_messages import AdminOp, AdminProgress, AdminResult, CacheEvents
from server.engine.errors import EngineStartError, EngineUnavailableError, ModelBusyError
from server.engine.interface import Engine, EngineState, ModelReport, ModelState, RequestStream
from server.engine.messages import EngineReady, EngineStats, FailureKind, GenerateSpec
from server.engine.streams import StreamTable
from server.process.quarantine import QuarantineCounts

__all__ = ["LoadableEngine", "ModelSlot"]

log = logging.getLogger(__name__)

RESTART_POLL_S = 0.25
"""While waiting for an engine that is restarted by itself: how often to ask whether it was given up."""
MAX_FAULT_CHARS = 200

_STATES = {
    EngineState.LOADING: ModelState.LOADING,
    EngineState.READY: ModelState.READY,
    EngineState.DRAINING: ModelState.DRAINING,
    EngineState.DEAD: ModelState.LOADING,
    EngineState.UNLOADED: ModelState.UNLOADED,
}


class LoadableEngine(Engine, Protocol):
    """What a slot needs of an engine, besides."""

    @property
    def num_open_requests(self) -> int:
        """Return how many requests wait or run."""
        ...

    @property
    def is_given_up(self) -> bool:
        """Say whether it was lost and will not come back by itself."""
        ...

    @property
    def num_restarts(self) -> int:
        """Return how often it came back after it was lost."""
        ...

    @property
    def quarantine(self) -> QuarantineCounts:
        """Return how many requests are suspected of having killed it, and what came of it."""
        ...


class ModelSlot:
    """Implements ``interface.Engine`` and ``interface.ModelControl``."""

    def __init__(self, make_engine: Callable[[], LoadableEngine]) -> None:
        """``make_engine`` returns a new engine that has not been started; called once for each load."""
        self._make_engine = make_engine
        self._engine: LoadableEngine | None = None
        self._phase: ModelState | None = None
        """LOADING or DRAINING while ``_moving`` runs."""
        self._moving: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        """Set, and replaced, whenever phase or engine change."""
        self._fault = ""
        self._is_closed = False
        self._refusals = StreamTable(lambda _: None)

    # -- Engine -------------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        if self._engine is not None and self._phase is not ModelState.DRAINING:
            return self._engine.state
        if self._is_closed:
            return EngineState.DEAD
        return EngineState.LOADING if self._phase is ModelState.LOADING else EngineState.UNLOADED

    @property
    def ready(self) -> EngineReady | None:
        engine = self._serving_engine()
        return None if engine is None else engine.ready

    @property
    def stats(self) -> EngineStats | None:
        engine = self._engine  # it may be unloaded while another thread asks for metrics
        return None if engine is None else engine.stats

    @property
    def num_restarts(self) -> int:
        """Return how often the present engine came back after it was lost."""
        engine = self._engine
        return 0 if engine is None else engine.num_restarts

    @property
    def is_given_up(self) -> bool:
        """Say whether the engine was lost and will not come back by itself."""
        engine = self._engine
        return engine is not None and engine.is_given_up

    @property
    def quarantine(self) -> QuarantineCounts:
        """Return what is suspected, and refused, for the present engine."""
        engine = self._engine
        return QuarantineCounts() if engine is None else engine.quarantine

    async def start(self) -> None:
        await self.load()

    def submit(self, spec: GenerateSpec, *, deadline_s: float | None = None) -> RequestStream:
        engine = self._serving_engine()
        if engine is None:
            return self._refusals.refuse(*self._why_not())
        return engine.submit(spec, deadline_s=deadline_s)

    async def administer(self, op: AdminOp) -> AdminResult:
        return await self._engine_to_administer().administer(op)

    def administer_with_progress(self, op: AdminOp) -> AsyncGenerator[AdminProgress | AdminResult]:
        return self._engine_to_administer().administer_with_progress(op)

    async def watch(self) -> AsyncGenerator[CacheEvents]:
        """As ``interface.Engine`` says; goes on with the next engine when the model is loaded again."""
        while not self._is_closed:
            changed = self._changed
            if self._engine is not None:
                async with aclosing(self._engine.watch()) as messages:
                    async for message in messages:
                        yield message
            if not self._is_closed:
                await changed.wait()

    async def wait_state(self, state: EngineState) -> None:
        while self.state is not state:
            waiting: set[asyncio.Future[Any]] = {asyncio.ensure_future(self._changed.wait())}
            engine = self._serving_engine()
            reached = None
            if engine is not None:
                reached = asyncio.ensure_future(engine.wait_state(state))
                waiting.add(reached)
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if reached is not None and reached.done():
                    return
            finally:
                for waiter in waiting:
                    waiter.cancel()

    async def stop(self, *, grace_s: float) -> None:
        self._is_closed = True
        if self._moving is not None and self._phase is ModelState.LOADING:
            self._moving.cancel()
            await asyncio.wait({self._moving})
        try:
            if self._engine is not None:
                await self._engine.stop(grace_s=grace_s)  # also shortens the grace of an unloading
            if self._moving is not None:
                await asyncio.wait({self._moving})
        finally:
            self._touch()

    # -- ModelControl -------------------------------------------------------------------------------

    def report(self) -> ModelReport:
        """See ``interface.ModelControl``."""
        engine, fault = self._engine, self._fault
        if self._phase is not None:
            state = self._phase
        elif engine is None:
            state = ModelState.FAILED if fault else ModelState.UNLOADED
        elif engine.is_given_up:
            state, fault = ModelState.FAILED, "the engine was lost and does not start any more"
        else:
            state = _STATES[engine.state]
            if engine.state is EngineState.DEAD:
                fault = "the engine was lost and is being restarted"
        ready = None if engine is None else engine.ready
        return ModelReport(state, ready, 0 if engine is None else engine.num_open_requests, fault)

    async def load(self) -> None:
        """See ``interface.ModelControl``."""
        while True:
            if self._is_closed:
                raise EngineStartError("the server is shutting down")
            if self._moving is not None:
                moving, phase = self._moving, self._phase
                await asyncio.wait({moving})
                if phase is ModelState.LOADING:
                    if moving.cancelled():
                        raise EngineStartError("the server is shutting down")
                    moving.result()
                    return
            elif self._engine is None or self._engine.is_given_up:
                self._begin(ModelState.LOADING, self._load())
            elif self._engine.state is EngineState.READY:
                return
            else:
                ready = asyncio.ensure_future(self._engine.wait_state(EngineState.READY))
                await asyncio.wait({ready}, timeout=RESTART_POLL_S)
                ready.cancel()

    async def unload(self, *, drain_s: float | None = None) -> None:
        """See ``interface.ModelControl``."""
        if self._is_closed:
            raise ModelBusyError("the server is shutting down")
        if self._phase is ModelState.LOADING:
            raise ModelBusyError("the model is being loaded")
        if self._moving is None:
            engine = self._engine
            if engine is None:
                self._fault = ""
                return
            # From here to the change of phase nothing is awaited: no request can come in between.
            if drain_s is None and engine.num_open_requests:
                raise ModelBusyError("requests are running")
            self._begin(ModelState.DRAINING, self._unload(engine, drain_s or 0.0))
        assert self._moving is not None
        moving = self._moving
        await asyncio.wait({moving})
        moving.result()

    # -- inside -------------------------------------------------------------------------------------

    def _begin(self, phase: ModelState, work: Coroutine[Any, Any, None]) -> None:
        self._phase = phase
        self._moving = asyncio.create_task(work, name=f"model-{phase.value}")
        # Before any waiter's callback: whoever waited sees that it is over.
        self._moving.add_done_callback(self._end)
        self._touch()

    def _end(self, moved: asyncio.Task[None]) -> None:
        self._phase = self._moving = None
        self._touch()
        if not moved.cancelled() and (error := moved.exception()) is not None:
            log.error("%s failed: %s", moved.get_name(), error)

    async def _load(self) -> None:
        if self._engine is not None:
            await self._engine.stop(grace_s=0.0)
        self._fault = ""
        self._engine = engine = self._make_engine()
        self._touch()
        try:
            await engine.start()
        except BaseException as error:
            if isinstance(error, Exception):
                self._fault = _fault_for_client(error)
            self._engine = None
            await engine.stop(grace_s=0.0)
            raise

    async def _unload(self, engine: LoadableEngine, drain_s: float) -> None:
        try:
            await engine.stop(grace_s=drain_s)
        finally:
            self._engine = None

    def _serving_engine(self) -> LoadableEngine | None:
        return None if self._phase is ModelState.DRAINING else self._engine

    def _engine_to_administer(self) -> LoadableEngine:
        engine = self._serving_engine()
        if engine is None:
            raise EngineUnavailableError(*self._why_not())
        return engine

    def _why_not(self) -> tuple[FailureKind, str]:
        if self._is_closed:
            return FailureKind.DRAINING, "the server is shutting down"
        if self._phase is ModelState.LOADING:
            return FailureKind.ENGINE_LOST, "the model is being loaded"
        return FailureKind.NOT_LOADED, "the model is not loaded"

    def _touch(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _fault_for_client(error: Exception) -> str:
    """Return why a load failed, unless that could tell paths, addresses or internals."""
    reason = error.reason if isinstance(error, EngineStartError) else "/"
    is_plain = reason.isprintable() and len(reason) <= MAX_FAULT_CHARS
    if is_plain and not any(mark in reason for mark in ("/", "\\", "://", "Error", "(")):
        return reason
    return "the model could not be loaded; the server's log says why"
