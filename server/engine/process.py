"""An engine in a process of its own, started again when it dies (``server.process.keeper``).

Requests are never replayed: the front end cannot know what a client has made of half an answer, and
a request that kills engines must not be fed to the next one. Nor are clients let do it for ever
(``server.process.quarantine``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from server.engine.admin_messages import AdminOp, AdminProgress, AdminReply, AdminResult, CacheEvents
from server.engine.control import FromChild, Start
from server.engine.desk import RETRY_AFTER_S, Desk
from server.engine.errors import EngineStartError
from server.engine.interface import EngineState
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
from server.engine.options import EngineOptions
from server.engine.streams import EventStream
from server.process.child import Child, ChildLimits, Program
from server.process.keeper import KeptProcess
from server.process.quarantine import QuarantineCounts

__all__ = ["EngineProcess"]

MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""More than this unread by the engine: it is not keeping up, refuse."""


class EngineProcess(KeptProcess[EngineState, FromEngine, EngineReady]):
    """Implements ``interface.Engine``. All methods belong to the event loop it was started in."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        limits: ChildLimits | None = None,
        debug: bool = False,
        log_format: str = "text",
        log_level: str = "info",
        quarantine_s: float = 600.0,
        module: str = "server.engine_main",
    ) -> None:
        """``module`` is run with ``--fd N`` and calls ``server.engine.serve.serve``; tests bring their own.

        ``debug``: the process logs more, and says tracebacks with its errors. ``log_format``, ``log_level``:
        as for ``configure_logs``. ``quarantine_s``: how long a request is refused that has killed it.
        """
        limits = limits or ChildLimits()
        program = Program(
            name="engine",
            module=module,
            start=Start(
                options,
                heartbeat_s=limits.heartbeat_s,
                debug=debug,
                log_format=log_format,
                log_level=log_level,
            ),
            messages=FromChild,
            ready_type=EngineReady,
            start_error=EngineStartError,
        )
        self._desk = Desk(self._send, max_waiting=options.max_waiting, quarantine_s=quarantine_s)
        super().__init__(program, self._desk.state, limits=limits)
        self._stats: EngineStats | None = None

    @property
    def stats(self) -> EngineStats | None:
        """Return the latest snapshot. Its counters begin anew with every engine process."""
        return self._stats

    @property
    def num_failed_steps(self) -> int:
        """Return how many steps the present engine process could not compute."""
        return 0 if self._child is None else self._child.num_failed

    @property
    def quarantine(self) -> QuarantineCounts:
        """Return how many requests are suspected of having killed the process, and what came of it."""
        return self._desk.quarantine.counts

    @property
    def num_open_requests(self) -> int:
        """Return how many requests wait or run."""
        return self._desk.streams.num_open

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

    def _send(self, message: ToEngine) -> None:
        if self._child is not None:
            self._child.send(message)

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                self._desk.streams.dispatch(message.events)
            case EngineStats():
                self._stats = message
            case AdminReply() | AdminProgress() | CacheEvents():
                self._desk.admin.dispatch(message)

    def _on_ready(self, ready: EngineReady) -> None:
        self._desk.retry_after_s = max(RETRY_AFTER_S, ready.load_s)
        self._desk.admin.engine_is_ready()

    def _fail_open(self, *, is_stopping: bool) -> str:
        if is_stopping:
            self._desk.quarantine.close()
            running = self._desk.fail_all(FailureKind.DRAINING, "the server is shutting down")
        elif self._stopping:
            self._desk.quarantine.close()
            running = self._desk.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")
        else:
            running = self._desk.lose_all()
        return str(running) if running else ""

    def _on_turn(self, began_s: float) -> None:
        self._desk.note_turn(began_s)

    def _begin_draining(self, child: Child[FromEngine, EngineReady]) -> None:
        child.send(Drain())

    def _drained(self) -> asyncio.Future[str]:
        # It ends by itself when it has drained.
        assert self._child is not None
        return self._child.lost

    def _close(self) -> None:
        self._desk.admin.close()
