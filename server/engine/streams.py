"""The front end's side of requests: events in from the engine, lists of ready events out to readers.

::

    engine --- Outputs ---> StreamTable.dispatch --- by key ---> EventStream --- async for ---> reader
           <-- Submit, Cancel ---------------------- send -------------'

Everything happens on the event loop's thread. Per event the engine costs one dictionary lookup and
one list append, and a reader is woken once however much is ready. A reader that does not read
grows nothing: what waits for it is merged, so it is never more than its own tokens.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Self

from server.engine.messages import (
    Admitted,
    Cancel,
    Failed,
    FailureKind,
    Finished,
    GenerateSpec,
    Progress,
    Refused,
    Tokens,
)
from server.process.quarantine import Quarantine, Witness

__all__ = ["Event", "EventStream", "StreamTable", "merge_events"]

Event = Admitted | Progress | Tokens | Finished | Refused | Failed

_MERGE_ABOVE = 32
"""Events that may wait unmerged."""
_COMPUTED = (FailureKind.NUMERICAL, FailureKind.INTERNAL)
"""How requests fail that a step has computed."""


def merge_events(events: list[Event]) -> list[Event]:
    """Return the same events with the tokens of each sample joined into one, in order of first appearance.

    ``events`` are of one request: ``Admitted`` can only come first, the terminal event only last. Of
    several ``Progress`` the latest stays. The input, and the lists in it, are left as they are.
    """
    by_sample: dict[int, list[Tokens]] = {}
    merged: list[Event] = []
    progress: Progress | None = None
    last: Event | None = None
    for event in events:
        if type(event) is Tokens:
            by_sample.setdefault(event.sample_index, []).append(event)
        elif type(event) is Admitted:
            merged.append(event)
        elif type(event) is Progress:
            progress = event
        else:
            last = event
    if progress is not None:
        merged.append(progress)
    merged.extend(parts[0] if len(parts) == 1 else _join(parts) for parts in by_sample.values())
    if last is not None:
        merged.append(last)
    return merged


def _join(parts: list[Tokens]) -> Tokens:
    first, last = parts[0], parts[-1]
    chain = itertools.chain.from_iterable
    return Tokens(
        key=first.key,
        sample_index=first.sample_index,
        token_ids=list(chain(part.token_ids for part in parts)),
        logprobs=None if first.logprobs is None else list(chain(part.logprobs or () for part in parts)),
        top_logprobs=(
            None if first.top_logprobs is None else list(chain(part.top_logprobs or () for part in parts))
        ),
        finish=last.finish,
    )


class EventStream(AsyncIterator[list[Event]]):
    """The events of one request; implements ``interface.RequestStream``. For one reader.

    The request is cancelled, and what it holds freed, as soon as the reader leaves: by ``aclose()``,
    by being cancelled while it waits, or by dropping the stream. Python drops it at once when a
    loop is left in a plain way; an exception can keep it alive in its traceback, so that who
    wants certainty writes ``async with stream:`` or calls ``aclose()`` in a ``finally``.
    """

    __slots__ = ("_mailbox", "_table", "key")

    def __init__(self, mailbox: _Mailbox, table: StreamTable) -> None:
        self.key = mailbox.key
        self._mailbox = mailbox
        self._table = table

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Event]:
        mailbox = self._mailbox
        if not mailbox.pending:
            if mailbox.ended or mailbox.left:
                raise StopAsyncIteration
            if mailbox.waiter is not None:
                raise RuntimeError("a stream has one reader")
            try:
                await mailbox.wait()
            except BaseException:  # cancelled, or closed while waiting: free, then go on leaving
                self._leave()
                raise
            if mailbox.left:
                raise StopAsyncIteration
        ready, mailbox.pending = mailbox.pending, []
        mailbox.merge_above = _MERGE_ABOVE
        return merge_events(ready) if len(ready) > 1 else ready

    def cancel(self, sample_index: int | None = None) -> None:
        """End one sample, or all of them; the stream goes on to its terminal event.

        Idempotent; never blocks.
        """
        mailbox = self._mailbox
        if mailbox.ended or mailbox.left or mailbox.cancelled:
            return
        if sample_index is None:
            mailbox.cancelled = True
        self._table.send_cancel(Cancel(self.key, sample_index))

    async def aclose(self) -> None:
        """Leave: cancel what is still running and forget what has not been read. Idempotent."""
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._table.forget(self._mailbox)

    def __del__(self) -> None:
        mailbox = self._mailbox
        if not (mailbox.ended or mailbox.left):
            # The garbage collector may run on any thread.
            self._table.forget_from_any_thread(mailbox)

    def __repr__(self) -> str:
        return f"<EventStream {self._mailbox!r}>"


class _Mailbox:
    """What the table keeps of a stream: not the stream itself, so that dropping the stream is noticed."""

    __slots__ = (
        "admitted",
        "cancelled",
        "ended",
        "key",
        "left",
        "merge_above",
        "num_samples",
        "num_tokens",
        "pending",
        "spec",
        "waiter",
    )

    def __init__(self, key: int, num_samples: int, spec: GenerateSpec | None) -> None:
        self.key = key
        self.num_samples = num_samples
        self.num_tokens = 0
        """Of all samples, so far."""
        self.spec = spec
        self.pending: list[Event] = []
        self.merge_above = _MERGE_ABOVE
        self.waiter: asyncio.Future[None] | None = None
        self.admitted = False
        self.cancelled = False
        self.ended = False
        """The terminal event has arrived (it may still wait in ``pending``)."""
        self.left = False
        """The reader has gone."""

    async def wait(self) -> None:
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None

    def push(self, event: Event) -> None:
        pending = self.pending
        pending.append(event)
        waiter = self.waiter
        if waiter is not None:
            self.wake()
        elif len(pending) > self.merge_above:
            self.pending = merge_events(pending)
            # Doubling keeps the copying linear in the number of tokens.
            self.merge_above = max(_MERGE_ABOVE, 2 * self.merge_above, 2 * len(self.pending))

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def __repr__(self) -> str:
        words = [name for name in ("admitted", "cancelled", "ended", "left") if getattr(self, name)]
        return f"{self.key}: {len(self.pending)} waiting {' '.join(words)}".rstrip()


class StreamTable:
    """The open streams of one engine, by key. Draws the keys, and never the same one twice."""

    def __init__(
        self,
        send_cancel: Callable[[Cancel], None],
        *,
        quarantine: Quarantine[GenerateSpec] | None = None,
    ) -> None:
        """``send_cancel`` tells the engine; it must not block, and may ignore an engine that is gone.

        ``quarantine`` is told how requests end.
        """
        self.send_cancel = send_cancel
        self._quarantine = quarantine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mailboxes: dict[int, _Mailbox] = {}
        self._num_waiting = 0
        self._keys = itertools.count(1)

    @property
    def num_open(self) -> int:
        """Return how many requests await their terminal event."""
        return len(self._mailboxes)

    @property
    def num_waiting(self) -> int:
        """Return how many samples belong to requests that have not been admitted."""
        return self._num_waiting

    def open(self, num_samples: int = 1, spec: GenerateSpec | None = None) -> EventStream:
        """Return the stream of a new request, which is to be sent under the stream's ``key``.

        ``spec``: what is sent, where it has to be known should the engine die of it.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        mailbox = _Mailbox(next(self._keys), num_samples, spec)
        self._mailboxes[mailbox.key] = mailbox
        self._num_waiting += num_samples
        return EventStream(mailbox, self)

    def refuse(self, kind: FailureKind, reason: str, *, retry_after_s: float | None = None) -> EventStream:
        """Return a stream that holds nothing but a refusal; the engine never hears of it."""
        stream = self.open()
        self.withdraw(stream.key, kind, reason, retry_after_s=retry_after_s)
        return stream

    def withdraw(
        self, key: int, kind: FailureKind, reason: str, *, retry_after_s: float | None = None
    ) -> None:
        """End a stream with a refusal: its request could not be sent."""
        self.dispatch([Refused(key, kind, reason, retry_after_s)])

    def dispatch(self, events: Iterable[Event]) -> None:
        """Hand each event to its stream; events of streams that have gone are dropped."""
        mailboxes = self._mailboxes
        for event in events:
            mailbox = mailboxes.get(event.key)
            if mailbox is None:
                continue
            if isinstance(event, Tokens):
                mailbox.num_tokens += len(event.token_ids)
            elif not isinstance(event, Progress):
                self._note(mailbox, event)
            mailbox.push(event)

    def fail_all(self, kind: FailureKind, reason: str) -> list[int]:
        """End every open stream with ``Failed``; return the keys of those that had been admitted."""
        mailboxes = list(self._mailboxes.values())
        admitted = [mailbox.key for mailbox in mailboxes if mailbox.admitted]
        self.dispatch([Failed(mailbox.key, kind, reason) for mailbox in mailboxes])
        return admitted

    def witnesses(self) -> list[Witness[GenerateSpec]]:
        """Return what the engine has; first what it may have died of: the latest that it has begun."""
        known = [mailbox for mailbox in self._mailboxes.values() if mailbox.spec is not None]
        known.sort(key=lambda mailbox: -mailbox.key if mailbox.admitted else mailbox.key)
        known.sort(key=lambda mailbox: not mailbox.admitted)
        return [Witness(one.key, one.spec, one.num_tokens) for one in known if one.spec is not None]

    def num_tokens(self, key: int) -> int:
        """Return how many tokens an open request has got; 0 of one that is not."""
        mailbox = self._mailboxes.get(key)
        return 0 if mailbox is None else mailbox.num_tokens

    def forget(self, mailbox: _Mailbox) -> None:
        """The reader has gone: cancel the request unless it has ended."""
        if mailbox.left:
            return
        mailbox.left = True
        mailbox.pending = []
        mailbox.wake()
        if not mailbox.ended:
            self._remove(mailbox)
            if self._quarantine is not None and mailbox.spec is not None:
                self._quarantine.leave(mailbox.key, mailbox.spec)
            if not mailbox.cancelled:
                self.send_cancel(Cancel(mailbox.key))

    def forget_from_any_thread(self, mailbox: _Mailbox) -> None:
        """As ``forget``, soon. With the event loop gone there is nothing left to tell."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.forget, mailbox)

    def _note(self, mailbox: _Mailbox, event: Admitted | Finished | Refused | Failed) -> None:
        if isinstance(event, Admitted):
            if not mailbox.admitted:
                mailbox.admitted = True
                self._num_waiting -= mailbox.num_samples
        else:
            mailbox.ended = True
            self._remove(mailbox)
            if self._quarantine is not None and self._quarantine.is_active:
                if isinstance(event, Finished) or event.kind in _COMPUTED:
                    self._quarantine.acquit(mailbox.key)
                else:
                    self._quarantine.release(mailbox.key)

    def _remove(self, mailbox: _Mailbox) -> None:
        del self._mailboxes[mailbox.key]
        if not mailbox.admitted:
            self._num_waiting -= mailbox.num_samples
