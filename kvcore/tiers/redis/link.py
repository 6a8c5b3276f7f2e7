"""One connection to Redis, owned by one thread: commands out in one batch, replies back in order.

A connection is used again only after every reply of a batch has been read. Whatever else happens to it, a
timeout, an error, an ``abort`` from another thread, drops it: the next batch dials a new one, so a reply can
never be taken for that of another command.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import redis.exceptions as faults
from redis.backoff import NoBackoff
from redis.connection import Connection, UnixDomainSocketConnection, parse_url
from redis.retry import Retry

from kvcore.tiers.errors import TierStartError

__all__ = ["Command", "LinkFailed", "RedisLink", "Refusal"]

Value = Sequence[bytes | bytearray | memoryview]
"""One argument in several pieces, sent without joining them."""
Command = Sequence[bytes | str | int | Value]

_JOIN_BELOW_BYTES = 8192
"""Smaller pieces are copied together: a call into the kernel costs more than the copy."""


class LinkFailed(Exception):
    """The batch has no answer, and the connection is gone. ``fault`` is for operators: no address in it."""

    def __init__(self, fault: str, *, was_timeout: bool, was_aborted: bool, was_stale: bool) -> None:
        super().__init__(fault)
        self.fault = fault
        self.was_timeout = was_timeout
        self.was_aborted = was_aborted
        self.was_stale = was_stale
        """A connection of an earlier batch was found closed: a new one may well work."""


class Refusal:
    """Redis answered one command with an error."""

    __slots__ = ("fault", "is_about_the_value")

    def __init__(self, fault: str, *, is_about_the_value: bool) -> None:
        self.fault = fault
        self.is_about_the_value = is_about_the_value
        """What lies under the key is not what the command is for; Redis itself is well."""

    def __repr__(self) -> str:
        return f"Refusal({self.fault})"


# The first that fits counts: some are bases of others.
_FAULTS: tuple[tuple[type[Exception], str], ...] = (
    (faults.BusyLoadingError, "Redis is loading its data"),
    (faults.AuthenticationError, "Redis refused the credentials"),
    (faults.AuthorizationError, "Redis refused the credentials"),
    (faults.TimeoutError, "Redis did not answer in time"),
    (TimeoutError, "Redis did not answer in time"),
    (faults.ConnectionError, "connection to Redis refused or lost"),
    (faults.OutOfMemoryError, "Redis is out of memory"),
    (faults.ReadOnlyError, "this Redis is read-only"),
    (faults.NoPermissionError, "this user may not run a command"),
    (faults.ResponseError, "Redis refused a command"),
    (faults.InvalidResponse, "what answers is not Redis"),
    (OSError, "connection to Redis refused or lost"),
)


def _describe(error: Exception) -> str:
    return next((text for kind, text in _FAULTS if isinstance(error, kind)), "Redis failed")


class RedisLink:
    """See the module's text. ``call`` and ``close`` belong to one thread; ``abort`` to any."""

    def __init__(self, url: str, *, connect_timeout_s: float, command_timeout_s: float) -> None:
        """Check the URL; nothing is dialled yet. Raise ``TierStartError`` for one that cannot work."""
        try:
            options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
        except ValueError:
            # The library's text may quote the URL, and with it the password.
            raise TierStartError(
                "redis", "the URL is not redis://, rediss:// or unix:// with sound options"
            ) from None
        connection_type: Any = options.pop("connection_class", Connection)
        options |= {
            "socket_connect_timeout": connect_timeout_s,
            "socket_timeout": command_timeout_s,
            "socket_read_size": 1 << 18,
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 0,
            "protocol": 2,
            "decode_responses": False,
        }
        if connection_type is UnixDomainSocketConnection:
            if not options.get("path"):
                raise TierStartError("redis", "the URL names no socket: unix:///path/to/socket")
        else:
            options["socket_keepalive"] = True
        try:
            self._dial: Callable[[], Any] = lambda: connection_type(**options)
            self._dial()  # only builds the object: finds options that do not exist
        except (TypeError, ValueError, faults.RedisError):
            raise TierStartError("redis", "the URL has an option that is not known") from None
        self._lock = threading.Lock()
        self._connection: Any = None
        self._is_calling = False
        self._is_aborted = False
        self.times_connected = 0

    def call(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one go and return their replies; an error reply is a ``Refusal`` in its place.

        Raises:
            LinkFailed: no answer; whether Redis has run any of the commands is not known.
        """
        with self._lock:
            self._is_calling, self._is_aborted = True, False
            was_open = self._connection is not None
        is_whole = False
        try:
            connection = self._connect()
            connection.send_packed_command(_pack(commands), check_health=False)
            replies = [self._read(connection) for _ in commands]
            is_whole = True
            return replies
        except (faults.RedisError, OSError, ValueError, AttributeError, IndexError) as error:
            # The last three: what the library's parser makes of bytes that are not Redis's protocol.
            is_foreign = isinstance(error, (ValueError, AttributeError, IndexError))
            was_timeout = isinstance(error, (faults.TimeoutError, TimeoutError))
            is_lost = isinstance(error, (faults.ConnectionError, OSError)) and not isinstance(
                error, faults.BusyLoadingError
            )
            raise LinkFailed(
                "what answers is not Redis" if is_foreign else _describe(error),
                was_timeout=was_timeout,
                was_aborted=self._is_aborted,
                was_stale=was_open and is_lost and not was_timeout and not self._is_aborted,
            ) from None
        finally:
            with self._lock:
                self._is_calling = False
                is_whole = is_whole and not self._is_aborted
            if not is_whole:
                self.close()

    def abort(self) -> None:
        """Cut the connection under a call that is on its way; it raises at once. Nothing otherwise."""
        with self._lock:
            if not self._is_calling:
                return
            self._is_aborted = True
            dialled = getattr(self._connection, "_sock", None)
        if isinstance(dialled, socket.socket):
            with contextlib.suppress(OSError):
                dialled.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Drop the connection."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(faults.RedisError, OSError):
                connection.disconnect()

    def _connect(self) -> Any:
        if self._connection is None:
            connection = self._dial()
            with self._lock:
                self._connection = connection
            connection.connect()
            self.times_connected += 1
            with self._lock:
                if self._is_aborted:  # while it had no socket to cut
                    raise faults.ConnectionError
        return self._connection

    @staticmethod
    def _read(connection: Any) -> Any:
        try:
            return connection.read_response()
        except faults.ResponseError as error:
            return Refusal(_describe(error), is_about_the_value=str(error).startswith("WRONGTYPE"))


def _pack(commands: Sequence[Command]) -> list[bytes | bytearray | memoryview]:
    """Return the bytes to send: big pieces as they are, the small ones between them joined."""
    packed: list[bytes | bytearray | memoryview] = []
    small = bytearray()
    for command in commands:
        small += b"*%d\r\n" % len(command)
        for argument in command:
            if isinstance(argument, int):
                pieces: Value = (b"%d" % argument,)
            elif isinstance(argument, str):
                pieces = (argument.encode(),)
            elif isinstance(argument, bytes):
                pieces = (argument,)
            else:
                pieces = argument
            small += b"$%d\r\n" % sum(memoryview(piece).nbytes for piece in pieces)
            for piece in pieces:
                if memoryview(piece).nbytes < _JOIN_BELOW_BYTES:
                    small += piece
                else:
                    packed += (small, piece)
                    small = bytearray()
            small += b"\r\n"
    packed.append(small)
    return packed
