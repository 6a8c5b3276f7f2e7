"""Be the process on the far side of the link. Knows nothing of what it does; a ``Service`` does.

Threads::

    main        builds the service, then Service.run
    reader      link -> Service.handle; when the link ends, so does the process
    heartbeat   says twice a second that the process lives, and since when it is in its turn

The process never outlives the front end: the link ends with it, and so does the parent's pid. Ctrl-C
and SIGTERM are left to the front end, which drains first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from server.logs import configure_logs
from server.process.errors import LinkClosedError, LinkError, MalformedFrameError
from server.process.link import ChildLink
from server.process.messages import Fault, Heartbeat, StartMessage

__all__ = ["EXIT_BROKEN", "EXIT_DONE", "EXIT_NOT_STARTED", "EXIT_ORPHANED", "Service", "serve"]

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_NOT_STARTED = 1
EXIT_BROKEN = 2
EXIT_ORPHANED = 3

ORPHAN_GRACE_S = 2.0
"""How long the process may take to end by itself once the link has ended."""

StartT = TypeVar("StartT", bound=StartMessage)
HeardT = TypeVar("HeardT")


class Service(ABC, Generic[StartT, HeardT]):
    """What a process is there for."""

    @abstractmethod
    def build(self, start: StartT, link: ChildLink[Any]) -> msgspec.Struct:
        """Get ready, and return the message that says so. Main thread; blocks.

        Whatever it raises is told to the front end as a ``Fault``, and the process ends.
        """

    @abstractmethod
    def handle(self, message: HeardT) -> None:
        """Take a message. Reader thread, also before ``build`` has returned; does not block for long."""

    def settle(self) -> None:
        """Note that all messages that came together have been handled. Reader thread."""

    @abstractmethod
    def run(self) -> None:
        """Work until it is over, or told so by ``front_end_is_gone``. Main thread, after ``build``."""

    @abstractmethod
    def front_end_is_gone(self) -> None:
        """End ``run`` soon: nothing more will come. Reader thread, once."""

    @abstractmethod
    def turn_s(self) -> float:
        """Return how long the present turn has taken; 0 while idle. Heartbeat thread, any time."""

    def num_failed(self) -> int:
        """Return how many turns came to nothing. Heartbeat thread, any time."""
        return 0

    def close(self) -> None:
        """Let go of everything. Main thread, after ``run`` however it ended."""


def serve(
    fd: int,
    service: Service[StartT, HeardT],
    *,
    name: str,
    start_type: type[StartT],
    message_type: Any,
) -> int:
    """Serve the front end at the other end of ``fd`` until the service is done or the link ends.

    Call it from the main thread of a process of its own; return the exit status. ``message_type``: union of
    what the front end sends after the start message. ``name`` is for logs.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link: ChildLink[StartT | HeardT] = ChildLink(fd, start_type | message_type)
    try:
        start, *early = link.receive()
        if not isinstance(start, start_type):
            raise MalformedFrameError("the first message is not the one to start with")
    except LinkError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return EXIT_NOT_STARTED
    configure_logs(
        format_name=start.log_format,
        level="debug" if start.debug else start.log_level,
        fields={f"{name}_pid": os.getpid()},
    )
    return _Served(link, service, start, start_type).run(early)


class _Served(Generic[StartT, HeardT]):
    def __init__(
        self,
        link: ChildLink[StartT | HeardT],
        service: Service[StartT, HeardT],
        start: StartT,
        start_type: type[StartT],
    ) -> None:
        self._link = link
        self._service = service
        self._start = start
        self._start_type = start_type
        self._parent_pid = os.getppid()

    def run(self, early: list[StartT | HeardT]) -> int:
        threading.Thread(target=self._read, args=(early,), name="reader", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            return self._work()
        finally:
            self._link.close()

    def _work(self) -> int:
        service = self._service
        try:
            ready = service.build(self._start, self._link)
        except Exception as error:
            log.debug("it could not be built", exc_info=True)
            self._say(error)
            return EXIT_NOT_STARTED
        try:
            self._link.send(ready)
            service.run()
        except LinkClosedError:
            log.warning("the front end is gone")
        except Exception as error:
            log.exception("the process has broken")
            self._say(error)
            return EXIT_BROKEN
        finally:
            service.close()
        return EXIT_DONE

    def _say(self, error: Exception) -> None:
        detail = "".join(traceback.format_exception(error)) if self._start.debug else None
        kind = type(error).__name__
        try:
            self._link.send(Fault(kind, str(error) or kind, detail))
        except LinkError:
            log.warning("nobody is left to be told: %s: %s", kind, error)

    def _read(self, messages: list[StartT | HeardT]) -> None:
        handle: Callable[[Any], None] = self._service.handle
        settle = self._service.settle
        try:
            while True:
                for message in messages:
                    if isinstance(message, self._start_type):
                        raise MalformedFrameError("the start message came twice")
                    handle(message)
                settle()
                messages = self._link.receive()
        except LinkClosedError:
            pass
        except LinkError:
            log.exception("what the front end sent cannot be read")
        except Exception as error:
            # Nobody would read the link any more: better no process than a deaf one.
            log.exception("a message could not be handled")
            self._say(error)
        self._service.front_end_is_gone()
        # A turn, or loading, cannot be interrupted, and nobody wants its result any more.
        time.sleep(ORPHAN_GRACE_S)
        os._exit(EXIT_ORPHANED)

    def _beat(self) -> None:
        try:
            # Descriptors can leak into the parent's other children and keep the link open.
            while os.getppid() == self._parent_pid:
                self._link.send(Heartbeat(self._service.turn_s(), self._service.num_failed()))
                time.sleep(self._start.heartbeat_s)
        except LinkError:
            return
        os._exit(EXIT_ORPHANED)
