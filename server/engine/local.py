"""An engine in a thread of this process, for tests and notebooks.

Model code and event loop share one interpreter lock here, so it is slower than a process of its own,
and what breaks the worker breaks everything. Apart from that it behaves alike.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from server.engine.admin_messages import (
    AdminOp,
    AdminProgress,
    AdminReply,
    AdminResult,
    CacheEvents,
)
from server.engine.desk import Desk
from server.engine.errors import EngineError, EngineStartError
from server.engine.interface import EngineState
from server.engine.loop import EngineLoop, EngineParts, Inbox, Stop
from server.engine.messages import (
    Drain,
    EngineReady,
    EngineStats,
    FailureKind,
    FromEngine,
    GenerateSpec,
    Outputs,
    ToEngine,
)
from server.engine.streams import EventStream

__all__ = ["LocalEngine"]

log = logging.getLogger(__name__)

STEP_GRACE_S = 10.0
"""How long ``stop`` waits for the step that is being computed, which nothing can interrupt."""
MAX_UNDELIVERED = 4
DELIVERY_WAIT_S = 0.05
"""How long a message waits for a blocked event loop."""


class LocalEngine:
    """Implements ``interface.Engine``. Not restarted when it breaks: its state is DEAD then."""

    def __init__(self, build: Callable[[], EngineParts], *, max_waiting: int | None = None) -> None:
        """``build`` loads the model; it runs in the engine's thread."""
        self._build = build
        self._desk = Desk(self._send, max_waiting=max_waiting)
        self._undelivered = threading.Semaphore(MAX_UNDELIVERED)
        self._inbox: Inbox = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[EngineError | None] | None = None
        self._loaded: asyncio.Future[EngineReady] | None = None
        self._ready: EngineReady | None = None
        self._stats: EngineStats | None = None

    @property
    def state(self) -> EngineState:
        return self._desk.state.value

    @property
    def ready(self) -> EngineReady | None:
        return self._ready

    @property
    def stats(self) -> EngineStats | None:
        return self._stats

    async def start(self) -> None:
        """Start the thread and load the model. Raises ``EngineStartError``."""
        if self._thread is not None:
            raise RuntimeError("an engine is started once")
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._loaded = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        either: set[asyncio.Future[Any]] = {self._loaded, self._ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._loaded.done():
            error = self._ended.result()
            raise error if error is not None else EngineStartError("the engine was stopped while loading")

    def submit(self, spec: GenerateSpec, *, deadline_s: float | None = None) -> EventStream:
        return self._desk.submit(spec, deadline_s)

    async def administer(self, op: AdminOp) -> AdminResult:
        return await self._desk.admin.administer(op)

    def administer_with_progress(self, op: AdminOp) -> AsyncGenerator[AdminProgress | AdminResult]:
        return self._desk.admin.administer_with_progress(op)

    def watch(self) -> AsyncGenerator[CacheEvents]:
        return self._desk.admin.watch()

    async def wait_state(self, state: EngineState) -> None:
        await self._desk.state.wait(state)

    async def stop(self, *, grace_s: float) -> None:
        """Refuse new requests, let running ones finish for ``grace_s``, then end them. Idempotent."""
        if self._thread is None or self._ended is None:
            self._desk.state.stop()
            self._desk.admin.close()
            return
        if self.state is EngineState.READY:
            self._desk.state.set(EngineState.DRAINING)
            self._send(Drain())
        try:
            if self.state is EngineState.DRAINING:
                await asyncio.wait({self._ended}, timeout=grace_s)
        finally:
            self._inbox.put(Stop())
            self._desk.fail_all(FailureKind.DRAINING, "the server is shutting down")
        await asyncio.wait({self._ended}, timeout=STEP_GRACE_S)
        if not self._ended.done():
            log.error("the engine's thread is stuck in a step; leaving it behind")
            self._desk.state.stop()
            self._desk.admin.close()

    def _send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    # On the engine's thread.

    def _run(self) -> None:
        error: EngineError | None = None
        try:
            parts = self._build()
            loop = EngineLoop(parts, self._inbox, self)
            self.send(parts.ready)
        except Exception as cause:  # noqa: BLE001 - raised again by ``start``
            error = EngineStartError(str(cause) or type(cause).__name__, kind=type(cause).__name__)
            error.__cause__ = cause
        else:
            try:
                loop.run()
            except Exception as cause:
                log.exception("the engine has broken")
                error = EngineError(f"the engine has broken: {type(cause).__name__}")
            finally:
                parts.close()
        self._call(self._on_ended, error)

    def send(self, message: FromEngine) -> None:
        """The loop's outbox: one hop to the event loop per message.

        Waits a moment while the event loop is ``MAX_UNDELIVERED`` messages behind: both threads share one
        interpreter, and an engine with quick steps would leave the event loop hardly any of it.
        """
        in_time = self._undelivered.acquire(timeout=DELIVERY_WAIT_S)
        self._call(self._on_counted_message if in_time else self._on_message, message)

    def _call(self, function: Callable[..., None], argument: object) -> None:
        if self._loop is None or self._loop.is_closed():
            self._inbox.put(Stop())
            return
        self._loop.call_soon_threadsafe(function, argument)

    # On the event loop.

    def _on_counted_message(self, message: FromEngine) -> None:
        self._undelivered.release()
        self._on_message(message)

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                self._desk.streams.dispatch(message.events)
            case EngineStats():
                self._stats = message
            case AdminReply() | AdminProgress() | CacheEvents():
                self._desk.admin.dispatch(message)
            case EngineReady():
                self._ready = message
                if self._loaded is not None and not self._loaded.done():
                    self._loaded.set_result(message)
                self._desk.state.set(EngineState.READY)

    def _on_ended(self, error: EngineError | None) -> None:
        if self._thread is not None:
            self._thread.join()
        self._desk.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(error)
        if error is None:
            self._desk.state.stop()
        else:
            self._desk.state.set(EngineState.DEAD)
        self._desk.admin.close()
