"""The predict process as the front end calls it; started again when it dies (``server.process.keeper``).

::

    predict -- PredictCall --> process     one future for each call, no task and no timer: deadlines are the
       ^  `--- CancelCall -->    |         process's business, and the caller's
       `-- PredictAnswer, CallFailed; when the process dies every open call gets PredictLostError

Calls are never repeated: one that kills processes must not be fed to the next, and callers that repeat it are
stopped (``server.process.quarantine``). What operators have changed is repeated (``server.predict.changes``),
before the new process is READY; models are loaded again on first use.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec

from server.predict.changes import Change, Changes
from server.predict.errors import ExpiredError, InputError, OverloadedError, PredictError, PredictLostError
from server.predict.failures import error_of
from server.predict.interface import PredictState
from server.predict.messages import (
    CallFailed,
    CancelCall,
    ClearReuse,
    DescribeModel,
    FailureKind,
    FromPredict,
    GetReuse,
    Inputs,
    ListModels,
    LoadModel,
    ModelList,
    ModelStatus,
    NumCleared,
    OneModel,
    OpDone,
    OpFailed,
    OpProgress,
    PredictAnswer,
    PredictCall,
    PredictReady,
    PredictStart,
    PredictStats,
    ReuseEvent,
    ReuseEvents,
    ReuseReport,
    SetAlias,
    Task,
    UnloadModel,
)
from server.predict.open_ops import OpenOp, OpTable
from server.predict.options import PredictOptions
from server.predict.reuse_hub import ReuseHub
from server.process.child import Child, ChildLimits, Program
from server.process.errors import FrameTooLargeError, ProcessStartError
from server.process.keeper import KeptProcess
from server.process.messages import Fault, Heartbeat
from server.process.quarantine import Quarantine, QuarantineCounts, Witness
from server.process.state import StateCell

__all__ = ["PredictProcess", "PredictStartError"]

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
BUSY_SILENCE_S = 30.0
"""Models are loaded while it serves, and importing what they need may hold the interpreter for seconds."""
MAX_HELD = 512
"""Calls that are tried one by one after a death of the process: more than go into a batch."""
MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""More than this unread by the process: it is not keeping up, refuse."""
DESCRIBED_S = 1.0
"""How long a description stands when nothing is known to have changed."""
MAX_DESCRIBED = 10_000

_NOT_SERVING = {
    PredictState.LOADING: "the models are being loaded",
    PredictState.DEAD: "the predict process is not running",
    PredictState.DRAINING: "the server is shutting down",
}
_QUARANTINED = "the predict process has died each time it computed this; it is not tried again for a while"
_COMPUTED = (None, FailureKind.INPUT, FailureKind.WRONG_TASK, FailureKind.COMPUTE, FailureKind.INTERNAL)

PredictChild = Child[FromPredict, PredictReady]
_OpenCall = tuple[asyncio.Future[PredictAnswer | CallFailed], PredictCall]
_ResultT = TypeVar("_ResultT")


class PredictStartError(ProcessStartError):
    """The predict process did not become ready."""


