"""Which requests may go into a process that has died before: one that kills it is not fed to it for ever.

A process that dies does not say what it died of. So whoever was in it is suspected, and when a suspect comes
again it goes in as the only one of its kind, beside requests that nobody suspects::

    in the process at its death --> suspect --> comes again: waits for its turn --> on probation
                                       |                                               |
        forgotten, after ``keep_s`` <--'               it ends, the process lives: forgotten
                                                       the process dies: quarantined for ``keep_s``

Where very many were in the process only those first in line for suspicion are tried one by one; the others
go in freely, until they have seen a second death. A suspect that gets further than it had come when the
process died makes room for the next one before it ends; should the process still die, nobody can say of which
of the two, and neither gets that benefit again. With this a request has killed the process three times at the
most, twice as a rule.

Requests are known by a keyed digest of what they compute. As long as nobody is suspected none is taken, but
of requests whose callers leave before the end: the one thing asked of a request is ``is_active``.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NewType, TypeVar

__all__ = ["Quarantine", "QuarantineCounts", "Witness"]

log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
Fingerprint = NewType("Fingerprint", bytes)

MAX_REMEMBERED = 1024
"""Suspects, and as many in quarantine; the oldest are forgotten first."""
MAX_LEFT = 128
"""Requests whose callers have gone, and which the process may be busy with yet."""
LEFT_SLACK_S = 1.0
"""A turn that begins so long after the caller has gone knows of it."""
PROGRESS_MARGIN = 16
"""So much further than at the death is past what killed the process."""


@dataclass(frozen=True, slots=True)
class Witness(Generic[RequestT]):
    """A request that was with the process when it died."""

    ticket: int
    request: RequestT
    progress: int = 0
    """How far it had come, in units of the caller's; such as tokens."""


@dataclass(frozen=True, slots=True)
class QuarantineCounts:
    """For metrics: three that are so now, two since the beginning."""

    num_suspects: int = 0
    num_waiting: int = 0
    """Requests that wait for their probation."""
    num_in_quarantine: int = 0
    num_quarantined: int = 0
    num_refused: int = 0


@dataclass(slots=True)
class _Suspect:
    until_s: float
    num_deaths: int = 0
    progress: int = 0
    is_held: bool = False
    """It goes in on probation alone."""


@dataclass(frozen=True, slots=True)
class _Waiter(Generic[RequestT]):
    request: RequestT
    fingerprint: Fingerprint
    deadline_s: float | None
    """By the clock."""


