"""What ``kvctl cache top`` waits for: keys, news, another size. Puts the terminal back as it was."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Self

import kvserve
from kvserve._cli.top_view import Sample

__all__ = ["Keys", "Poller", "raising_on_termination"]

_SEQUENCES = re.compile(r"\x1b(?:\[[0-9;]*[~A-Za-z]|O[A-Za-z])")
"""Arrow and function keys; none of them means anything here."""


class Keys:
    """Single keys from standard input, without echo, inside its block; none if it is no terminal.

    Ctrl-C still interrupts. ``wake`` ends a wait from any thread.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()
        self._receiver, self._sender = socket.socketpair()
        self._fd: int | None = None

    def __enter__(self) -> Self:
        self._stack.callback(self._selector.close)
        for end in (self._receiver, self._sender):
            end.setblocking(False)  # noqa: FBT003  A parameter of the standard library without a name.
            self._stack.callback(end.close)
        self._selector.register(self._receiver, selectors.EVENT_READ)
        with self._stack.pop_all() as cleanup:  # Restores all of it if the next line fails.
            if sys.stdin.isatty():
                self._read_single_keys(cleanup)
            if threading.current_thread() is threading.main_thread():
                self._wake_on_signals(cleanup)
            self._stack = cleanup.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def wake(self) -> None:
        """End the current wait, or the next one."""
        with contextlib.suppress(OSError):  # Full: it wakes anyway. Closed: nobody waits.
            self._sender.send(b"\0")

    def wait(self) -> list[str] | None:
        """Wait for keys or for ``wake``. Return the keys, or None when standard input has ended."""
        ready = {key.fd for key, _ in self._selector.select()}
        if self._receiver.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._receiver.recv(4096)
        if self._fd is None or self._fd not in ready:
            return []
        pressed = os.read(self._fd, 256).decode(errors="ignore")
        if not pressed:
            return None
        return list(_SEQUENCES.sub("", pressed))

    def _read_single_keys(self, cleanup: contextlib.ExitStack) -> None:
        try:
            import termios
            import tty
        except ImportError:  # No such terminals here: the table refreshes, Ctrl-C ends it.
            return
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
        cleanup.callback(termios.tcsetattr, fd, termios.TCSADRAIN, before)
        tty.setcbreak(fd)
        changed = termios.tcgetattr(fd)
        # A process that is stopped would leave the screen half drawn and the shell without echo.
        changed[6][termios.VSUSP] = os.fpathconf(fd, "PC_VDISABLE").to_bytes(1, "big")
        termios.tcsetattr(fd, termios.TCSADRAIN, changed)
        self._fd = fd
        self._selector.register(fd, selectors.EVENT_READ)

    def _wake_on_signals(self, cleanup: contextlib.ExitStack) -> None:
        """Let signals end a wait. One that comes just before it would else not be seen until a key is."""
        before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        cleanup.callback(signal.set_wakeup_fd, before)
        if hasattr(signal, "SIGWINCH"):  # Without a handler nothing is written for it.
            handler = signal.signal(signal.SIGWINCH, lambda number, frame: None)
            cleanup.callback(signal.signal, signal.SIGWINCH, handler)


class Poller:
    """Takes samples in a thread of its own, so that a slow server never makes keys wait."""

    def __init__(
        self,
        first: Sample,
        take: Callable[[str], Sample],
        *,
        filter_text: str,
        interval_s: float,
        on_news: Callable[[], None],
    ) -> None:
        self._take = take
        self._interval_s = interval_s
        self._on_news = on_news
        self._lock = threading.Condition()
        self._now = first
        self._before: Sample | None = None
        self._fault = ""
        self._broken: Exception | None = None
        self._filter_text = filter_text
        self._is_asked = False
        self._is_paused = False
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="kvctl-top", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Not joined: it may be in a call, which ends when the client is closed.
        with self._lock:
            self._is_over = True
            self._lock.notify()

    def newest(self) -> tuple[Sample, Sample | None, str]:
        """Return the newest sample, the one before it, and why there is none newer ("" if all is well)."""
        with self._lock:
            if self._broken is not None:
                raise self._broken
            return self._now, self._before, self._fault

    def want(self, *, filter_text: str, is_paused: bool) -> None:
        """Say what the next samples are for; a new filter gets one at once."""
        with self._lock:
            if filter_text != self._filter_text:
                self._filter_text, self._is_asked = filter_text, True
            self._is_paused = is_paused
            self._lock.notify()

    def _run(self) -> None:
        while (filter_text := self._next()) is not None:
            fault, sample = "", None
            try:
                sample = self._take(filter_text)
            except kvserve.Error as error:
                fault = f"no answer: {error.message}"
            except kvserve.MisuseError:  # The client was closed under us: the end.
                return
            except Exception as error:  # noqa: BLE001  newest() raises it where it is seen.
                with self._lock:
                    self._broken = error
                self._on_news()
                return
            with self._lock:
                self._fault = fault
                if sample is not None:
                    self._before, self._now = self._now, sample
            self._on_news()

    def _next(self) -> str | None:
        """Wait until a sample is due. Return the filter, or None at the end."""
        with self._lock:
            self._lock.wait_for(lambda: self._is_over or self._is_asked, timeout=self._interval_s)
            self._lock.wait_for(lambda: self._is_over or self._is_asked or not self._is_paused)
            self._is_asked = False
            return None if self._is_over else self._filter_text


@contextlib.contextmanager
def raising_on_termination() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit inside the block, so that the terminal is put back."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
