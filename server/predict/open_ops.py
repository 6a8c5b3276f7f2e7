"""Operations on models that the predict process has been asked for and has not answered yet."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from server.predict.messages import FailureKind, OpDone, OpFailed, OpProgress, PredictOp

__all__ = ["OpenOp", "OpTable"]


class OpenOp:
    """One of them: the latest progress, then the answer, for any number of listeners, or none."""

    __slots__ = ("_latest", "_news", "answer", "op")

    def __init__(self, op: Any) -> None:
        self.op = op
        self.answer: asyncio.Future[OpDone | OpFailed] = asyncio.get_running_loop().create_future()
        """Never cancelled, and never an exception: a loss is an ``OpFailed``, too. Wait for it shielded."""
        self._latest: OpProgress | None = None
        self._news = asyncio.Event()

    async def progress(self) -> AsyncGenerator[OpProgress]:
        """Yield how it goes until the answer is there; of what comes too fast the latest. One listener."""
        while not self.answer.done():
            await self._news.wait()
            self._news.clear()
            latest, self._latest = self._latest, None
            if latest is not None:
                yield latest

    def push(self, progress: OpProgress) -> None:
        self._latest = progress
        self._news.set()

    def end(self, answer: OpDone | OpFailed) -> None:
        self.answer.set_result(answer)
        self._news.set()


class OpTable:
    """The open ones by id. They stay when their listeners go: what they change must not be missed."""

    def __init__(self, on_done: Callable[[Any, OpDone | OpFailed], None]) -> None:
        """``on_done`` is called with every operation and its answer, before those who wait are woken."""
        self._on_done = on_done
        self._ops: dict[int, OpenOp] = {}
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._ops)

    def ask(self, send: Callable[[msgspec.Struct], None], op: Any) -> OpenOp:
        """Send an operation. Raises what ``send`` raises."""
        op_id = next(self._ids)
        send(PredictOp(op_id, op))
        opened = self._ops[op_id] = OpenOp(op)
        return opened

    def dispatch(self, message: OpDone | OpFailed | OpProgress) -> None:
        """Hand over what the process says."""
        if isinstance(message, OpProgress):
            if (running := self._ops.get(message.op_id)) is not None:
                running.push(message)
            return
        ended = self._ops.pop(message.op_id, None)
        if ended is not None:
            self._on_done(ended.op, message)
            ended.end(message)

    def fail_all(self, reason: str, *, retry_after_s: float | None) -> None:
        """Nobody will answer any more."""
        while self._ops:
            op_id = next(iter(self._ops))
            self.dispatch(OpFailed(op_id, FailureKind.LOST, reason, retry_after_s=retry_after_s))
