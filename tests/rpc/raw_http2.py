"""A client of HTTP/2 that does what no client may: frames are written as a test asks, whatever they break."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Connection", "Ended", "framed", "headers_of", "open_connection"]

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ACK, END_STREAM, END_HEADERS = 1, 1, 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_STATIC = {8: "200", 9: "204", 10: "206", 11: "304", 12: "400", 13: "404", 14: "500"}
"""Entries of HPACK's static table that have a status; names of others are not needed here."""
_NUM_STATIC = 61

Pair = tuple[str, str]


@dataclass
class Ended:
    """What the server has said of one stream."""

    headers: list[Pair] = field(default_factory=list)
    data: bytes = b""
    reset: int | None = None
    """The code of RST_STREAM."""
    is_over: bool = False

    @property
    def status(self) -> int | None:
        """The code of gRPC; None if the stream ended without one."""
        return next((int(value) for name, value in self.headers if name == "grpc-status"), None)

    @property
    def message(self) -> str:
        return next((value for name, value in self.headers if name == "grpc-message"), "")


def framed(message: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """Return a message behind gRPC's prefix, which may lie about its length and compression."""
    return struct.pack(">BI", flag, len(message) if length is None else length) + message


def headers_of(path: str, more: Iterable[Pair] = (), *, without: Iterable[str] = ()) -> bytes:
    """Return the header block of a call."""
    pairs = [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"),
        ("te", "trailers"), ("content-type", "application/grpc"),
    ]  # fmt: skip
    left_out = set(without)
    return b"".join(_literal(*pair) for pair in [*(p for p in pairs if p[0] not in left_out), *more])


def _literal(name: str, value: str) -> bytes:
    return b"\0" + b"".join(_integer(len(text), 7) + text for text in (name.encode(), value.encode()))


def _integer(value: int, num_bits: int) -> bytes:
    most = (1 << num_bits) - 1
    if value < most:
        return bytes([value])
    out, value = [most], value - most
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Connection:
    """One connection. ``streams`` fills while somebody waits in :meth:`ended` or :meth:`let_go`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._table: list[Pair] = []
        """HPACK's dynamic table, the newest first."""
        self._next_stream = 1
        self._changed = asyncio.Event()
        self.streams: dict[int, Ended] = {}
        self.goaway: int | None = None
        self.num_pings_answered = 0
        self.is_closed = False
        self._listening = asyncio.create_task(self._listen())

    def send(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        """Write a frame."""
        self._writer.write(frame(kind, flags, stream, payload))

    def write(self, data: bytes) -> None:
        """Write bytes as they are."""
        self._writer.write(data)

    async def flush(self) -> None:
        """Wait until what was written is on its way. Raises ``ConnectionError`` once that is cut."""
        await self._writer.drain()

    def begin(
        self, path: str, more: Iterable[Pair] = (), *, without: Iterable[str] = (), flags: int = 4
    ) -> int:
        """Send the headers of a call; return its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.streams[stream] = Ended()
        self.send(HEADERS, END_HEADERS, stream, headers_of(path, more, without=without))
        return stream

    def call(self, path: str, body: bytes, more: Iterable[Pair] = ()) -> int:
        """Send a call with these bytes for its whole body; return its stream."""
        stream = self.begin(path, more)
        self.send(DATA, END_STREAM, stream, body)
        return stream

    async def ended(self, stream: int, *, timeout_s: float = 20.0) -> Ended:
        """Return how a stream ended; if the connection did, what was known then."""
        found = self.streams[stream]
        async with asyncio.timeout(timeout_s):
            while not found.is_over and not self.is_closed:
                self._changed.clear()
                await self._changed.wait()
        return found

    async def let_go(self, *, timeout_s: float = 20.0) -> None:
        """Wait until the server wants no more of this connection: it has said so, or closed it."""
        async with asyncio.timeout(timeout_s):
            while self.goaway is None and not self.is_closed:
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        self._listening.cancel()
        self._writer.close()
        await asyncio.gather(self._listening, return_exceptions=True)

    # -- what comes ---------------------------------------------------------------------------------

    async def _listen(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._take(kind, flags, stream, payload)
                self._changed.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_closed = True
            self._changed.set()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        found = self.streams.get(stream, Ended())
        if kind == SETTINGS and not flags & ACK:
            self.send(SETTINGS, ACK, 0)
        elif kind == PING:
            if flags & ACK:
                self.num_pings_answered += 1
            else:
                self.send(PING, ACK, 0, payload)
        elif kind == GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == RST_STREAM:
            found.reset, found.is_over = int.from_bytes(payload, "big"), True
        elif kind == HEADERS:
            found.headers += self._decode(payload)
        elif kind == DATA:
            found.data += payload
            if payload:
                for one in (0, stream):
                    self.send(WINDOW_UPDATE, 0, one, struct.pack(">I", len(payload)))
        if kind in (HEADERS, DATA) and flags & END_STREAM:
            found.is_over = True

    def _decode(self, block: bytes) -> list[Pair]:
        pairs, position = [], 0
        while position < len(block):
            first = block[position]
            if first & 0x80:
                index, position = _read_integer(block, position, 7)
                pairs.append(self._entry(index))
            elif first & 0xE0 == 0x20:  # size of the table: kept large enough
                _, position = _read_integer(block, position, 5)
            else:
                is_kept = bool(first & 0x40)
                index, position = _read_integer(block, position, 6 if is_kept else 4)
                if index:
                    name = self._entry(index)[0]
                else:
                    name, position = _read_text(block, position)
                value, position = _read_text(block, position)
                pairs.append((name, value))
                if is_kept:
                    self._table.insert(0, (name, value))
        return pairs

    def _entry(self, index: int) -> Pair:
        if index > _NUM_STATIC:
            return self._table[index - _NUM_STATIC - 1]
        return ":status" if index in _STATIC else f"static-{index}", _STATIC.get(index, "")


def _read_integer(block: bytes, position: int, num_bits: int) -> tuple[int, int]:
    most = (1 << num_bits) - 1
    value, position, shift = block[position] & most, position + 1, 0
    if value < most:
        return value, position
    while True:
        byte, position = block[position], position + 1
        value += (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def _read_text(block: bytes, position: int) -> tuple[str, int]:
    is_huffman = bool(block[position] & 0x80)
    length, position = _read_integer(block, position, 7)
    text = block[position : position + length]
    return "(huffman)" if is_huffman else text.decode("latin-1"), position + length


async def open_connection(port: int) -> Connection:
    """Connect to a server on this machine; large windows, so that none of them is in the way."""
    connection = Connection(*await asyncio.open_connection("127.0.0.1", port))
    connection.write(_PREFACE)
    connection.send(SETTINGS, 0, 0, struct.pack(">HIHI", 4, 1 << 24, 5, 1 << 20))
    connection.send(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 24))
    await connection.flush()
    return connection
