"""Where requests and operations are handed in: turned away at once, or given a stream and sent to the engine.

The same for every kind of engine. What can be refused without asking the engine is refused here,
because the engine answers between steps, and a step may be long.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from server.engine.admin_client import AdminClient
from server.engine.errors import EngineUnavailableError
from server.engine.interface import EngineState
from server.engine.messages import (
    Cancel,
    FailureKind,
    Finished,
    GenerateSpec,
    RequestTimings,
    RequestUsage,
    Submit,
    ToEngine,
)
from server.engine.streams import EventStream, StreamTable
from server.process.errors import FrameTooLargeError
from server.process.quarantine import Quarantine
from server.process.state import StateCell

__all__ = ["Desk"]

RETRY_AFTER_S = 1.0
MAX_HELD = 32
"""Requests that are tried one by one after a death of the engine; a generation can take its time."""

_NOT_SERVING = {
    EngineState.LOADING: (FailureKind.ENGINE_LOST, "the model is being loaded"),
    EngineState.DEAD: (FailureKind.ENGINE_LOST, "the engine is not running"),
    EngineState.DRAINING: (FailureKind.DRAINING, "the server is shutting down"),
    EngineState.UNLOADED: (FailureKind.NOT_LOADED, "the model is not loaded"),
}


class Desk:
    """State and open streams of one engine. Event loop's thread only; nothing blocks."""

    def __init__(
        self, send: Callable[[ToEngine], None], *, max_waiting: int | None = None, quarantine_s: float = 0.0
    ) -> None:
        """``send`` reaches the engine, and silently drops what an engine that is gone cannot get.

        ``max_waiting`` samples may be without admission; None leaves it to the engine's own limit.
        ``quarantine_s``: for an engine that may die without taking this process along; how long a request
        is refused that has killed it.
        """
        self._send = send
        self._max_waiting = max_waiting
        self.quarantine: Quarantine[GenerateSpec] = Quarantine(
            "engine",
            encode=_encode,
            send=self._submit,
            refuse=self._refuse_quarantined,
            keep_s=quarantine_s,
            max_held=MAX_HELD,
        )
        self.state = StateCell(EngineState.LOADING, last=EngineState.DEAD, name="engine")
        self.streams = StreamTable(self._cancel, quarantine=self.quarantine)
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
        stream = self.streams.open(spec.num_samples, spec)
        if self.quarantine.is_active:
            self.quarantine.submit(stream.key, spec, deadline_s)
        else:
            self._submit(stream.key, spec, deadline_s)
        return stream

    def fail_all(self, kind: FailureKind, reason: str) -> list[int]:
        """End every open request and operation; return the keys of the requests that had been admitted."""
        self.admin.fail_all(kind, reason)
        return self.streams.fail_all(kind, reason)

    def lose_all(self) -> list[int]:
        """As ``fail_all``, of an engine that has died: what it had is suspected."""
        self.quarantine.died(self.streams.witnesses())
        running = self.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")
        self.quarantine.judge()
        return running

    def note_turn(self, began_s: float) -> None:
        """The engine lives, and began its present turn at ``began_s`` by ``time.monotonic``."""
        quarantine = self.quarantine
        if quarantine.probationer is not None:
            quarantine.advance(quarantine.probationer, self.streams.num_tokens(quarantine.probationer))
        quarantine.turn_began(began_s)

    def _submit(self, key: int, spec: GenerateSpec, deadline_s: float | None) -> None:
        try:
            self._send(Submit(key, spec, deadline_s))
        except FrameTooLargeError:
            self.streams.withdraw(key, FailureKind.TOO_LARGE, "the request is too large")

    def _cancel(self, message: Cancel) -> None:
        if not self.quarantine.is_waiting(message.key):
            self._send(message)
        elif message.sample_index is None:
            # The engine has not got it, and must not.
            spec = self.quarantine.withdraw(message.key)
            num_tokens = len(spec.token_ids)
            usage = RequestUsage(num_tokens, 0, 0, 0, num_tokens, 0)
            self.streams.dispatch([Finished(message.key, usage, RequestTimings(0.0, 0.0, 0.0, 0.0))])

    def _refuse_quarantined(self, key: int, _spec: GenerateSpec) -> None:
        self.streams.withdraw(key, FailureKind.QUARANTINED, "the engine has died of this request")

    def _check_available(self) -> None:
        state = self.state.value
        if state is not EngineState.READY:
            kind, reason = _NOT_SERVING[state]
            raise EngineUnavailableError(kind, reason, retry_after_s=self.retry_after_s)

    def refuse_full(self) -> EventStream:
        """Return a stream that says the queue is full."""
        reason = f"{self.streams.num_waiting} requests are waiting"
        return self.streams.refuse(FailureKind.QUEUE_FULL, reason, retry_after_s=RETRY_AFTER_S)


def _encode(spec: GenerateSpec) -> bytes:
    """Return what makes two requests the same: a seed that was not given is drawn anew each time."""
    return msgspec.msgpack.encode(
        msgspec.structs.replace(spec, seed=0, priority=0, lifetime_s=None, report_progress=False)
    )
