"""What tests of Predict over a real server share: starting one, its metrics, what it must not tell."""

from __future__ import annotations

import asyncio
import hashlib
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from kvserve import AsyncClient, Error
from tests.e2e.server_process import SMALL, ServerProcess, server

__all__ = ["PredictServer", "check_tells_no_path", "predict_server", "until", "write_sums"]

# Of SMALL all but `--predict off`, with which it begins.
START = (*SMALL[2:], "--port", "0", "--metrics-port", "0", "--predict-threads", "2")
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_PATH = re.compile(r"(?:^|[\s'\"(=])/[\w.]")


class PredictServer:
    """A running server, and its metrics."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process
        self._metrics = process.wait_for(r"^metrics\s+(http://\S+)").group(1)

    def client(self) -> AsyncClient:
        """Return a client that tries nothing twice: what the server says is what a test sees."""
        return AsyncClient(f"127.0.0.1:{self.process.port}", retry=None, timeout_s=100)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels; of the metrics of Predict."""
        return self.count(f"predict_{name}", **labels)

    def count(self, name: str, **labels: str) -> float:
        """Return the sum of any metric's samples with these labels."""
        with urllib.request.urlopen(self._metrics, timeout=60) as response:
            lines = response.read().decode().splitlines()
        total = 0.0
        for found in map(_SAMPLE.fullmatch, lines):
            if found is not None and found[1] == f"kvserve_{name}":
                has = dict(_LABEL.findall(found[2] or ""))
                if labels.items() <= has.items():
                    total += float(found[3])
        return total

    def processes(self) -> tuple[psutil.Process, psutil.Process]:
        """Return the front end and the predict process."""
        return psutil.Process(self.process.process.pid), self.process.predict()


@contextmanager
def predict_server(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[PredictServer]:
    """Run a server that serves Predict beside the small built-in model."""
    with server(*START, *arguments, environment=environment) as process:
        yield PredictServer(process.wait_ready())


async def until(condition: Callable[[], Any], *, timeout_s: float = 60.0) -> None:
    """Wait until it holds; it may block for a moment, and may be a coroutine function."""
    async with asyncio.timeout(timeout_s):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.02)


def check_tells_no_path(error: Error | str, *folders: Path) -> None:
    """Fail if anything that a client is told names a place in the server's file system."""
    texts = [error] if isinstance(error, str) else [error.message, *error.details.values()]
    if isinstance(error, Error):
        texts += [violation.description for violation in error.violations]
    for text in texts:
        assert not _PATH.search(text), text
        assert not any(str(folder) in text for folder in folders), text


def write_sums(folder: Path) -> None:
    """Write the folder's SHA256SUMS as ``sha256sum`` does."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))
