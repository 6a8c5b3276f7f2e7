"""Be a predict process: a host behind the link. Knows neither models nor batches; ``build`` does.

The host's threads are its own. The reader thread hands it messages, the heartbeat thread asks since when it
is in a batch, and whatever it says leaves from the thread that says it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvcore.clock import Clock, MonotonicClock
from server.predict.messages import (
    CallFailed,
    FailureKind,
    FromPredict,
    OpDone,
    OpFailed,
    PredictAnswer,
    PredictReady,
    PredictStart,
    ToPredict,
)
from server.predict.options import PredictOptions
from server.process import serve as process
from server.process.errors import FrameTooLargeError, LinkClosedError, MalformedFrameError
from server.process.link import ChildLink

__all__ = ["Host", "Outbox", "serve"]

log = logging.getLogger(__name__)


class Host(Protocol):
    """What ``server.predict.host.PredictHost`` is."""

    @property
    def turn_started(self) -> float | None:
        """Return since when the compute thread is in one batch, by the host's clock; None: idle."""
        ...

    def start(self) -> PredictReady: ...

    def handle(self, message: ToPredict) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None: ...


class Outbox:
    """Takes what the host says, from any thread; drops it once the front end is gone, for all ends then."""

    def __init__(self, link: ChildLink[Any]) -> None:
        self._link = link

    def send(self, message: FromPredict) -> None:
        """Send one message. Of what is too large for the link the front end hears just that."""
        try:
            try:
                self._link.send(message)
            except FrameTooLargeError:
                log.error("a %s is too large for the link", type(message).__name__)
                if (instead := _instead_of(message)) is not None:
                    self._link.send(instead)
        except LinkClosedError:
            log.debug("nobody is left to be told")

    def send_all(self, messages: Sequence[FromPredict]) -> None:
        """Send several with one system call, in order: the answers of a batch."""
        try:
            self._link.send_all(messages)
        except FrameTooLargeError:
            for message in messages:
                self.send(message)
        except LinkClosedError:
            log.debug("nobody is left to be told")


Build = Callable[[PredictOptions, Clock, Outbox], Host]


def serve(fd: int, build: Build) -> int:
    """Serve the front end at the other end of ``fd`` until it hangs up; return the exit status.

    Call it from the main thread of a process of its own. ``build`` makes the host and starts nothing.
    """
    service = _PredictService(build, MonotonicClock())
    return process.serve(fd, service, name="predict", start_type=PredictStart, message_type=ToPredict)


class _PredictService(process.Service[PredictStart, ToPredict]):
    def __init__(self, build: Build, clock: Clock) -> None:
        self._build = build
        self._clock = clock
        self._host: Host | None = None
        self._is_over = threading.Event()

    def build(self, start: PredictStart, link: ChildLink[Any]) -> PredictReady:
        host = self._build(start.options, self._clock, Outbox(link))
        ready = host.start()
        self._host = host
        return ready

    def handle(self, message: ToPredict) -> None:
        if self._host is None:
            raise MalformedFrameError("a call came before the process was ready")
        self._host.handle(message)

    def settle(self) -> None:
        if self._host is not None:
            self._host.settle()

    def run(self) -> None:
        self._is_over.wait()

    def front_end_is_gone(self) -> None:
        self._is_over.set()

    def turn_s(self) -> float:
        started = None if self._host is None else self._host.turn_started
        return 0.0 if started is None else max(0.0, self._clock.now() - started)

    def close(self) -> None:
        assert self._host is not None
        self._host.close()


def _instead_of(message: FromPredict) -> FromPredict | None:
    reason = "the answer is too large; ask for less at once"
    match message:
        case PredictAnswer():
            return CallFailed(message.call_id, FailureKind.INPUT, reason)
        case OpDone():
            return OpFailed(message.op_id, FailureKind.INPUT, reason)
    return None
