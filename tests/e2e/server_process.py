"""A real ``kvserve serve`` in a process of its own, and what is asked of it."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvserve.v1 import generate_pb2_grpc

START_TIMEOUT_S = 90.0
SMALL = ("--predict", "off", "--num-blocks", "256", "--threads", "1", "--dtype", "float32")


class ServerProcess:
    """``python -m server serve`` with its output read line by line."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("KVSERVE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**own, **(environment or {})},
        )
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0

    def wait_for(self, pattern: str, *, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """Return the first match in a line, from the beginning; wait for it."""
        for line in self.lines:
            if found := re.search(pattern, line):
                return found
        end = time.monotonic() + timeout_s
        while True:
            line_or_end = self._queue.get(timeout=max(0.01, end - time.monotonic()))
            assert line_or_end is not None, f"ended without {pattern!r}:\n" + "\n".join(self.lines)
            self.lines.append(line_or_end)
            if found := re.search(pattern, line_or_end):
                return found

    def wait_ready(self) -> ServerProcess:
        self.port = int(self.wait_for(r"^ready on [\w.]+:(\d+) in [\d.]+ s").group(1))
        return self

    def wait(self, *, timeout_s: float = START_TIMEOUT_S) -> int:
        """Return the exit status."""
        code = self.process.wait(timeout_s)
        while (line := self._queue.get(timeout=START_TIMEOUT_S)) is not None:
            self.lines.append(line)
        return code

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def engine(self) -> psutil.Process:
        """Return the engine's process."""
        return self._child("server.engine_main")

    def predict(self) -> psutil.Process:
        """Return the predict process."""
        return self._child("server.predict_main")

    def _child(self, module: str) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        (child,) = [child for child in children if module in child.cmdline()]
        return child

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @contextmanager
    def channel(self) -> Iterator[Any]:
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            yield channel

    @contextmanager
    def stub(self) -> Iterator[Any]:
        with self.channel() as channel:
            yield generate_pb2_grpc.GenerateServiceStub(channel)

    def health(self, channel: grpc.Channel) -> Any:
        """Return the statuses as they change, as a stream."""
        return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def server(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Run a server; kill what is left of it."""
    process = ServerProcess(arguments, environment)
    try:
        yield process
    finally:
        process.close()
