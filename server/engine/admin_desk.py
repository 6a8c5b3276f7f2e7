"""Operations on the cache, as the engine's loop sees them: who carries them out, and what shields the loop.

A fault in such an operation is the operation's own: it is refused with ``FAILED`` and logged, and the
engine goes on serving. Whether the cache is still sound is then a question for the integrity check, which
the loop makes at the next idle moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from server.engine.admin_messages import (
    AdminCall,
    AdminErrorKind,
    AdminProgress,
    AdminRefusal,
    AdminReply,
    CacheEvents,
    CancelAdmin,
    Watch,
)

__all__ = ["AdminDesk", "AdminMessage", "ShieldedDesk"]

T = TypeVar("T")

log = logging.getLogger(__name__)

AdminMessage = AdminReply | AdminProgress | CacheEvents

MAX_FAILURES_IN_A_ROW = 3
"""Turns of long operations that may fail before they are left alone until the next call."""

FAILED = AdminRefusal(AdminErrorKind.FAILED, "the operation failed; the server's log says why")
NO_DESK = AdminRefusal(AdminErrorKind.UNSUPPORTED, "this engine has no cache to administer")


class AdminDesk(Protocol):
    """Carries operations on the cache out. Engine's thread only, and only between steps; nothing blocks.

    Every call is answered by exactly one ``AdminReply`` from ``drain``, sooner or later.
    """

    @property
    def epoch(self) -> int:
        """Return the number of this engine's life: the ``epoch`` of its ``CacheEvents``."""
        ...

    @property
    def is_busy(self) -> bool:
        """Say whether a long operation goes on, so that ``advance`` should be called soon again."""
        ...

    def handle(self, call: AdminCall) -> None:
        """Carry out, or begin."""
        ...

    def cancel(self, key: int) -> None:
        """End a long operation at the next object; it may be left without a reply. Ignores unknown keys."""
        ...

    def watch(self, is_on: bool) -> None:
        """Tell events from now on, or no more."""
        ...

    def advance(self) -> None:
        """Do a bounded piece of the long operations; called once per turn of the loop."""
        ...

    def drain(self) -> list[AdminMessage]:
        """Return what there is to say since the last call, in order."""
        ...


class ShieldedDesk:
    """A desk that never raises; one without a desk behind it refuses everything. Engine's thread only."""

    def __init__(self, desk: AdminDesk | None) -> None:
        self._desk = desk
        self._open: set[int] = set()
        """Calls without an answer."""
        self._said: list[AdminMessage] = []
        self._failures_in_a_row = 0
        self.has_failed = False
        """Something raised since this was last set to False."""

    @property
    def is_busy(self) -> bool:
        """Say whether there is a piece of a long operation to do."""
        desk = self._desk
        if desk is None or self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            return False
        return self._shield("saying whether it is busy", lambda: desk.is_busy) or False

    def accept(self, message: AdminCall | CancelAdmin | Watch) -> None:
        """Take a message from the front end."""
        match message:
            case AdminCall():
                self._handle(message)
            case CancelAdmin():
                self._cancel(message.key)
            case Watch():
                self._watch(message)

    def advance(self) -> None:
        """Do a piece of the long operations. If that fails, all that are open are refused."""
        desk = self._desk
        if desk is None or not self.is_busy:
            return
        failures = self._failures_in_a_row
        self._shield("a long operation", desk.advance)
        if self._failures_in_a_row == failures:
            self._failures_in_a_row = 0
            return
        self._collect()  # what is done is done, however the rest ends
        keys, self._open = sorted(self._open), set()
        for key in keys:
            self._cancel(key)
            self._said.append(AdminReply(key, FAILED))

    def drain(self) -> list[AdminMessage]:
        """Return what there is to say, in order: each call's reply once, and nothing of it afterwards."""
        self._collect()
        said, self._said = self._said, []
        return said

    def _collect(self) -> None:
        if self._desk is None:
            return
        for message in self._shield("saying what happened", self._desk.drain) or ():
            if not isinstance(message, CacheEvents):
                if message.key not in self._open:
                    continue  # cancelled, or refused after a fault
                if isinstance(message, AdminReply):
                    self._open.discard(message.key)
            self._said.append(message)

    def _handle(self, call: AdminCall) -> None:
        desk = self._desk
        if desk is None:
            self._said.append(AdminReply(call.key, NO_DESK))
            return
        self._failures_in_a_row = 0
        self._open.add(call.key)
        self._shield(type(call.op).__name__, lambda: desk.handle(call))
        if self._failures_in_a_row:
            self._open.discard(call.key)
            self._said.append(AdminReply(call.key, FAILED))

    def _cancel(self, key: int) -> None:
        self._open.discard(key)
        desk = self._desk
        if desk is not None:
            self._shield("cancelling an operation", lambda: desk.cancel(key))

    def _watch(self, message: Watch) -> None:
        desk = self._desk
        if desk is not None:
            self._shield("watching", lambda: desk.watch(message.is_on))
        if message.is_on:
            # Says that the watch has begun, and whose events these are: a watcher drops what it heard before.
            epoch = 0 if desk is None else self._shield("saying its epoch", lambda: desk.epoch)
            self._said.append(CacheEvents(epoch or 0, []))

    def _shield(self, what: str, function: Callable[[], T]) -> T | None:
        try:
            return function()
        except Exception:
            self.has_failed = True
            self._failures_in_a_row += 1
            log.exception("administering the cache failed: %s", what)
            return None