class Quarantine(Generic[RequestT]):
    """Stands between those who submit requests and one process. One thread; nothing blocks.

    Every request has a ``ticket``, a number that is never used twice. While ``is_active`` requests are
    handed in by ``submit``, and their ends are told by ``acquit`` or ``release``; ``leave``, ``turn_began``
    and ``died`` are told always.
    """

    def __init__(
        self,
        name: str,
        *,
        encode: Callable[[RequestT], bytes],
        send: Callable[[int, RequestT, float | None], None],
        refuse: Callable[[int, RequestT], None],
        keep_s: float,
        max_held: int,
        now: Callable[[], float] = time.monotonic,
        key: bytes | None = None,
    ) -> None:
        """``name`` of the process is for the log.

        ``encode`` says what a request computes, and for whom, but not under which id or until when. ``send``
        hands it to the process, with the seconds left, ``refuse`` ends it; neither raises. ``keep_s``: how
        long suspects are remembered and requests are quarantined; 0 switches it off. Of those in the process
        at a death the first ``max_held`` are tried one by one when they come again. ``key``: of the digests.
        """
        self._name = name
        self._encode = encode
        self._send = send
        self._refuse = refuse
        self._now = now
        self._key = secrets.token_bytes(32) if key is None else key
        self._keep_s = keep_s
        self._max_held = max_held
        self._suspects: dict[Fingerprint, _Suspect] = {}
        """The latest last."""
        self._quarantined: dict[Fingerprint, float] = {}
        """Until when; the latest last."""
        self._probationer: int | None = None
        self._inside: dict[int, Fingerprint] = {}
        """Suspects that are in the process, the probationer among them."""
        self._waiting: dict[int, _Waiter[RequestT]] = {}
        """In the order of their coming. Empty whenever there is no probationer."""
        self._left: dict[int, tuple[Fingerprint, float]] = {}
        """Still in the process, perhaps; and since when nobody waits for them."""
        self._accused: list[Fingerprint] = []
        self._witnesses: list[Witness[RequestT]] = []
        """Both between ``died`` and ``judge``: of those who had left, and of the others."""
        self._num_quarantined = 0
        self._num_refused = 0
        self.is_active = False
        """Whether anybody is suspected, so that requests have to be looked at."""

    @property
    def counts(self) -> QuarantineCounts:
        return QuarantineCounts(
            len(self._suspects),
            len(self._waiting),
            len(self._quarantined),
            self._num_quarantined,
            self._num_refused,
        )

    @property
    def probationer(self) -> int | None:
        """Return the ticket of the suspect that is in the process on probation."""
        return self._probationer

    def is_waiting(self, ticket: int) -> bool:
        """Say whether the process has not been given this request yet."""
        return ticket in self._waiting

    def submit(self, ticket: int, request: RequestT, deadline_s: float | None) -> None:
        """Send the request, refuse it, or let it wait for its turn. ``deadline_s``: seconds left."""
        now_s = self._now()
        self._expire(now_s)
        fingerprint = self._fingerprint(request)
        suspect = self._suspects.get(fingerprint)
        if fingerprint in self._quarantined:
            self._num_refused += 1
            log.warning("a request in quarantine was refused (%s)", _short(fingerprint))
            self._refuse(ticket, request)
        elif suspect is None:
            self._send(ticket, request, deadline_s)
        elif not suspect.is_held:
            self._inside[ticket] = fingerprint
            self._send(ticket, request, deadline_s)
        else:
            at_s = None if deadline_s is None else now_s + deadline_s
            self._waiting[ticket] = _Waiter(request, fingerprint, at_s)
            self._let_in()

    def acquit(self, ticket: int) -> None:
        """A request was computed, and the process lives."""
        fingerprint = self._inside.get(ticket)
        if fingerprint is not None:
            self._suspects.pop(fingerprint, None)
            self.release(ticket)

    def release(self, ticket: int) -> None:
        """A request has ended without having been computed, which proves nothing."""
        if self._inside.pop(ticket, None) is not None:
            if ticket == self._probationer:
                self._probationer = None
            self._let_in()

    def advance(self, ticket: int, progress: int) -> None:
        """Say how far the probationer has come: past the point of the death it makes room for the next."""
        if ticket != self._probationer:
            return
        suspect = self._suspects.get(self._inside[ticket])
        if suspect is None or (suspect.num_deaths == 1 and progress > suspect.progress + PROGRESS_MARGIN):
            self._probationer = None
            self._let_in()

    def leave(self, ticket: int, request: RequestT) -> None:
        """A request's caller has gone before its end.

        The process may be in the middle of it, so that it stays what it is until a later turn has begun.
        Costs a digest, so that nothing large is kept.
        """
        if ticket in self._waiting:
            self.withdraw(ticket)
        elif self._keep_s:
            self._left[ticket] = self._fingerprint(request), self._now()
            if len(self._left) > MAX_LEFT:
                self._forget_left(next(iter(self._left)))

    def withdraw(self, ticket: int) -> RequestT:
        """Take back a request that waits: its caller wants it no more. Raises ``KeyError``."""
        request = self._waiting.pop(ticket).request
        self._note()
        return request

    def turn_began(self, at_s: float) -> None:
        """The process lives, and began what it does at ``at_s`` by the clock. To be told regularly."""
        if self._left:
            known = [t for t, (_, left_s) in self._left.items() if left_s + LEFT_SLACK_S <= at_s]
            for ticket in known:
                self._forget_left(ticket)
        if self.is_active:
            self._expire(self._now())

    def died(self, witnesses: Iterable[Witness[RequestT]]) -> None:
        """The process has died, by itself or by a watchdog; ``witnesses`` had been submitted and not ended.

        The most suspicious come first. Nobody waits here any more: whatever is open has to be failed now,
        and what takes longer is done in ``judge``.
        """
        waiting, inside, probationer = self._waiting, self._inside, self._probationer
        self._accused = [fingerprint for fingerprint, _ in self._left.values()]
        self._witnesses = [one for one in witnesses if one.ticket not in waiting]
        self._forget_process()
        if probationer is not None:
            self._convict(inside.pop(probationer), inside.values())
        self._note()

    def judge(self) -> None:
        """Suspect whom ``died`` has been told of. Costs a digest each."""
        accused, self._accused = self._accused, []
        witnesses, self._witnesses = self._witnesses, []
        if not self._keep_s:
            return
        until_s = self._now() + self._keep_s
        seen: set[Fingerprint] = set()
        all_of_them = itertools.chain(
            ((fingerprint, 0) for fingerprint in accused),
            ((self._fingerprint(one.request), one.progress) for one in witnesses),
        )
        for fingerprint, progress in itertools.islice(all_of_them, MAX_REMEMBERED):
            if fingerprint in self._quarantined:
                continue
            suspect = self._suspects.pop(fingerprint, None) or _Suspect(until_s)
            suspect.until_s = until_s
            suspect.progress = max(suspect.progress, progress)
            if fingerprint not in seen:
                seen.add(fingerprint)
                suspect.num_deaths += 1
                suspect.is_held |= len(seen) <= self._max_held or suspect.num_deaths > 1
            self._suspects[fingerprint] = suspect
        _forget_oldest(self._suspects)
        if seen:
            log.warning(
                "%d different requests were in the %s process when it died; as they come again,"
                " suspects are let in one at a time",
                len(seen),
                self._name,
            )
        self._note()

    def close(self) -> None:
        """The process is ended on purpose: nobody is suspected, and nobody waits any more."""
        self._suspects.clear()
        self._quarantined.clear()
        self._forget_process()
        self._note()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if something cannot be. For tests."""
        assert self._probationer is not None or not self._waiting
        assert self._probationer is None or self._probationer in self._inside
        assert not self._inside.keys() & self._waiting.keys()
        assert not self._suspects.keys() & self._quarantined.keys()
        assert max(len(self._suspects), len(self._quarantined)) <= MAX_REMEMBERED
        assert len(self._left) <= MAX_LEFT
        times = [suspect.until_s for suspect in self._suspects.values()]
        assert times == sorted(times)
        assert list(self._quarantined.values()) == sorted(self._quarantined.values())
        assert self.is_active == bool(self._suspects or self._quarantined or self._inside or self._waiting)
        held = [
            ticket
            for ticket, fingerprint in self._inside.items()
            if fingerprint in self._suspects and self._suspects[fingerprint].num_deaths > 1
        ]
        assert held in ([], [self._probationer])

    def _fingerprint(self, request: RequestT) -> Fingerprint:
        return Fingerprint(hmac.digest(self._key, self._encode(request), "sha256"))

    def _let_in(self) -> None:
        """Send who waits and need not any more, in order; the first of the others, if it is its turn."""
        for ticket in list(self._waiting):
            waiter = self._waiting.get(ticket)
            is_suspected = waiter is not None and waiter.fingerprint in self._suspects
            if waiter is None or (is_suspected and self._probationer is not None):
                continue
            del self._waiting[ticket]
            if is_suspected:
                self._probationer = ticket
                self._inside[ticket] = waiter.fingerprint
            left_s = None if waiter.deadline_s is None else max(0.0, waiter.deadline_s - self._now())
            self._send(ticket, waiter.request, left_s)
        self._note()

    def _convict(self, fingerprint: Fingerprint, others: Iterable[Fingerprint]) -> None:
        """Quarantine the probationer, unless another suspect that was in the process may be guilty."""
        suspect = self._suspects.get(fingerprint)
        if suspect is None:
            return
        if suspect.num_deaths == 1 and any(one != fingerprint and one in self._suspects for one in others):
            return
        del self._suspects[fingerprint]
        self._quarantined[fingerprint] = self._now() + self._keep_s
        _forget_oldest(self._quarantined)
        self._num_quarantined += 1
        log.error(
            "a request is quarantined for %g s: the %s process has died of it %d times (%s)",
            self._keep_s,
            self._name,
            suspect.num_deaths + 1,
            _short(fingerprint),
        )

    def _expire(self, now_s: float) -> None:
        """Forget whose time is over. Both tables are in the order of their times."""
        num_before = len(self._suspects) + len(self._quarantined)
        while self._quarantined and self._quarantined[one := next(iter(self._quarantined))] <= now_s:
            del self._quarantined[one]
        while self._suspects and self._suspects[one := next(iter(self._suspects))].until_s <= now_s:
            del self._suspects[one]
        if len(self._suspects) + len(self._quarantined) < num_before:
            self._let_in()

    def _forget_left(self, ticket: int) -> None:
        del self._left[ticket]
        self.release(ticket)

    def _forget_process(self) -> None:
        self._probationer = None
        self._inside, self._waiting, self._left = {}, {}, {}

    def _note(self) -> None:
        self.is_active = bool(self._suspects or self._quarantined or self._inside or self._waiting)


ValueT = TypeVar("ValueT")


def _forget_oldest(table: dict[Fingerprint, ValueT]) -> None:
    while len(table) > MAX_REMEMBERED:
        del table[next(iter(table))]


def _short(fingerprint: Fingerprint) -> str:
    """Return what tells requests apart in the log; nothing of them can be told from it."""
    return fingerprint.hex()[:12]
