"""Where a prefix can be that is not on the device: a tier with a codec, and what a server needs for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadgen.experiments.processes import STOP_S, ProcessFailed

__all__ = ["PLACES", "ExperimentSkipped", "TierPlace", "drop_from_page_cache"]

START_S = 20.0
PING = b"*1\r\n$4\r\nPING\r\n"


class ExperimentSkipped(Exception):
    """Something that an experiment needs is not at hand. Not a failure: the report says what and why."""


@dataclass(frozen=True, slots=True)
class TierPlace:
    """One tier with one codec."""

    tier: str
    codec: str = "none"

    @property
    def name(self) -> str:
        """Return a name for the report."""
        return self.tier if self.codec == "none" else f"{self.tier} ({self.codec})"

    @contextlib.contextmanager
    def open(self, folder: Path) -> Iterator[list[str]]:
        """Yield the server's arguments; what stands behind the tier lives as long as the block.

        Raises ``ExperimentSkipped`` if there is no Redis, ``ProcessFailed`` if it does not start.
        """
        codec = [f"--{self.tier}-codec", self.codec]
        if self.tier == "host":
            yield ["--host-cache", "2GiB", *codec]
        elif self.tier == "disk":
            yield ["--disk-cache", str(folder / f"disk-{self.codec}"), *codec]
        else:
            with _run_redis() as url:
                yield ["--redis-url", url, *codec]


PLACES = {
    place.name: place
    for place in (
        TierPlace("host"),
        TierPlace("disk"),
        TierPlace("disk", "zstd"),
        TierPlace("disk", "int8"),
        TierPlace("redis"),
    )
}


@contextlib.contextmanager
def _run_redis() -> Iterator[str]:
    """Run a Redis that keeps nothing on disk, on a socket in a folder of its own; yield its URL."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise ExperimentSkipped("there is no redis-server here; the distribution's package has it")
    with tempfile.TemporaryDirectory(prefix="kvr-") as folder:  # short: a socket's path has 107 bytes
        path = Path(folder) / "redis.sock"
        command = [binary, "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "600"]
        memory_only = ["--save", "", "--appendonly", "no", "--dir", folder, "--daemonize", "no"]
        process = subprocess.Popen(
            [*command, *memory_only], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            _wait_for_redis(process, path)
            yield f"unix://{path}"
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_redis(process: subprocess.Popen[bytes], path: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.sendall(PING)
            if connection.recv(16).startswith(b"+PONG"):
                return
        time.sleep(0.01)
    raise ProcessFailed("redis-server did not start")


def drop_from_page_cache(folder: Path) -> None:
    """Ask the system to forget what it holds of these files in memory, so that reading them reads the disk.

    Does nothing where there is no such call. The files must not be in use.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
