"""An engine in a process of its own, started again when it dies.

::

              start()                      stop()
    LOADING ----------> READY ----------------------> DRAINING ----> DEAD, for good
       ^                  | lost: every open stream
       |                  v gets Failed(ENGINE_LOST)
       `---- back-off --- DEAD ---- MAX_FAILED_STARTS in a row ----> DEAD, for good

Requests are never replayed: the front end cannot know what a client has made of half an answer, and
a request that kills engines must not be fed to the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from server.engine.admin_messages import AdminOp, AdminProgress, AdminResult, CacheEvents
from server.engine.child import ChildLimits, EngineChild
from server.engine.control import Start
from server.engine.desk import RETRY_AFTER_S, Desk
from server.engine.errors import EngineStartError
from server.engine.interface import EngineState
from server.engine.messages import Drain, EngineReady, EngineStats, FailureKind, GenerateSpec, ToEngine
from server.engine.options import EngineOptions
from server.engine.streams import EventStream

__all__ = ["EngineProcess"]

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 5
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0
STABLE_S = 30.0
"""An engine that lived for so long is started again without delay."""
EXIT_GRACE_S = 2.0
"""After draining, for the process to clean up and exit."""
CRASH_GRACE_S = 0.5
"""After it was lost, so that the log can tell its own exit status from our kill."""
MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""More than this unread by the engine: it is not keeping up, refuse."""


class EngineProcess:
    """Implements ``interface.Engine``. All methods belong to the event loop it was started in."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        limits: ChildLimits | None = None,
        debug: bool = False,
        log_format: str = "text",
        log_level: str = "info",
        module: str = "server.engine_main",
    ) -> None:
        """``module`` is run with ``--fd N`` and calls ``server.engine.serve.serve``; tests bring their own.

        ``debug``: the process logs more, and says tracebacks with its errors. ``log_format`` and
        ``log_level`` as for ``configure_logs``.
        """
        self._limits = limits or ChildLimits()
        self._start = Start(
            options,
            heartbeat_s=self._limits.heartbeat_s,
            debug=debug,
            log_format=log_format,
            log_level=log_level,
        )
        self._module = module
        self._desk = Desk(self._send, max_waiting=options.max_waiting)
        self._child: EngineChild | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False
        self._ready: EngineReady | None = None
        self._stats: EngineStats | None = None
        self._num_restarts = 0
        self._fault: str | None = None

    @property
    def state(self) -> EngineState:
        return self._desk.state.value

    @property
    def ready(self) -> EngineReady | None:
        return self._ready

    @property
    def stats(self) -> EngineStats | None:
        """Return the latest snapshot. Its counters begin anew with every engine process."""
        return self._stats

    @property
    def num_restarts(self) -> int:
        """Return how often the engine became ready again after it was lost."""
        return self._num_restarts

    @property
    def num_failed_steps(self) -> int:
        """Return how many steps the present engine process could not compute."""
        return 0 if self._child is None else self._child.num_failed_steps

    @property
    def fault(self) -> str | None:
        """Return why the engine was last lost, in an operator's words; None if it never was."""
        return self._fault

    @property
    def is_given_up(self) -> bool:
        """Say whether it was lost and will not be started again."""
        return self._keeper is not None and self._keeper.done()

    @property
    def num_open_requests(self) -> int:
        """Return how many requests wait or run."""
        return self._desk.streams.num_open

    @property
    def pid(self) -> int | None:
        """Return the engine's process id; None while there is no process."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Spawn the process and load the model; return when READY.

        Raises ``EngineStartError`` and leaves nothing behind; the first start is not retried.
        """
        if self._keeper is not None or self._stopping:
            raise RuntimeError("an engine is started once")
        try:
            child = await self._launch()
        except BaseException:
            self._desk.state.set(EngineState.DEAD)
            raise
        self._keeper = asyncio.create_task(self._keep(child), name="engine-keeper")

    def submit(self, spec: GenerateSpec, *, deadline_s: float | None = None) -> EventStream:
        if self._child is not None and self._child.num_unsent_bytes > MAX_UNSENT_BYTES:
            return self._desk.refuse_full()
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
        """Refuse new requests, let running ones finish for ``grace_s``, then end the process.

        May be called again while it runs, with less grace: the shortest counts. Idempotent.
        """
        self._stopping = True
        try:
            if self.state is EngineState.READY:
                self._desk.state.set(EngineState.DRAINING)
                self._send(Drain())
            if self.state is EngineState.DRAINING and self._child is not None:
                await asyncio.wait({self._child.lost}, timeout=grace_s)
        finally:
            keeper, child = self._keeper, self._child
            if child is not None and child.lost.done() and self.state is EngineState.DRAINING:
                self._desk.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")
                await child.end(grace_s=EXIT_GRACE_S)
            elif child is not None:
                self._desk.fail_all(FailureKind.DRAINING, "the server is shutting down")
                await child.end()
            if keeper is not None:
                keeper.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(keeper)
            self._desk.fail_all(FailureKind.DRAINING, "the server is shutting down")
            self._desk.state.stop()
            self._desk.admin.close()

    def _send(self, message: ToEngine) -> None:
        if self._child is not None:
            self._child.send(message)

    def _set_stats(self, stats: EngineStats) -> None:
        self._stats = stats

    async def _launch(self) -> EngineChild:
        """Bring a new process to READY. Raises ``EngineStartError``."""
        self._desk.state.set(EngineState.LOADING)
        child = EngineChild(
            on_events=self._desk.streams.dispatch,
            on_stats=self._set_stats,
            on_admin=self._desk.admin.dispatch,
            limits=self._limits,
        )
        self._child = child
        try:
            ready = await child.start(self._module, self._start)
        except BaseException:
            self._child = None
            raise
        self._ready = ready
        self._desk.retry_after_s = max(RETRY_AFTER_S, ready.load_s)
        self._desk.state.set(EngineState.READY)
        self._desk.admin.engine_is_ready()
        return child

    async def _keep(self, child: EngineChild) -> None:
        """Watch over the running process, and replace it whenever it is lost."""
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while True:
            born = loop.time()
            reason = await child.lost
            if self._stopping:
                return  # ``stop`` does the rest
            self._desk.state.set(EngineState.DEAD)
            # First of all: what it takes to bury the old process must not delay those who wait.
            running = self._desk.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")
            exit_text = await child.end(grace_s=CRASH_GRACE_S)
            self._child = None
            self._fault = f"{reason}; {exit_text}"
            log.error("the engine was lost: %s; requests running then: %s", self._fault, running or "none")
            if loop.time() - born >= STABLE_S:
                backoff_s = FIRST_BACKOFF_S
            replacement, backoff_s = await self._replace(backoff_s)
            if replacement is None:
                return
            child = replacement
            self._num_restarts += 1

    async def _replace(self, backoff_s: float) -> tuple[EngineChild | None, float]:
        """Start until it works; None after too many failures. Also return the delay for the next time."""
        for attempt in range(1, MAX_FAILED_STARTS + 1):
            await asyncio.sleep(backoff_s)
            if self._stopping:
                return None, backoff_s
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
            try:
                return await self._launch(), backoff_s
            except EngineStartError as error:
                self._fault = str(error)
                self._desk.state.set(EngineState.DEAD)
                log.error("start %d of %d failed: %s: %s", attempt, MAX_FAILED_STARTS, error.kind, error)
        log.critical("the engine does not start any more; giving it up: %s", self._fault)
        self._desk.admin.close()
        return None, backoff_s
