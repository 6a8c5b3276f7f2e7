"""Where requests and operations are handed in: turned away at once, or given a stream and sent to the engine.

The same for every kind of engine. What can be refused without asking the engine is refused here,
because the engine answers between steps, and a step may be long.
"""

from __future__ import annotations

from collections.abc import Callable

from server.engine.admin_client import AdminClient
from server.engine.errors import EngineUnavailableError
from server.engine.interface import EngineState
from server.engine.messages import FailureKind, GenerateSpec, Submit, ToEngine
from server.engine.streams import EventStream, StreamTable
from server.process.errors import FrameTooLargeError
from server.process.state import StateCell

__all__ = ["Desk"]

RETRY_AFTER_S = 1.0

_NOT_SERVING = {
    EngineState.LOADING: (FailureKind.ENGINE_LOST, "the model is being loaded"),
    EngineState.DEAD: (FailureKind.ENGINE_LOST, "the engine is not running"),
    EngineState.DRAINING: (FailureKind.DRAINING, "the server is shutting down"),
    EngineState.UNLOADED: (FailureKind.NOT_LOADED, "the model is not loaded"),
}


class Desk:
    """State and open streams of one engine. Event loop's thread only; nothing blocks."""

    def __init__(self, send: Callable[[ToEngine], None], *, max_waiting: int | None = None) -> None:
        """``send`` reaches the engine, and silently drops what an engine that is gone cannot get.

        ``max_waiting`` samples may be without admission; None leaves it to the engine's own limit.
        """
        self._send = send
        self._max_waiting = max_waiting
        self.state = StateCell(EngineState.LOADING, last=EngineState.DEAD, name="engine")
        self.streams = StreamTable(send)
        self.admin = AdminClient(send, self._check_available)
        self.retry_after_s = RETRY_AFTER_S
        """When to come back after a refusal for want of an engine."""

    def submit(self, spec: GenerateSpec, deadline_s: float | None) -> EventStream:
        """Return the request's stream; a refusal is its first event."""
        state = self.state.value
        if state is not EngineState.READY:
            kind, reason = _NOT_SERVING[state]
            return self.streams.refuse(kind, reason, retry_after_s=self.retry_after_s)
        if deadline_s is not None and deadline_s <= 0:
            return self.streams.refuse(FailureKind.DEADLINE, "the deadline passed")
        if self._max_waiting is not None and self.streams.num_waiting + spec.num_samples > self._max_waiting:
            return self.refuse_full()
        stream = self.streams.open(spec.num_samples)
        try:
            self._send(Submit(stream.key, spec, deadline_s))
        except FrameTooLargeError:
            self.streams.withdraw(stream.key, FailureKind.TOO_LARGE, "the request is too large")
        return stream

    def fail_all(self, kind: FailureKind, reason: str) -> list[int]:
        """End every open request and operation; return the keys of the requests that had been admitted."""
        self.admin.fail_all(kind, reason)
        return self.streams.fail_all(kind, reason)

    def _check_available(self) -> None:
        state = self.state.value
        if state is not EngineState.READY:
            kind, reason = _NOT_SERVING[state]
            raise EngineUnavailableError(kind, reason, retry_after_s=self.retry_after_s)

    def refuse_full(self) -> EventStream:
        """Return a stream that says the queue is full."""
        reason = f"{self.streams.num_waiting} requests are waiting"
        return self.streams.refuse(FailureKind.QUEUE_FULL, reason, retry_after_s=RETRY_AFTER_S)
