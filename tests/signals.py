"""Stopping a process so that nothing of it runs any more."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

__all__ = ["stop_process"]

PATIENCE_S = 60.0


def stop_process(pid: int) -> None:
    """Send SIGSTOP, and return when every thread has stopped: on a busy machine one may run on for a while.

    Raises ``TimeoutError``.
    """
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + PATIENCE_S
    while not all(_is_stopped(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > end:
            raise TimeoutError(f"process {pid} does not stop")
        time.sleep(0.001)


def _is_stopped(task: Path) -> bool:
    try:
        # After the name, which may hold anything.
        return (task / "stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"Z", b"X")
    except FileNotFoundError:  # the thread has ended
        return True
