"""The two ends of the socket pair between the front end and an engine process.

An anonymous ``socket.socketpair()`` whose one end is inherited at spawn: no name, no port, nobody
else can connect. The ends differ, because their worlds do::

    front end (asyncio)                              engine process (threads)
    ParentLink: a protocol of the event loop         ChildLink: blocking calls
      send: into the transport's buffer                send: from any thread, one at a time
      messages: callback, one wake-up per read         receive: from one reader thread

The front end always reads, so the engine's writes block only while it is stopped or starved; after
``SEND_TIMEOUT_S`` without progress the engine takes it for dead.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import cast

import msgspec

from server.engine.control import FromChild, Start
from server.engine.errors import LinkClosedError, LinkError
from server.engine.frames import MAX_FRAME_BYTES, FrameDecoder, encode_frame
from server.engine.messages import ToEngine

__all__ = ["SEND_TIMEOUT_S", "ChildLink", "ParentLink", "open_socket_pair"]

SEND_TIMEOUT_S = 30.0
"""How long the engine waits for room in the socket before it gives the front end up."""

_RECEIVE_BYTES = 256 * 1024
_SOCKET_BUFFER_BYTES = 1024 * 1024


def open_socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return the front end's and the engine's end. Neither is inherited unless passed on purpose."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return ours, theirs


class ChildLink:
    """The engine's end: blocking, for threads. Owns the file descriptor."""

    def __init__(self, fd: int, *, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Take over ``fd``; processes started from here do not inherit it."""
        os.set_inheritable(fd, False)  # noqa: FBT003 - not ours
        self._socket = socket.socket(fileno=fd)
        # A limit in the kernel, for sending alone: a Python timeout would apply to the reader too.
        seconds, rest = divmod(send_timeout_s, 1.0)
        limit = struct.pack("@ll", int(seconds), int(rest * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._send_lock = threading.Lock()
        self._broken = False
        self._decoder: FrameDecoder[Start | ToEngine] = FrameDecoder(Start | ToEngine)

    def send(self, message: msgspec.Struct) -> None:
        """Send one message from any thread; block while the socket is full.

        Raises ``LinkClosedError``, also for every later call: half a frame may be out.
        """
        frame = encode_frame(message)
        with self._send_lock:
            if self._broken:
                raise LinkClosedError("the link is broken")
            try:
                self._socket.sendall(frame)
            except BlockingIOError as error:
                self._broken = True
                raise LinkClosedError("the front end does not read any more") from error
            except OSError as error:
                self._broken = True
                raise LinkClosedError(f"the front end is gone: {error.strerror}") from error

    def receive(self) -> list[Start | ToEngine]:
        """Block for what comes next; return at least one message. One thread only.

        Raises ``LinkClosedError`` at the end of the stream, other ``LinkError`` for bad frames.
        """
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise LinkClosedError(f"the link failed: {error.strerror}") from error
            if not data:
                raise LinkClosedError("the front end has closed the link")
            if messages := self._decoder.feed(data):
                return messages

    def close(self) -> None:
        """End the link; a thread that is blocked in it returns with ``LinkClosedError``."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other side was quicker.
            return
        finally:
            self._socket.close()


class ParentLink(asyncio.Protocol):
    """The front end's end: lives in the event loop, and every method is called there.

    ``on_message`` gets each message; ``on_closed`` is called once, with the reason, after the last one.
    """

    def __init__(
        self, on_message: Callable[[FromChild], None], on_closed: Callable[[LinkError], None]
    ) -> None:
        self._on_message = on_message
        self._on_closed = on_closed
        self._decoder: FrameDecoder[FromChild] = FrameDecoder(FromChild)
        self._transport: asyncio.WriteTransport | None = None
        self._error: LinkError | None = None
        self._closed = asyncio.get_running_loop().create_future()

    @classmethod
    async def over(
        cls,
        ours: socket.socket,
        on_message: Callable[[FromChild], None],
        on_closed: Callable[[LinkError], None],
    ) -> ParentLink:
        """Run a link over ``ours``, which it owns from here on."""
        loop = asyncio.get_running_loop()
        ours.setblocking(False)  # noqa: FBT003 - not ours
        _, link = await loop.create_unix_connection(lambda: cls(on_message, on_closed), sock=ours)
        return link

    @property
    def num_unsent_bytes(self) -> int:
        """Return how much the engine has yet to take."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def send(self, message: Start | ToEngine) -> None:
        """Send without ever blocking; silently nothing once the link is closed (``on_closed`` says so).

        Raises ``FrameTooLargeError``; the link stays usable.
        """
        frame = encode_frame(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    async def close(self) -> None:
        """Close and wait until the descriptor is free. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
            await asyncio.shield(self._closed)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none by inheritance.
        self._transport = cast("asyncio.WriteTransport", transport)
        # Nobody pauses here: what can wait is bounded by who may submit, see num_unsent_bytes.
        self._transport.set_write_buffer_limits(high=MAX_FRAME_BYTES)

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._decoder.feed(data)
        except LinkError as error:
            self._fail(error)
            return
        on_message = self._on_message
        for message in messages:
            on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        error = self._error or LinkClosedError("the engine has closed the link")
        if not self._closed.done():
            self._closed.set_result(None)
        self._on_closed(error)

    def _fail(self, error: LinkError) -> None:
        self._error = error
        if self._transport is not None:
            self._transport.abort()
