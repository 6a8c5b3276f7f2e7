"""What the front end remembers of models that callers ask about."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from server.predict.errors import UnknownModelError
from server.predict.interface import PredictState
from server.predict.messages import FailureKind, OpFailed
from server.predict.options import PredictOptions
from server.predict.process import PredictProcess


class Wire:
    """Stands where the process would be, and keeps what is sent to it."""

    num_unsent_bytes = 0

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


async def turn() -> None:
    """Let tasks run."""
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.mark.parametrize("gives_up", [True, False])
async def test_name_that_nobody_serves_is_not_remembered(gives_up: bool) -> None:
    """Whoever hung up before the answer used to leave a name of megabytes behind, ten thousand times."""
    process = PredictProcess(PredictOptions())
    wire = Wire()
    process._child = wire  # type: ignore[assignment]
    process._state_cell.set(PredictState.READY)
    asking = asyncio.create_task(process.describe("x" * 1000))
    await turn()
    if gives_up:
        asking.cancel()
        await turn()
    [asked] = wire.sent
    process._on_message(OpFailed(asked.op_id, FailureKind.UNKNOWN_MODEL, "no such model"))
    with contextlib.suppress(asyncio.CancelledError, UnknownModelError):
        await asking
    assert process._described == {}
