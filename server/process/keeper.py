"""A process that is started again when it dies.

::

              start()                      stop()
    LOADING ----------> READY ----------------------> DRAINING ----> DEAD, for good
       ^                  | lost: whatever is open
       |                  v fails at once
       `---- back-off --- DEAD ---- MAX_FAILED_STARTS in a row ----> DEAD, for good
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from enum import Enum
from typing import Generic, TypeVar

from server.process.child import Child, ChildLimits, Program
from server.process.errors import ProcessStartError
from server.process.state import StateCell

__all__ = ["KeptProcess"]

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 5
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0
STABLE_S = 30.0
"""A process that lived for so long is started again without delay."""
MANY_DEATHS = 3
"""So many in a row are a crash loop, which the log says. It is not given up: every start has worked."""
EXIT_GRACE_S = 2.0
"""After draining, for the process to clean up and exit."""
CRASH_GRACE_S = 0.5
"""After it was lost, so that the log can tell its own exit status from our kill."""

StateT = TypeVar("StateT", bound=Enum)
SaidT = TypeVar("SaidT")
ReadyT = TypeVar("ReadyT")


class KeptProcess(ABC, Generic[StateT, SaidT, ReadyT]):
    """The life of a process over all its deaths. All methods belong to the event loop it was started in.

    What is open, and how it fails, is the subclass's; ``state`` is an enum with the four names above.
    """

    def __init__(self, program: Program[ReadyT], state: StateCell[StateT], *, limits: ChildLimits) -> None:
        self._program = program
        self._limits = limits
        self._state_cell = state
        states = type(state.value)
        self._loading, self._draining = states["LOADING"], states["DRAINING"]
        self._serving, self._dead = states["READY"], states["DEAD"]
        self._child: Child[SaidT, ReadyT] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False
        self._ready: ReadyT | None = None
        self._start_s = 0.0
        """How long the last start took."""
        self._num_restarts = 0
        self._num_quick_deaths = 0
        """In a row; each within ``STABLE_S`` of its start."""
        self._fault: str | None = None

    @property
    def state(self) -> StateT:
        return self._state_cell.value

    @property
    def ready(self) -> ReadyT | None:
        """Return what the process said when it was ready last; None before."""
        return self._ready

    @property
    def num_restarts(self) -> int:
        """Return how often it became ready again after it was lost."""
        return self._num_restarts

    @property
    def fault(self) -> str | None:
        """Return why it was last lost, in an operator's words; None if it never was."""
        return self._fault

    @property
    def is_given_up(self) -> bool:
        """Say whether it was lost and will not be started again."""
        return self._keeper is not None and self._keeper.done()

    @property
    def pid(self) -> int | None:
        """Return the process's id; None while there is no process."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Spawn the process; return when READY.

        Raises the program's start error and leaves nothing behind; the first start is not retried.
        """
        if self._keeper is not None or self._stopping:
            raise RuntimeError(f"the {self._program.name} process is started once")
        try:
            child = await self._launch()
        except BaseException:
            self._state_cell.set(self._dead)
            raise
        self._keeper = asyncio.create_task(self._keep(child), name=f"{self._program.name}-keeper")

    async def wait_state(self, state: StateT) -> None:
        await self._state_cell.wait(state)

    async def stop(self, *, grace_s: float) -> None:
        """Refuse what is new, let what is open finish for ``grace_s``, then end the process.

        May be called again while it runs, with less grace: the shortest counts. Idempotent.
        """
        self._stopping = True
        is_done = False
        try:
            if self.state is self._serving and self._child is not None:
                self._state_cell.set(self._draining)
                self._begin_draining(self._child)
            if self.state is self._draining and self._child is not None:
                ends = {self._child.lost, self._drained()}
                await asyncio.wait(ends, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
                is_done = any(end.done() for end in ends)
        finally:
            keeper, child = self._keeper, self._child
            if child is not None and is_done and self.state is self._draining:
                if child.lost.done():
                    self._fail_open(is_stopping=False)
                child.hang_up()
                await child.end(grace_s=EXIT_GRACE_S)
            elif child is not None:
                self._fail_open(is_stopping=True)
                await child.end()
            if keeper is not None:
                keeper.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(keeper)
            self._fail_open(is_stopping=True)
            self._state_cell.stop()
            self._close()

    # What the subclass has to say.

    @abstractmethod
    def _on_message(self, message: SaidT) -> None:
        """Take what the process says."""

    def _on_turn(self, began_s: float) -> None:
        """The process lives; by ``time.monotonic`` its present turn began at ``began_s``."""

    async def _prepare(self, child: Child[SaidT, ReadyT]) -> None:
        """Bring a process that says it is ready to where the last one was, before READY.

        Must return, or raise ``child.start_error``, when the child is lost.
        """

    @abstractmethod
    def _on_ready(self, ready: ReadyT) -> None:
        """Take note that a new process is READY."""

    @abstractmethod
    def _fail_open(self, *, is_stopping: bool) -> str:
        """Fail whatever is open, since the process stops or was lost; return what it was, for the log."""

    def _begin_draining(self, child: Child[SaidT, ReadyT]) -> None:
        """Tell the process that no more will come, if it wants to know."""

    @abstractmethod
    def _drained(self) -> asyncio.Future[str]:
        """Return a future that is done as soon as nothing is open; the child's ``lost`` if it sees to it."""

    @abstractmethod
    def _close(self) -> None:
        """Let go of who waits for the next process: there will be none. May come more than once."""

    async def _launch(self) -> Child[SaidT, ReadyT]:
        """Bring a new process to READY. Raises the program's start error."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._state_cell.set(self._loading)
        child: Child[SaidT, ReadyT] = Child(
            self._program, on_message=self._on_message, limits=self._limits, on_turn=self._on_turn
        )
        self._child = child
        try:
            ready = await child.start()
            try:
                await self._prepare(child)
            except BaseException:
                await child.end()
                raise
        except BaseException:
            self._child = None
            raise
        self._ready = ready
        self._start_s = loop.time() - began
        self._state_cell.set(self._serving)
        self._on_ready(ready)
        return child

    async def _keep(self, child: Child[SaidT, ReadyT]) -> None:
        """Watch over the running process, and replace it whenever it is lost."""
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while True:
            born = loop.time()
            reason = await child.lost
            if self._stopping:
                return  # ``stop`` does the rest
            self._state_cell.set(self._dead)
            # First of all: what it takes to bury the old process must not delay those who wait.
            running = self._fail_open(is_stopping=False)
            exit_text = await child.end(grace_s=CRASH_GRACE_S)
            self._child = None
            self._fault = f"{reason}; {exit_text}"
            log.error(
                "the %s process was lost: %s; requests running then: %s",
                self._program.name,
                self._fault,
                running or "none",
            )
            if loop.time() - born >= STABLE_S:
                backoff_s = FIRST_BACKOFF_S
                self._num_quick_deaths = 0
            self._num_quick_deaths += 1
            if self._num_quick_deaths >= MANY_DEATHS:
                log.critical(
                    "the %s process has died %d times, each time within %g s of its start",
                    self._program.name,
                    self._num_quick_deaths,
                    STABLE_S,
                )
            replacement, backoff_s = await self._replace(backoff_s)
            if replacement is None:
                return
            child = replacement
            self._num_restarts += 1

    async def _replace(self, backoff_s: float) -> tuple[Child[SaidT, ReadyT] | None, float]:
        """Start until it works; None after too many failures. Also return the delay for the next time."""
        name = self._program.name
        for attempt in range(1, MAX_FAILED_STARTS + 1):
            await asyncio.sleep(backoff_s)
            if self._stopping:
                return None, backoff_s
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
            try:
                return await self._launch(), backoff_s
            except ProcessStartError as error:
                self._fault = str(error)
                self._state_cell.set(self._dead)
                log.error(
                    "%s start %d of %d failed: %s: %s", name, attempt, MAX_FAILED_STARTS, error.kind, error
                )
        log.critical("the %s process does not start any more; giving it up: %s", name, self._fault)
        self._close()
        return None, backoff_s
