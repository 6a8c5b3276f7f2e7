"""A real Redis for tests, on a socket of its own, and a proxy that does to a connection what networks do."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.signals import stop_process

__all__ = ["FaultyProxy", "RedisServer", "redis_server"]

BINARY = shutil.which("redis-server")


class RedisServer:
    """One server process in a folder of its own. Unix socket only unless told otherwise."""

    def __init__(self, folder: Path, *options: str, with_port: bool = False) -> None:
        assert BINARY is not None
        self.folder = folder
        self.socket_path = folder / "redis.sock"
        self.port = _free_port() if with_port else 0
        self._command = [
            *(BINARY, "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket_path)),
            *("--unixsocketperm", "600", "--save", "", "--appendonly", "no", "--dir", str(folder)),
            *("--daemonize", "no", *options),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError), self.connect() as connection:
                if connection.command("PING")[:1] in (b"+", b"-"):
                    return
            time.sleep(0.01)
        raise RuntimeError("redis-server did not start")

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Let it accept connections and answer nothing."""
        assert self.process is not None
        stop_process(self.process.pid)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def connect(self) -> _Connection:
        return _Connection(self.socket_path)


class _Connection:
    """What a test says to Redis beside the tier, byte for byte: none of the code under test is in it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def command(self, *arguments: bytes | str | int) -> bytes:
        """Return a bulk string's content, or any other reply's line."""
        parts = [a if isinstance(a, bytes) else str(a).encode() for a in arguments]
        packed = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        self._socket.sendall(b"*%d\r\n%b" % (len(parts), packed))
        return self._reply()

    def keys(self, pattern: str = "*") -> list[bytes]:
        count = self.command("KEYS", pattern)
        return sorted(self._reply() for _ in range(int(count[1:])))

    def _reply(self) -> bytes:
        line = self._file.readline().rstrip(b"\r\n")
        if line[:1] != b"$":
            return line
        size = int(line[1:])
        return self._file.read(size + 2)[:-2] if size >= 0 else b""


class FaultyProxy:
    """Passes bytes between a loopback port and a Redis socket until it is told to do worse."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._is_open = threading.Event()
        self._is_open.set()
        self._is_closed = False
        self._sockets: list[socket.socket] = []
        self.num_accepted = 0
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def stall(self) -> None:
        """Take everything and pass nothing on: a peer that is there and silent."""
        self._is_open.clear()

    def resume(self) -> None:
        self._is_open.set()

    def cut(self) -> None:
        """Drop every connection."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._is_closed = True
        self._is_open.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.num_accepted += 1
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(self._target))
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._is_open.wait()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """A Redis for the tests of one file; skips where the distribution's package is not installed."""
    if BINARY is None:
        pytest.skip("no redis-server: install the package of the distribution")
    with tempfile.TemporaryDirectory(prefix="kvr") as folder:  # short: a socket's path has 107 bytes
        server = RedisServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
