"""One process as the front end sees it, from spawn to grave. One life: not restarted here.

How its end is noticed, whichever comes first:

- the link ends, at once: the kernel closes it with the process;
- the process has exited, within ``TICK_S``: should something else keep the link open;
- no sign of life for ``silence_s``, while it does nothing either: stopped, frozen or in a deadlock;
- no sign of life for ``busy_silence_s``: starved, or stuck while holding the interpreter;
- one turn of its work takes longer than ``watchdog_s``: stuck in it;
- it says something that is no message, or announces its own end (``Fault``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from server.process.errors import LinkError, ProcessStartError
from server.process.link import ParentLink, open_socket_pair
from server.process.messages import Fault, Heartbeat
from server.process.pulse import Pulse

__all__ = ["Child", "ChildLimits", "Program"]

log = logging.getLogger(__name__)

TICK_S = 0.25
REAP_S = 10.0
"""A killed process that is not gone by then waits for the kernel; leave it behind."""

_ROOT = str(Path(__file__).resolve().parents[2])

SaidT = TypeVar("SaidT")
ReadyT = TypeVar("ReadyT")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildLimits:
    """How long a process may be silent. Seconds."""

    watchdog_s: float = 60.0
    """One turn, a step or a batch; generous, because a large one on a slow machine is no fault."""
    silence_s: float = 5.0
    """Without any message, and without any work that the kernel knows of; also while it loads."""
    busy_silence_s: float = 5.0
    """Without any message. Counts once it is ready: loading a model may hold the interpreter."""
    start_s: float = 600.0
    """From spawn to ready."""
    heartbeat_s: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Program(Generic[ReadyT]):
    """What to run in the process, and what it says."""

    name: str
    """For logs: "engine"."""
    module: str
    """Run as ``python -m module --fd N``."""
    start: msgspec.Struct
    """The first message to it; as ``messages.StartMessage``."""
    messages: Any
    """Union of all that it sends, ``Heartbeat`` and ``Fault`` among it."""
    ready_type: type[ReadyT]
    """The one of them that says that it is ready."""
    start_error: type[ProcessStartError]


class Child(Generic[SaidT, ReadyT]):
    """A running process. Lives on the event loop; owns the process and the link to it."""

    def __init__(
        self,
        program: Program[ReadyT],
        *,
        on_message: Callable[[SaidT], None],
        limits: ChildLimits,
        on_turn: Callable[[float], None] | None = None,
    ) -> None:
        """``on_message`` gets what it says, but for signs of life, its first ready message, and faults.

        ``on_turn`` is told with each sign of life when its turn began, by ``time.monotonic``; idle: just now.
        """
        loop = asyncio.get_running_loop()
        self._program = program
        self._on_said = on_message
        self._on_turn = on_turn
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._link: ParentLink[Any] | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._silent_ticks = 0
        self._idle_ticks = 0
        """Of these, the ones since the kernel last saw it work."""
        self._pulse: Pulse | None = None
        self._ready: asyncio.Future[ReadyT] = loop.create_future()
        self._fault: Fault | None = None
        self.num_failed = 0
        """Turns that came to nothing, as it says itself."""
        self.lost: asyncio.Future[str] = loop.create_future()
        """Done as soon as the process is known to be gone or no good, with the reason for the log."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def num_unsent_bytes(self) -> int:
        return 0 if self._link is None else self._link.num_unsent_bytes

    async def start(self) -> ReadyT:
        """Spawn it and wait until it is ready.

        Raises the program's start error; then, and when cancelled, nothing is left behind.
        """
        try:
            await self._spawn()
            self.send(self._program.start)
            either: set[asyncio.Future[Any]] = {self._ready, self.lost}
            await asyncio.wait(either, timeout=self._limits.start_s, return_when=asyncio.FIRST_COMPLETED)
            if self._ready.done():
                return self._ready.result()
            if not self.lost.done():
                self._lose(f"it was not ready after {self._limits.start_s:g} s")
            cause = self.lost.result()
        except BaseException:
            await self.end()
            raise
        # An orderly end shows in the exit status.
        exit_text = await self.end(grace_s=1.0)
        raise self.start_error(f"the {self._program.name} process ended while starting: {cause}; {exit_text}")

    def start_error(self, reason: str) -> ProcessStartError:
        """Return why it does not start: in its own words if it has said any, else ``reason``."""
        fault = self._fault
        if fault is not None:
            return self._program.start_error(fault.reason, kind=fault.kind, detail=fault.detail)
        return self._program.start_error(reason)

    def send(self, message: msgspec.Struct) -> None:
        """Send without blocking; nothing once the process is gone. Raises ``FrameTooLargeError``."""
        if self._link is not None:
            self._link.send(message)

    def hang_up(self) -> None:
        """Ask it to end: say that nothing more will be sent."""
        if self._link is not None:
            self._link.hang_up()

    async def end(self, *, grace_s: float = 0.0) -> str:
        """Let the process end by itself for ``grace_s``, then kill and reap it, and close the link.

        Idempotent. Return how it ended, for the log.
        """
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        process = self._process
        try:
            if process is not None and grace_s > 0:
                await _wait_for_exit(process, grace_s)
        finally:
            if process is not None and process.poll() is None:
                process.kill()
            self._lose("it was ended")
            if self._link is not None:
                await self._link.close()
        if process is None:
            return "it was never started"
        if not await _wait_for_exit(process, REAP_S):
            log.error("%s process %d was killed but does not go", self._program.name, process.pid)
            return "it does not go"
        return _describe_exit(process.returncode)

    async def _spawn(self) -> None:
        ours, theirs = open_socket_pair()
        with theirs:
            try:
                # vfork and exec, no code of ours in between: safe whatever threads and gRPC objects exist.
                # It blocks the event loop for a millisecond or two.
                self._process = subprocess.Popen(  # noqa: ASYNC220, S603
                    [
                        sys.executable,
                        "-P",
                        *["-O"] * min(sys.flags.optimize, 2),
                        *["-m", self._program.module, "--fd", str(theirs.fileno())],
                    ],
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    env=_environment(),
                )
            except BaseException:
                ours.close()
                raise
        self._pulse = Pulse(self._process.pid)
        self._link = await ParentLink.over(ours, self._program.messages, self._on_message, self._on_closed)
        self._tick = asyncio.get_running_loop().call_later(TICK_S, self._on_tick)

    def _on_message(self, message: Any) -> None:
        self._silent_ticks = 0
        match message:
            case Heartbeat():
                self.num_failed = message.num_failed
                if self._on_turn is not None:
                    self._on_turn(time.monotonic() - message.turn_s)
                if message.turn_s > self._limits.watchdog_s:
                    self._give_up(f"stuck in one turn for {message.turn_s:.0f} s")
            case Fault():
                self._fault = message
                if message.detail is not None:
                    log.error("%s process %d: %s", self._program.name, self.pid, message.detail)
            case self._program.ready_type() if not self._ready.done():
                self._ready.set_result(message)
            case _:
                self._on_said(message)

    def _on_closed(self, error: LinkError) -> None:
        if self._fault is not None:
            self._lose(f"{self._fault.kind}: {self._fault.reason}")
        else:
            self._lose(str(error))

    def _on_tick(self) -> None:
        assert self._process is not None
        assert self._pulse is not None
        self._tick = asyncio.get_running_loop().call_later(TICK_S, self._on_tick)
        if self._process.poll() is not None:
            self._lose(_describe_exit(self._process.returncode))
        # In ticks, not by the clock: if this event loop was blocked or stopped, messages wait unread.
        self._silent_ticks += 1
        is_idle = self._silent_ticks > 1 and not self._pulse.has_worked()
        self._idle_ticks = self._idle_ticks + 1 if is_idle else 0
        if self._idle_ticks * TICK_S > self._limits.silence_s:
            self._give_up(f"no sign of life for {self._limits.silence_s:g} s, and it does nothing")
        elif self._ready.done() and self._silent_ticks * TICK_S > self._limits.busy_silence_s:
            self._give_up(f"no sign of life for {self._limits.busy_silence_s:g} s")

    def _give_up(self, reason: str) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)


def _environment() -> dict[str, str]:
    """Return the child's environment: ours, and what keeps its threads from getting in the way."""
    path = os.environ.get("PYTHONPATH")
    return os.environ | {
        # Spinning OpenMP threads would take the cores that the front end needs.
        "OMP_WAIT_POLICY": "passive",
        # So would numpy's; what it multiplies here is small. torch's threads are not its.
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": _ROOT if not path else f"{_ROOT}{os.pathsep}{path}",
    }


async def _wait_for_exit(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Reap ``process`` as soon as it has exited; False if it has not in time. Polls: binds no thread."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    while process.poll() is None:
        if loop.time() >= end:
            return False
        await asyncio.sleep(0.01)
    return True


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
