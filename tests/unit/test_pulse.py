"""Whether a silent process is at work, felt on real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from server.process.pulse import Pulse

BUSY = "while True: pass"
IDLE = "import threading; print(flush=True); threading.Event().wait()"

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def begin(program: str) -> subprocess.Popen[str]:
        running.append(subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until_idle(pulse: Pulse) -> None:
    end_s = time.monotonic() + 30
    while pulse.has_worked():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def until_at_work(pulse: Pulse) -> None:
    end_s = time.monotonic() + 30
    while not pulse.has_worked():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_a_process_that_waits_does_not_work(start: Start) -> None:
    process = start(IDLE)
    assert process.stdout is not None
    process.stdout.readline()
    pulse = Pulse(process.pid)
    assert pulse.has_worked()  # before the first look it has
    until_idle(pulse)


def test_a_process_that_computes_works_unless_it_is_stopped(start: Start) -> None:
    process = start(BUSY)
    pulse = Pulse(process.pid)
    until_at_work(pulse)
    until_at_work(pulse)
    os.kill(process.pid, signal.SIGSTOP)
    until_idle(pulse)
    os.kill(process.pid, signal.SIGCONT)
    until_at_work(pulse)


def test_of_a_process_that_is_gone_nothing_is_known(start: Start) -> None:
    process = start("")
    process.wait()
    assert Pulse(process.pid).has_worked()
