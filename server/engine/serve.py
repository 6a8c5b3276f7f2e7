"""Be an engine process: the loop, its inbox and its outbox over the link. Knows no model; ``build`` does."""

from __future__ import annotations

import gc
import queue
from collections.abc import Callable
from typing import Any

from server.engine.control import Start
from server.engine.loop import EngineLoop, EngineParts, Inbox, Stop
from server.engine.messages import EngineReady, ToEngine
from server.engine.options import EngineOptions
from server.process import serve as process
from server.process.link import ChildLink

__all__ = ["serve"]


def serve(fd: int, build: Callable[[EngineOptions], EngineParts]) -> int:
    """Serve the front end at the other end of ``fd`` until it drains or goes; return the exit status.

    Call it from the main thread of a process of its own.
    """
    return process.serve(fd, _EngineService(build), name="engine", start_type=Start, message_type=ToEngine)


class _EngineService(process.Service[Start, ToEngine]):
    def __init__(self, build: Callable[[EngineOptions], EngineParts]) -> None:
        self._build = build
        self._inbox: Inbox = queue.SimpleQueue()
        self._parts: EngineParts | None = None
        self._loop: EngineLoop | None = None

    def build(self, start: Start, link: ChildLink[Any]) -> EngineReady:
        parts = self._build(start.options)
        # The model's objects stay: keep the collector from walking them ever after. Later ones are freed
        # by their counts (a test holds ended requests to it); the loop collects the rest while idle,
        # not in the middle of a step, where it costs up to 200 ms with ten thousand waiting.
        gc.collect()
        gc.freeze()
        gc.disable()
        self._parts = parts
        self._loop = EngineLoop(parts, self._inbox, link)
        return parts.ready

    def handle(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def run(self) -> None:
        assert self._loop is not None
        self._loop.run()

    def front_end_is_gone(self) -> None:
        self._inbox.put(Stop())

    def turn_s(self) -> float:
        started = None if self._loop is None else self._loop.turn_started
        if started is None or self._parts is None:
            return 0.0
        return max(0.0, self._parts.clock.now() - started)

    def num_failed(self) -> int:
        return 0 if self._loop is None else self._loop.num_failed_steps

    def close(self) -> None:
        assert self._parts is not None
        self._parts.close()
