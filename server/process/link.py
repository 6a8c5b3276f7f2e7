"""The two ends of the socket pair between the front end and a process of its own.

An anonymous ``socket.socketpair()`` whose one end is inherited at spawn: no name, no port, nobody
else can connect. The ends differ, because their worlds do::

    front end (asyncio)                              process (threads)
    ParentLink: a protocol of the event loop         ChildLink: blocking calls
      send: written once per turn of the loop          send: from any thread, one at a time
      messages: callback, one wake-up per read         receive: from one reader thread

The front end always reads, so the process's writes block only while it is stopped or starved; after
``SEND_TIMEOUT_S`` without progress the process takes it for dead.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

import msgspec

from server.process.errors import LinkClosedError, LinkError
from server.process.frames import MAX_FRAME_BYTES, FrameDecoder, append_frame, encode_frame

__all__ = ["SEND_TIMEOUT_S", "ChildLink", "ParentLink", "open_socket_pair"]

SEND_TIMEOUT_S = 30.0
"""How long the process waits for room in the socket before it gives the front end up."""

_RECEIVE_BYTES = 256 * 1024
_SOCKET_BUFFER_BYTES = 1024 * 1024
_FLUSH_BYTES = 256 * 1024
"""So much is written at once, without waiting for the end of the turn."""

ReceivedT = TypeVar("ReceivedT")


def open_socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return the front end's and the process's end. Neither is inherited unless passed on purpose."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return ours, theirs


class ChildLink(Generic[ReceivedT]):
    """The process's end: blocking, for threads. Owns the file descriptor."""

    def __init__(self, fd: int, message_type: Any, *, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Take over ``fd``; processes started from here do not inherit it.

        ``message_type``: what the front end sends, a tagged struct or a union of them.
        """
        os.set_inheritable(fd, False)  # noqa: FBT003 - not ours
        self._socket = socket.socket(fileno=fd)
        # A limit in the kernel, for sending alone: a Python timeout would apply to the reader too.
        seconds, rest = divmod(send_timeout_s, 1.0)
        limit = struct.pack("@ll", int(seconds), int(rest * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._send_lock = threading.Lock()
        self._broken = False
        self._decoder: FrameDecoder[ReceivedT] = FrameDecoder(message_type)

    def send(self, message: msgspec.Struct) -> None:
        """Send one message from any thread; block while the socket is full.

        Raises ``LinkClosedError``, also for every later call: half a frame may be out. Raises
        ``FrameTooLargeError``; the link stays usable.
        """
        self._write(encode_frame(message))

    def send_all(self, messages: Iterable[msgspec.Struct]) -> None:
        """Send several at once, in order: one system call, and the interpreter is let go of once.

        Raises as ``send``; with ``FrameTooLargeError`` none is sent.
        """
        frames = bytearray()
        for message in messages:
            append_frame(message, frames)
        if frames:
            self._write(frames)

    def receive(self) -> list[ReceivedT]:
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

    def _write(self, frames: bytes | bytearray) -> None:
        with self._send_lock:
            if self._broken:
                raise LinkClosedError("the link is broken")
            try:
                self._socket.sendall(frames)
            except BlockingIOError as error:
                self._broken = True
                raise LinkClosedError("the front end does not read any more") from error
            except OSError as error:
                self._broken = True
                raise LinkClosedError(f"the front end is gone: {error.strerror}") from error


class ParentLink(asyncio.Protocol, Generic[ReceivedT]):
    """The front end's end: lives in the event loop, and every method is called there.

    ``on_message`` gets each message; ``on_closed`` is called once, with the reason, after the last one.
    """

    def __init__(
        self,
        message_type: Any,
        on_message: Callable[[ReceivedT], None],
        on_closed: Callable[[LinkError], None],
    ) -> None:
        """``message_type``: what the process sends, a tagged struct or a union of them."""
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_closed = on_closed
        self._decoder: FrameDecoder[ReceivedT] = FrameDecoder(message_type)
        self._transport: asyncio.WriteTransport | None = None
        self._unsent = bytearray()
        """Frames of this turn of the loop; written together at its end."""
        self._error: LinkError | None = None
        self._closed = self._loop.create_future()

    @classmethod
    async def over(
        cls,
        ours: socket.socket,
        message_type: Any,
        on_message: Callable[[ReceivedT], None],
        on_closed: Callable[[LinkError], None],
    ) -> ParentLink[ReceivedT]:
        """Run a link over ``ours``, which it owns from here on."""
        loop = asyncio.get_running_loop()
        ours.setblocking(False)  # noqa: FBT003 - not ours
        _, link = await loop.create_unix_connection(
            lambda: cls(message_type, on_message, on_closed), sock=ours
        )
        return link

    @property
    def num_unsent_bytes(self) -> int:
        """Return how much the process has yet to take."""
        if self._transport is None:
            return 0
        return len(self._unsent) + self._transport.get_write_buffer_size()

    def send(self, message: msgspec.Struct) -> None:
        """Send without ever blocking; silently nothing once the link is closed (``on_closed`` says so).

        Raises ``FrameTooLargeError``; the link stays usable.
        """
        unsent = self._unsent
        is_first = not unsent
        append_frame(message, unsent)
        if len(unsent) > _FLUSH_BYTES:
            self._flush()
        elif is_first:
            self._loop.call_soon(self._flush)

    def hang_up(self) -> None:
        """Say that nothing more will be sent; what the process still says is heard."""
        self._flush()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    async def close(self) -> None:
        """Close and wait until the descriptor is free. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
            await asyncio.shield(self._closed)

    def _flush(self) -> None:
        if not self._unsent:
            return
        # The transport may keep what it is given: never appended to again.
        frames, self._unsent = self._unsent, bytearray()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frames)

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
        error = self._error or LinkClosedError("the process has closed the link")
        if not self._closed.done():
            self._closed.set_result(None)
        self._on_closed(error)

    def _fail(self, error: LinkError) -> None:
        self._error = error
        if self._transport is not None:
            self._transport.abort()
