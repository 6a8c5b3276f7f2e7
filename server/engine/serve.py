"""Be an engine process: what runs on the far side of the link. Knows no model; ``build`` does.

Threads::

    main        builds the engine, then EngineLoop.run
    reader      link -> inbox; when the link ends, so does the process
    heartbeat   says twice a second that the process lives, and since when the loop is in its turn

The process never outlives the front end: the link ends with it, and so does the parent's pid. Ctrl-C
and SIGTERM are left to the front end, which drains first.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from server.engine.control import Fault, Heartbeat, Start
from server.engine.errors import LinkClosedError, LinkError, MalformedFrameError
from server.engine.link import ChildLink
from server.engine.loop import EngineLoop, EngineParts, Inbox, Stop
from server.engine.messages import ToEngine
from server.engine.options import EngineOptions
from server.logs import configure_logs

__all__ = ["EXIT_BROKEN", "EXIT_DONE", "EXIT_NOT_STARTED", "serve"]

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_NOT_STARTED = 1
EXIT_BROKEN = 2
EXIT_ORPHANED = 3

ORPHAN_GRACE_S = 2.0
"""How long the process may take to end by itself once the link has ended."""


def serve(fd: int, build: Callable[[EngineOptions], EngineParts]) -> int:
    """Serve the front end at the other end of ``fd`` until it drains or goes; return the exit status.

    Call it from the main thread of a process of its own.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link = ChildLink(fd)
    try:
        start, *early = link.receive()
        if not isinstance(start, Start):
            raise MalformedFrameError("the first message is not Start")
    except LinkError as error:
        sys.stderr.write(f"engine: {error}\n")
        return EXIT_NOT_STARTED
    configure_logs(
        format_name=start.log_format,
        level="debug" if start.debug else start.log_level,
        fields={"engine_pid": os.getpid()},
    )
    return _Child(link, start).run(early, build)


class _Child:
    def __init__(self, link: ChildLink, start: Start) -> None:
        self._link = link
        self._start = start
        self._inbox: Inbox = queue.SimpleQueue()
        self._parent_pid = os.getppid()
        self._turn_s: Callable[[], float] = lambda: 0.0
        self._num_failed_steps: Callable[[], int] = lambda: 0

    def run(self, early: list[Start | ToEngine], build: Callable[[EngineOptions], EngineParts]) -> int:
        threading.Thread(target=self._read, args=(early,), name="reader", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            try:
                parts = build(self._start.options)
            except Exception as error:
                log.debug("the model could not be loaded", exc_info=True)
                self._say(error)
                return EXIT_NOT_STARTED
            # The model's objects stay: keep the collector from walking them ever after. Later ones are freed
            # by their counts (a test holds ended requests to it); the loop collects the rest while idle,
            # not in the middle of a step, where it costs up to 200 ms with ten thousand waiting.
            gc.collect()
            gc.freeze()
            gc.disable()
            loop = EngineLoop(parts, self._inbox, self._link)
            self._watch(loop, parts)
            try:
                self._link.send(parts.ready)
                loop.run()
            except LinkClosedError:
                log.warning("the front end is gone")
            except Exception as error:
                log.exception("the engine has broken")
                self._say(error)
                return EXIT_BROKEN
            finally:
                parts.close()
            return EXIT_DONE
        finally:
            self._link.close()

    def _watch(self, loop: EngineLoop, parts: EngineParts) -> None:
        def turn_s() -> float:
            started = loop.turn_started
            return 0.0 if started is None else max(0.0, parts.clock.now() - started)

        self._turn_s = turn_s
        self._num_failed_steps = lambda: loop.num_failed_steps

    def _say(self, error: Exception) -> None:
        detail = "".join(traceback.format_exception(error)) if self._start.debug else None
        kind = type(error).__name__
        try:
            self._link.send(Fault(kind, str(error) or kind, detail))
        except LinkError:
            log.warning("nobody is left to be told: %s: %s", kind, error)

    def _read(self, messages: list[Start | ToEngine]) -> None:
        try:
            while True:
                for message in messages:
                    if isinstance(message, Start):
                        raise MalformedFrameError("Start came twice")
                    self._inbox.put(message)
                messages = self._link.receive()
        except LinkClosedError:
            pass
        except LinkError:
            log.exception("what the front end sent cannot be read")
        self._inbox.put(Stop())
        # A step, or loading, cannot be interrupted, and nobody wants its result any more.
        time.sleep(ORPHAN_GRACE_S)
        os._exit(EXIT_ORPHANED)

    def _beat(self) -> None:
        try:
            # Descriptors can leak into the parent's other children and keep the link open.
            while os.getppid() == self._parent_pid:
                self._link.send(Heartbeat(self._turn_s(), self._num_failed_steps()))
                time.sleep(self._start.heartbeat_s)
        except LinkError:
            return
        os._exit(EXIT_ORPHANED)
