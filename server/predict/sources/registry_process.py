"""Talk to the process that holds the MLflow client: ask, wait while bytes arrive, end it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from server.predict.errors import ModelRefusedError

__all__ = ["Done", "FoundVersion", "Listing", "RegistryProcess", "RegistryUnreachable"]

TICK_S = 0.1
SILENCE_S = 120.0
"""Without an answer and without a byte on the disk. The client gives up a request after 30 s."""
END_S = 5.0
MAX_ANSWER_BYTES = 4 << 20

_MODULE = "server.predict.sources.mlflow_client"
_ROOT = str(Path(__file__).resolve().parents[3])
_SETTINGS = {
    # A registry that is down is noticed in a minute, not in ten. The operator's own settings count.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_REASONS = {
    "missing": "the MLflow registry has no such model, version or alias",
    "denied": "the MLflow registry refuses access",
    "not ready": "the MLflow registry says that this version is not ready",
}

log = logging.getLogger(__name__)


A = TypeVar("A", bound="Done")


class Done(msgspec.Struct):
    """An answer without contents."""


class FoundVersion(Done):
    """Where a version's files are."""

    version: str
    location: str


class Listing(Done):
    """The files of an artifact, with their sizes."""

    files: list[tuple[str, int | None]]
    is_complete: bool


class Failure(Done):
    """Why there is no answer: a key of the reasons above, or "failed"; empty in every other answer."""

    error: str = ""
    text: str = ""


class RegistryUnreachable(ModelRefusedError):
    """It gave no usable answer; what is cached may do instead."""


class RegistryProcess:
    """One run of :mod:`server.predict.sources.mlflow_client`. One thread; a context manager that ends it."""

    def __init__(self, uri: str) -> None:
        """Start it. Raises ``ModelRefusedError`` where MLflow is not installed."""
        if find_spec("mlflow") is None:
            raise ModelRefusedError(
                "models of an MLflow registry need its client: install the extra kvserve-server[mlflow]"
            )
        self._uri = uri
        path = os.environ.get("PYTHONPATH")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_SETTINGS
                | os.environ
                | {"PYTHONPATH": _ROOT if not path else f"{_ROOT}{os.pathsep}{path}"},
                start_new_session=True,
            )
        except BaseException:
            self._errors.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(
        self, op: str, answer: type[A], *, count_bytes: Callable[[], int] | None = None, **arguments: Any
    ) -> A:
        """Send a request and wait for its ``answer``; ``count_bytes`` is called ten times a second meanwhile.

        While its value grows, the wait goes on; it may raise to give up. Raises ``ModelRefusedError``.
        """
        assert self._process.stdin is not None
        request = {"op": op, "uri": self._uri, **arguments}
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(count_bytes)
            failure = msgspec.json.decode(line, type=Failure)
            if not failure.error:
                return msgspec.json.decode(line, type=answer)
        except (OSError, ValueError) as error:
            log.warning("the MLflow client failed: %s", self._last_words(), exc_info=error)
            raise RegistryUnreachable("the MLflow registry can not be used") from None
        log.warning("MLflow %s failed: %s", op, failure.text)
        if failure.error in _REASONS:
            raise ModelRefusedError(_REASONS[failure.error])
        raise RegistryUnreachable("the MLflow registry can not be reached, or its answer can not be used")

    def close(self) -> None:
        """End the process; what it is downloading stays incomplete. Idempotent."""
        if self._process.poll() is None:
            # Also what it has started: it leads a session of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    log.debug("a pipe to the MLflow client was closed already")
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            log.error("the MLflow client, process %d, was killed but does not go", self._process.pid)
        self._errors.close()

    def _read_line(self, count_bytes: Callable[[], int] | None) -> bytes:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        line = bytearray()
        num_silent_ticks, num_bytes = 0, -1
        with selectors.DefaultSelector() as selector:
            selector.register(handle, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if selector.select(TICK_S):
                    piece = os.read(handle, 64 << 10)
                    if not piece or len(line) > MAX_ANSWER_BYTES:
                        raise OSError("no whole answer")
                    line += piece
                    continue
                before, num_bytes = num_bytes, count_bytes() if count_bytes is not None else 0
                num_silent_ticks = num_silent_ticks + 1 if num_bytes == before else 0
                if num_silent_ticks * TICK_S > SILENCE_S:
                    raise OSError("silent for too long")
        return bytes(line)

    def _last_words(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        return self._errors.read().decode(errors="replace").strip()
