"""The processes of an experiment: our server, the peer, the load. Each is ended by who started it."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from loadgen.cli import RunReport

__all__ = [
    "STOP_S",
    "LineProcess",
    "ProcessFailed",
    "Server",
    "run_json",
    "run_loadgen",
    "run_module",
    "serve",
]

STOP_S = 30.0


class ProcessFailed(Exception):
    """A process of an experiment ended early, took too long or said something unexpected."""


class LineProcess:
    """A process that is spoken to in lines; its standard error goes to a file that failures quote."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.command = list(command)
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | (environment or {}),
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Return the process's id."""
        return self._process.pid

    def _read(self) -> None:
        if self._process.stdout is not None:
            with self._process.stdout as lines:
                for line in lines:
                    self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def write(self, line: str) -> None:
        """Send one line. Raises ``ProcessFailed`` if nobody reads any more."""
        if self._process.stdin is None:
            raise ProcessFailed("the process takes no input")
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ProcessFailed(f"{self.name} ended: {self.last_words()}") from error

    def read(self, timeout_s: float) -> str:
        """Return the next line. Raises ``ProcessFailed`` after ``timeout_s`` or at the process's end."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise ProcessFailed(f"{self.name} said nothing for {timeout_s:.0f} s") from None
        if line is None:
            raise ProcessFailed(f"{self.name} ended: {self.last_words()}")
        return line

    @property
    def name(self) -> str:
        """Return a short name for messages."""
        return " ".join(self.command[1:4])

    def last_words(self) -> str:
        """Return the end of the process's standard error."""
        return self._log.read_text(errors="replace").strip()[-500:]

    def stop(self) -> None:
        """End the process: close its input, ask, then insist. Idempotent."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        # Its pipe ends with it, unless it left somebody behind who holds the other end.
        self._reader.join(STOP_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Server:
    """Our server, up and ready."""

    def __init__(self, process: LineProcess, target: str, said: list[str]) -> None:
        self.process = process
        self.target = target
        self.said = said
        """What it printed until it was ready."""


@contextlib.contextmanager
def serve(model: str, arguments: Sequence[str], *, log: Path, timeout_s: float = 300.0) -> Iterator[Server]:
    """Run ``kvserve serve MODEL`` on a free port as long as the block lasts."""
    command = [sys.executable, "-m", "server.cli", "serve", model, "--port", "0", *arguments]
    with LineProcess(command, log=log) as process:
        said: list[str] = []
        deadline = time.monotonic() + timeout_s
        while True:
            said.append(process.read(max(0.1, deadline - time.monotonic())))
            if found := re.match(r"ready on (\S+:\d+)", said[-1]):
                yield Server(process, found[1], said)
                return


def run_module(arguments: Sequence[str], *, timeout_s: float) -> str:
    """Run ``python -m ...`` and return what it prints. Raises ``ProcessFailed``."""
    command = [sys.executable, "-m", *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ProcessFailed(f"{' '.join(arguments[:2])} took over {timeout_s:.0f} s") from None
    if finished.returncode != 0:
        raise ProcessFailed(f"{' '.join(arguments[:2])} failed: {finished.stderr.strip()[-500:]}")
    return finished.stdout


def run_json(arguments: Sequence[str], *, timeout_s: float) -> Any:
    """Run ``python -m ...`` and return what it prints, as JSON. Raises ``ProcessFailed``."""
    return msgspec.json.decode(run_module(arguments, timeout_s=timeout_s))


def run_loadgen(target: str, arguments: Sequence[str], *, timeout_s: float) -> RunReport:
    """Run ``loadgen run`` in a process of its own. Raises ``ProcessFailed`` if any request failed."""
    with tempfile.TemporaryDirectory(prefix="kvserve-bench-") as folder:
        file = Path(folder) / "run.json"
        command = [
            sys.executable,
            "-m",
            "loadgen",
            "run",
            "--target",
            target,
            "--json",
            str(file),
            *arguments,
        ]
        try:
            finished = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"loadgen took over {timeout_s:.0f} s") from None
        if finished.returncode != 0:
            raise ProcessFailed(f"loadgen failed: {(finished.stdout + finished.stderr).strip()[-500:]}")
        return msgspec.json.decode(file.read_bytes(), type=RunReport)
