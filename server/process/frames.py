"""Cut a byte stream into messages and back: MessagePack behind a length.

A frame on the wire::

    | length: u32, big endian | payload: one MessagePack value, ``length`` bytes |

Nothing is trusted: a length beyond the limit is refused before anything is allocated for it, and
the payload is decoded into the declared message types or not at all. No pickle. Pure: no sockets.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from server.process.errors import FrameTooLargeError, MalformedFrameError

__all__ = ["MAX_FRAME_BYTES", "FrameDecoder", "append_frame", "encode_frame"]

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""No honest message comes near: a prompt is limited by the RPC's 4 MiB, a step by its sequences."""

_HEADER_BYTES = 4
_HEADER = bytes(_HEADER_BYTES)
_encode_into = msgspec.msgpack.Encoder().encode_into

MessageT = TypeVar("MessageT")


def append_frame(message: msgspec.Struct, buffer: bytearray, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
    """Append ``message`` to ``buffer`` as one frame; raise ``FrameTooLargeError`` and leave it as it was."""
    start = len(buffer)
    buffer += _HEADER
    _encode_into(message, buffer, start + _HEADER_BYTES)
    size = len(buffer) - start - _HEADER_BYTES
    if size > max_bytes:
        del buffer[start:]
        raise FrameTooLargeError(f"a message of {size} bytes exceeds the link's {max_bytes}")
    buffer[start : start + _HEADER_BYTES] = size.to_bytes(_HEADER_BYTES, "big")


def encode_frame(message: msgspec.Struct, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Return ``message`` as one frame. Raises ``FrameTooLargeError``."""
    buffer = bytearray()
    append_frame(message, buffer, max_bytes=max_bytes)
    return bytes(buffer)


class FrameDecoder(Generic[MessageT]):
    """Collect bytes as they arrive and return the messages they complete.

    Whole frames are decoded in place; a frame in pieces is copied once. Not thread-safe. After an
    error the stream has lost its place: close the link.
    """

    __slots__ = ("_buffer", "_decode", "_max_bytes", "_needed")

    def __init__(self, message_type: Any, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
        """Expect messages of ``message_type``: a tagged struct, or a union of them."""
        self._decode = msgspec.msgpack.Decoder(message_type).decode
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._needed = _HEADER_BYTES
        """Bytes that have to be in the buffer before looking at it is worth it."""

    @property
    def num_waiting_bytes(self) -> int:
        """Return how many bytes of an incomplete frame are held."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[MessageT]:
        """Take the next bytes; return complete messages in order, possibly none.

        Raises ``FrameTooLargeError`` or ``MalformedFrameError``.
        """
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        view = memoryview(data)
        size = len(data)
        messages: list[MessageT] = []
        start = 0
        while size - start >= _HEADER_BYTES:
            length = int.from_bytes(view[start : start + _HEADER_BYTES], "big")
            if length > self._max_bytes:
                raise FrameTooLargeError(f"a frame of {length} bytes exceeds the link's {self._max_bytes}")
            stop = start + _HEADER_BYTES + length
            if stop > size:
                self._needed = stop - start
                break
            try:
                messages.append(self._decode(view[start + _HEADER_BYTES : stop]))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                reason = f"a frame of {length} bytes is no known message: {error}"
                raise MalformedFrameError(reason) from error
            start = stop
        else:
            self._needed = _HEADER_BYTES
        if start < size:
            self._buffer += view[start:]
        return messages
