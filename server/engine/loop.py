"""Drive the scheduler and the worker: the engine's thread.

One turn, in time::

    receive ->  plan  -> publish ->  compute  ->  apply  -> publish
    inbox       |        admitted,   worker       |         tokens,
    empties     |        refused                  |         finished
    |           `- expired requests end here      `- blocks are ready or free again
    `- operations on the cache, and a piece of long ones; their answers leave with either publish

Each is a call of its own and keeps nothing on the stack, so that a driver which overlaps planning
with computing is a second arrangement of them. Admissions and refusals leave before the step is
computed: nobody waits through a stranger's long prefill to be turned away.
"""

from __future__ import annotations

import gc
import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvcore.clock import Clock
from server.engine.admin_desk import AdminDesk, ShieldedDesk
from server.engine.admin_messages import (
    AdminCall,
    AdminErrorKind,
    AdminRefusal,
    AdminReply,
    CancelAdmin,
    Watch,
)
from server.engine.errors import EngineBrokenError
from server.engine.messages import (
    Cancel,
    Drain,
    EngineReady,
    FailureKind,
    FromEngine,
    Outputs,
    Submit,
    ToEngine,
)
from server.engine.plan import StepPlan, StepResult, StepRunner
from server.engine.scheduler import Scheduler
from server.process.errors import FrameTooLargeError

__all__ = ["EngineLoop", "EngineParts", "Inbox", "Outbox", "Stop"]

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3
"""Steps that may fail one after the other before the worker counts as broken."""
STATS_INTERVAL_S = 0.25
SETTLE_S = 0.05
"""Quiet for so long counts as idle."""
RETRY_PLAN_S = 0.002
"""Work exists but none of it can be computed now: look again after so long."""
BUSY_DESK_PAUSE_S = 0.0002
"""Between two pieces of a long operation while no request runs: lets go of the interpreter, which a tier's
threads need."""
CHECK_INTERVAL_S = 10.0
CHECK_SHARE = 0.01
"""Integrity checks may take this share of the time."""
IDLE_GARBAGE = 10_000
"""Collect when idle once so many more containers are alive than after the last collection."""
BUSY_GARBAGE = 5_000_000
"""Collect even while busy: something keeps making cycles."""

FAILURE_REASON = "the model failed to compute a step with this request"
TOO_LARGE = AdminRefusal(AdminErrorKind.FAILED, "the answer is too large")


class Stop:
    """Put into the inbox to end the loop after the present turn, whatever still runs."""


Inbox = queue.SimpleQueue[ToEngine | Stop]


class Outbox(Protocol):
    """Where the loop's messages go."""

    def send(self, message: FromEngine) -> None:
        """Send one message; called on the engine's thread. Whatever it raises ends the loop."""
        ...


def _nothing() -> None:
    """Close nothing."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of, once the model is loaded."""

    scheduler: Scheduler
    runner: StepRunner
    ready: EngineReady
    clock: Clock
    desk: AdminDesk | None = None
    """Carries out operations on the cache; None: they are refused."""
    close: Callable[[], None] = _nothing
    """Ends what runs beside the engine's thread, when the loop is over."""


