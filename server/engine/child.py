"""One engine process as the front end sees it, from spawn to grave. One life: not restarted here.

How its end is noticed, whichever comes first:

- the link ends, at once: the kernel closes it with the process;
- the process has exited, within ``TICK_S``: should something else keep the link open;
- no sign of life for ``silence_s``: stopped, starved, or stuck while holding the interpreter;
- one turn of its loop takes longer than ``watchdog_s``: stuck in a step;
- it says something that is no message, or announces its own end (``Fault``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.engine.admin_messages import AdminProgress, AdminReply, CacheEvents
from server.engine.control import Fault, FromChild, Heartbeat, Start
from server.engine.errors import EngineStartError, LinkError
from server.engine.link import ParentLink, open_socket_pair
from server.engine.messages import EngineReady, EngineStats, Outputs, ToEngine
from server.engine.streams import Event

__all__ = ["ChildLimits", "EngineChild"]

log = logging.getLogger(__name__)

TICK_S = 0.25
REAP_S = 10.0
"""A killed process that is not gone by then waits for the kernel; leave it behind."""

_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildLimits:
    """How long an engine process may be silent. Seconds."""

    watchdog_s: float = 60.0
    """One step; generous, because a large prefill on a slow machine is no fault."""
    silence_s: float = 5.0
    """Without any message. Counts once the model is loaded: loading may hold the interpreter."""
    start_s: float = 600.0
    """From spawn to ready."""
    heartbeat_s: float = 0.5


class EngineChild:
    """A running engine process. Lives on the event loop; owns the process and the link to it."""

    def __init__(
        self,
        *,
        on_events: Callable[[list[Event]], None],
        on_stats: Callable[[EngineStats], None],
        on_admin: Callable[[AdminReply | AdminProgress | CacheEvents], None],
        limits: ChildLimits,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._on_events = on_events
        self._on_stats = on_stats
        self._on_admin = on_admin
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._link: ParentLink | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._silent_ticks = 0
        self._ready: asyncio.Future[EngineReady] = loop.create_future()
        self._fault: Fault | None = None
        self.num_failed_steps = 0
        self.lost: asyncio.Future[str] = loop.create_future()
        """Done as soon as the process is known to be gone or no good, with the reason for the log."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def num_unsent_bytes(self) -> int:
        return 0 if self._link is None else self._link.num_unsent_bytes

    async def start(self, module: str, start: Start) -> EngineReady:
        """Spawn ``python -m module`` and wait until its model is loaded.

        Raises ``EngineStartError``; then, and when cancelled, nothing is left behind.
        """
        try:
            await self._spawn(module)
            self.send(start)
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
        if self._fault is not None:
            raise EngineStartError(self._fault.reason, kind=self._fault.kind, detail=self._fault.detail)
        raise EngineStartError(f"the engine process ended while loading the model: {cause}; {exit_text}")

    def send(self, message: Start | ToEngine) -> None:
        """Send without blocking; nothing once the process is gone. Raises ``FrameTooLargeError``."""
        if self._link is not None:
            self._link.send(message)

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
            log.error("engine process %d was killed but does not go", process.pid)
            return "it does not go"
        return _describe_exit(process.returncode)

    async def _spawn(self, module: str) -> None:
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
                        *["-m", module, "--fd", str(theirs.fileno())],
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
        self._link = await ParentLink.over(ours, self._on_message, self._on_closed)
        self._tick = asyncio.get_running_loop().call_later(TICK_S, self._on_tick)

    def _on_message(self, message: FromChild) -> None:
        self._silent_ticks = 0
        match message:
            case Outputs():
                self._on_events(message.events)
            case Heartbeat():
                self.num_failed_steps = message.num_failed_steps
                if message.turn_s > self._limits.watchdog_s:
                    self._give_up(f"stuck in one step for {message.turn_s:.0f} s")
            case EngineStats():
                self._on_stats(message)
            case AdminReply() | AdminProgress() | CacheEvents():
                self._on_admin(message)
            case EngineReady():
                if not self._ready.done():
                    self._ready.set_result(message)
            case Fault():
                self._fault = message
                if message.detail is not None:
                    log.error("engine process %d: %s", self.pid, message.detail)

    def _on_closed(self, error: LinkError) -> None:
        if self._fault is not None:
            self._lose(f"{self._fault.kind}: {self._fault.reason}")
        else:
            self._lose(str(error))

    def _on_tick(self) -> None:
        assert self._process is not None
        self._tick = asyncio.get_running_loop().call_later(TICK_S, self._on_tick)
        if self._process.poll() is not None:
            self._lose(_describe_exit(self._process.returncode))
        # In ticks, not by the clock: if this event loop was blocked or stopped, messages wait unread.
        self._silent_ticks += 1
        if self._ready.done() and self._silent_ticks * TICK_S > self._limits.silence_s:
            self._give_up(f"no sign of life for {self._limits.silence_s:g} s")

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