class PredictProcess(KeptProcess[PredictState, FromPredict, PredictReady]):
    """Implements ``interface.PredictBackend``. All methods belong to the event loop it was started in."""

    def __init__(
        self,
        options: PredictOptions,
        *,
        limits: ChildLimits | None = None,
        debug: bool = False,
        log_format: str = "text",
        log_level: str = "info",
        quarantine_s: float = 600.0,
        module: str = "server.predict_main",
    ) -> None:
        """``module`` is run with ``--fd N`` and calls ``server.predict.serve.serve``; tests bring their own.

        ``debug``: the process logs more, and says tracebacks with its errors. ``log_format``, ``log_level``:
        as for ``configure_logs``. ``quarantine_s``: how long a call is refused that has killed the process.
        """
        limits = limits or ChildLimits(busy_silence_s=BUSY_SILENCE_S)
        program = Program(
            name="predict",
            module=module,
            start=PredictStart(
                options,
                heartbeat_s=limits.heartbeat_s,
                debug=debug,
                log_format=log_format,
                log_level=log_level,
            ),
            messages=FromPredict | Heartbeat | Fault,
            ready_type=PredictReady,
            start_error=PredictStartError,
        )
        state = StateCell(PredictState.LOADING, last=PredictState.DEAD, name="predict")
        super().__init__(program, state, limits=limits)
        self._calls: dict[int, _OpenCall] = {}
        self._quarantine: Quarantine[PredictCall] = Quarantine(
            "predict",
            encode=_encode,
            send=self._send_call,
            refuse=self._refuse_call,
            keep_s=quarantine_s,
            max_held=MAX_HELD,
        )
        self._call_ids = itertools.count(1)
        self._ops = OpTable(self._on_op_done)
        self._described: dict[tuple[str, str], tuple[OpenOp, float]] = {}
        self._changes = Changes()
        self._hub = ReuseHub()
        self._stats: PredictStats | None = None
        self._idle: asyncio.Future[str] | None = None
        """While draining: done when no call is open."""

    @property
    def stats(self) -> PredictStats | None:
        return self._stats

    @property
    def num_open_calls(self) -> int:
        return len(self._calls)

    @property
    def quarantine(self) -> QuarantineCounts:
        """Return how many calls are suspected of having killed the process, and what came of it."""
        return self._quarantine.counts

    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        task: Task | None = None,
        truncate: bool = False,
        reuse: bool = True,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> PredictAnswer:
        child = self._serving_child()
        if deadline_s is not None and deadline_s <= 0:
            raise ExpiredError("the deadline passed")
        if child.num_unsent_bytes > MAX_UNSENT_BYTES:
            raise OverloadedError("too much waits", retry_after_s=RETRY_AFTER_S)
        call_id = next(self._call_ids)
        call = PredictCall(call_id, model, version, inputs, task, truncate, reuse, deadline_s, tenant)
        answer: asyncio.Future[PredictAnswer | CallFailed] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer, call
        if self._quarantine.is_active:
            self._quarantine.submit(call_id, call, deadline_s)
        else:
            self._send_call(call_id, call, deadline_s)
        try:
            said = await answer
        except BaseException:
            if self._forget_call(call_id) is not None:
                self._quarantine.leave(call_id, call)
                child.send(CancelCall(call_id))
            raise
        if isinstance(said, PredictAnswer):
            return said
        raise error_of(said)

    async def models(self) -> ModelList:
        return await self._ask(ListModels(), ModelList)

    async def describe(self, model: str, version: str = "") -> ModelStatus:
        child = self._serving_child()
        key = (model, version)
        now_s = asyncio.get_running_loop().time()
        found = self._described.get(key)
        if found is not None and now_s < found[1]:
            opened = found[0]
        else:
            opened = self._open(child, DescribeModel(model, version))
            if len(self._described) >= MAX_DESCRIBED:
                self._described.clear()
            self._described[key] = (opened, now_s + DESCRIBED_S)
        return (await _result(opened, OneModel)).model

    async def load(self, op: LoadModel) -> AsyncGenerator[OpProgress | ModelStatus]:
        opened = self._open(self._serving_child(), op)
        async with aclosing(opened.progress()) as steps:
            async for step in steps:
                yield step
        yield (await _result(opened, OneModel)).model

    async def unload(self, op: UnloadModel) -> ModelList:
        return await self._ask(op, ModelList)

    async def set_alias(self, op: SetAlias) -> ModelList:
        return await self._ask(op, ModelList)

    async def reuse(self, op: GetReuse) -> ReuseReport:
        return await self._ask(op, ReuseReport)

    async def clear_reuse(self, op: ClearReuse) -> int:
        return (await self._ask(op, NumCleared)).count

    def watch_reuse(self) -> AsyncGenerator[ReuseEvent]:
        return self._hub.watch()

    async def _ask(self, op: Any, result_type: type[_ResultT]) -> _ResultT:
        return await _result(self._open(self._serving_child(), op), result_type)

    def _serving_child(self) -> PredictChild:
        state = self.state
        if state is not PredictState.READY or self._child is None:
            raise PredictLostError(_NOT_SERVING[state], retry_after_s=self._retry_after_s())
        return self._child

    def _open(self, child: PredictChild, op: Any) -> OpenOp:
        try:
            return self._ops.ask(child.send, op)
        except FrameTooLargeError as error:
            raise InputError("the request is too large") from error

    def _retry_after_s(self) -> float:
        return max(RETRY_AFTER_S, self._start_s)

    # What the process says.

    def _on_message(self, message: FromPredict) -> None:
        match message:
            case PredictAnswer() | CallFailed():
                self._end_call(message.call_id, message)
            case OpDone() | OpFailed() | OpProgress():
                self._ops.dispatch(message)
            case PredictStats():
                self._stats = message
            case ReuseEvents():
                self._hub.dispatch(message.events)
            case PredictReady():
                pass

    def _on_turn(self, began_s: float) -> None:
        self._quarantine.turn_began(began_s)

    def _send_call(self, call_id: int, call: PredictCall, left_s: float | None) -> None:
        if left_s is not call.deadline_s:  # it had to wait
            call = msgspec.structs.replace(call, deadline_s=left_s)
        assert self._child is not None
        try:
            self._child.send(call)
        except FrameTooLargeError:
            self._end_call(call_id, CallFailed(call_id, FailureKind.INPUT, "the request is too large"))

    def _refuse_call(self, call_id: int, _call: PredictCall) -> None:
        self._end_call(call_id, CallFailed(call_id, FailureKind.QUARANTINED, _QUARANTINED))

    def _end_call(self, call_id: int, said: PredictAnswer | CallFailed) -> None:
        """End a call, if it is open, with what is said of it."""
        opened = self._forget_call(call_id)
        if opened is None:
            return
        answer, call = opened
        kind = said.kind if type(said) is CallFailed else None
        if kind is FailureKind.EXPIRED:
            self._quarantine.leave(call_id, call)  # it may be in a batch all the same
        elif self._quarantine.is_active:
            end = self._quarantine.acquit if kind in _COMPUTED else self._quarantine.release
            end(call_id)
        if not answer.done():
            answer.set_result(said)

    def _forget_call(self, call_id: int) -> _OpenCall | None:
        opened = self._calls.pop(call_id, None)
        if self._idle is not None and not self._calls and not self._idle.done():
            self._idle.set_result("it has drained")
        return opened

    def _on_op_done(self, op: Any, answer: OpDone | OpFailed) -> None:
        if isinstance(op, DescribeModel) and isinstance(answer, OpFailed):
            # Failures are not kept, whoever still listens: names that are none come without end.
            self._described.pop((op.model, op.version), None)
        if isinstance(op, LoadModel | UnloadModel | SetAlias):
            self._described.clear()
            # While it is LOADING they are only repeated.
            if isinstance(answer, OpDone) and self.state is not PredictState.LOADING:
                self._changes.note(op, answer.result)

    # The life of the process.

    async def _prepare(self, child: PredictChild) -> None:
        """Repeat what operators have changed. One change may need another: again, while it gets on."""

        def fail_open(_lost: asyncio.Future[str]) -> None:
            self._fail_open(is_stopping=self._stopping)

        # Nobody else looks after this process yet.
        child.lost.add_done_callback(fail_open)
        try:
            await self._repeat(self._changes.to_repeat(), child)
        finally:
            child.lost.remove_done_callback(fail_open)

    async def _repeat(self, left: list[Change], child: PredictChild) -> None:
        while left:
            failed: list[tuple[Change, OpFailed]] = []
            opened = [self._open(child, change) for change in left]
            for change, one in zip(left, opened, strict=True):
                said = await asyncio.shield(one.answer)
                if isinstance(said, OpFailed):
                    failed.append((change, said))
            if child.lost.done():
                raise child.start_error(f"the predict process ended while starting: {child.lost.result()}")
            if len(failed) == len(left):
                for change, said in failed:
                    log.warning("of model %s a change is not repeated: %s", change.model, said.reason)
                    self._changes.forget(change)
                return
            left = [change for change, _said in failed]

    def _on_ready(self, ready: PredictReady) -> None:
        pass

    def _fail_open(self, *, is_stopping: bool) -> str:
        reason = _NOT_SERVING[PredictState.DRAINING] if is_stopping else "the predict process was lost"
        retry_after_s = None if is_stopping else self._retry_after_s()
        num_calls = len(self._calls)
        if self._stopping:
            self._quarantine.close()
        else:
            self._quarantine.died(Witness(call_id, call) for call_id, (_, call) in self._calls.items())
        for call_id in list(self._calls):
            failed = CallFailed(call_id, FailureKind.LOST, reason, retry_after_s=retry_after_s)
            self._end_call(call_id, failed)
        self._quarantine.judge()
        self._ops.fail_all(reason, retry_after_s=retry_after_s)
        self._described.clear()
        return f"{num_calls} calls" if num_calls else ""

    def _begin_draining(self, child: PredictChild) -> None:
        self._idle = asyncio.get_running_loop().create_future()
        if not self._calls:
            self._idle.set_result("nothing was open")

    def _drained(self) -> asyncio.Future[str]:
        assert self._idle is not None
        return self._idle

    def _close(self) -> None:
        self._hub.close()


def _encode(call: PredictCall) -> bytes:
    """Return what makes two calls the same."""
    return msgspec.msgpack.encode(msgspec.structs.replace(call, call_id=0, deadline_s=None))


async def _result(opened: OpenOp, result_type: type[_ResultT]) -> _ResultT:
    said = opened.answer.result() if opened.answer.done() else await asyncio.shield(opened.answer)
    if isinstance(said, OpFailed):
        raise error_of(said)
    if not isinstance(said.result, result_type):
        names = type(opened.op).__name__, type(said.result).__name__
        log.error("the predict process answers %s with %s", *names)
        raise PredictError("the server failed; its log says why")
    return said.result