class EngineLoop:
    """The synchronous driver. All methods belong to one thread; others may read the public attributes."""

    def __init__(self, parts: EngineParts, inbox: Inbox, outbox: Outbox) -> None:
        self._scheduler = parts.scheduler
        self._runner = parts.runner
        self._clock = parts.clock
        self._desk = ShieldedDesk(parts.desk)
        self._inbox = inbox
        self._outbox = outbox
        self._draining = False
        self._stopped = False
        self._has_plan = False
        self._chores_due = True
        self._failures_in_a_row = 0
        self._next_stats = self._clock.now()
        self._next_check = self._clock.now()
        self.turn_started: float | None = None
        """When the present turn began, by the loop's clock; None while it waits for messages."""
        self.num_failed_steps = 0

    def run(self) -> None:
        """Serve until drained or stopped.

        Raises ``EngineBrokenError`` after repeated failures, and lets pass whatever the scheduler
        raises (``IntegrityError`` among it): its state cannot be trusted any more.
        """
        while self.receive():
            self.step()

    def step(self) -> None:
        """Compute one step, if there is anything to compute."""
        clock = self._clock
        self._desk.advance()
        started = clock.now()
        plan = self.plan()
        planned = clock.now()
        self.publish()
        if plan is None:
            return
        result = self.compute(plan)
        if result is not None:
            self.apply(plan, result)
            self._scheduler.counters.add_times(plan_s=planned - started, step_s=clock.now() - started)
        self.publish()

    def receive(self) -> bool:
        """Take every message that has arrived; wait for one only while there is nothing to compute.

        Return False when the loop has to end.
        """
        inbox = self._inbox
        if self._desk.is_busy:
            if inbox.empty() and not self._has_plan:
                self._wait_at_most(BUSY_DESK_PAUSE_S)
        elif not self._scheduler.has_work:
            if self._draining and inbox.empty():
                self._send_stats()
                return False
            if inbox.empty():
                self._wait()
        elif not self._has_plan and inbox.empty():
            self._wait_at_most(RETRY_PLAN_S)
        self.turn_started = self._clock.now()
        while not self._stopped and not inbox.empty():
            self._accept(inbox.get_nowait())
        return not self._stopped

    def plan(self) -> StepPlan | None:
        """Decide what the next step computes."""
        plan = self._scheduler.plan()
        self._has_plan = plan is not None
        return plan

    def compute(self, plan: StepPlan) -> StepResult | None:
        """Let the worker compute ``plan``. None if it failed: then the step has been rolled back.

        Raises ``EngineBrokenError`` once too many have failed in a row; their requests have been told.
        """
        try:
            result = self._runner.run(plan)
        except Exception as error:
            self.num_failed_steps += 1
            self._failures_in_a_row += 1
            log.exception("step %d failed: %d sequences", plan.step_id, len(plan.sequences))
            self._scheduler.abort(plan, FAILURE_REASON, kind=_kind_of(error))
            self._chores_due = True
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                self.publish()
                name = type(error).__name__
                raise EngineBrokenError(
                    f"{self._failures_in_a_row} steps failed in a row, the last one with {name}"
                ) from error
            return None
        self._failures_in_a_row = 0
        return result

    def apply(self, plan: StepPlan, result: StepResult) -> None:
        """Enter what the step produced."""
        self._scheduler.apply(plan, result)
        self._chores_due = True

    def publish(self) -> None:
        """Send what is new of the requests, in one message, and of the cache. Statistics now and then."""
        events = self._scheduler.drain_events()
        if events:
            self._outbox.send(Outputs(events))
            self._chores_due = True
        for message in self._desk.drain():
            self._chores_due = True
            try:
                self._outbox.send(message)
            except FrameTooLargeError:
                log.error("%s is too large for the link", type(message).__name__)
                if isinstance(message, AdminReply):
                    self._outbox.send(AdminReply(message.key, TOO_LARGE))
        if self._chores_due and self._clock.now() >= self._next_stats:
            self._send_stats()

    def _accept(self, message: ToEngine | Stop) -> None:
        match message:
            case Submit():
                self._scheduler.submit(message)
            case Cancel():
                self._scheduler.cancel(message)
            case AdminCall() | CancelAdmin() | Watch():
                self._desk.accept(message)
            case Drain():
                self._draining = True
                self._scheduler.refuse_new()
            case Stop():
                self._stopped = True

    def _wait(self) -> None:
        """Block until a message arrives; once it is quiet, do what is better done idle."""
        if self._chores_due:
            if self._wait_at_most(SETTLE_S):
                return
            self._do_chores()
            self._chores_due = False
        self._wait_at_most(self._scheduler.idle_wait_s)

    def _wait_at_most(self, timeout_s: float | None) -> bool:
        """Block for the next message and accept it. False: none came in time."""
        self.turn_started = None
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return False
        self.turn_started = self._clock.now()
        self._accept(message)
        return True

    def _do_chores(self) -> None:
        self.turn_started = now = self._clock.now()
        if now >= self._next_check or self._desk.has_failed:
            self._desk.has_failed = False
            self._scheduler.check_integrity()
            after = self._clock.now()
            self._next_check = after + max(CHECK_INTERVAL_S, (after - now) / CHECK_SHARE)
        self._collect_garbage(IDLE_GARBAGE)
        self._send_stats()

    def _collect_garbage(self, threshold: int) -> None:
        """Do the collector's work where it has been switched off (see ``server.engine.serve``)."""
        if not gc.isenabled() and gc.get_count()[0] > threshold:
            gc.collect()

    def _send_stats(self) -> None:
        self._collect_garbage(BUSY_GARBAGE)
        self._outbox.send(self._scheduler.stats())
        self._next_stats = self._clock.now() + STATS_INTERVAL_S


def _kind_of(error: Exception) -> FailureKind:
    """Say what a failed step means for its requests. torch's own error is known by name: no torch in here."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FailureKind.OUT_OF_MEMORY
    return FailureKind.INTERNAL
