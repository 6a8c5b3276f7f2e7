"""The open calls, what waits of them, and how they end.

A call ends exactly once, and with it its lease, unless a thread is working with the model on its inputs: then
that thread releases it afterwards (:meth:`CallDesk.let_go`). Methods marked *locked* are called with ``lock``
held and put what is to be done without it into an :class:`Outgoing`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from kvcore.clock import Clock
from server.predict.batcher import Batcher
from server.predict.calls import OpenCall, estimate_tokens
from server.predict.deadlines import Deadlines
from server.predict.errors import ExpiredError, PredictError, PredictLostError
from server.predict.failures import call_failed
from server.predict.host_stats import HostStats
from server.predict.messages import FromPredict
from server.predict.options import PredictOptions
from server.predict.outgoing import Outgoing
from server.predict.quick import QuickCalls

__all__ = ["EXPIRED_REASON", "CallDesk"]

log = logging.getLogger(__name__)

EXPIRED_REASON = "the deadline passed before it was computed"
CLOSED_REASON = "the server is shutting down"


class CallDesk:
    """See the module's text. Any thread."""

    def __init__(
        self,
        options: PredictOptions,
        *,
        clock: Clock,
        send: Callable[[FromPredict], None],
        send_all: Callable[[Sequence[FromPredict]], None] | None,
    ) -> None:
        self._send = send
        self._send_all = send_all
        self._clock = clock
        self._calls: dict[int, OpenCall] = {}
        self._num_estimated = 0
        """Tokens of calls that are not prepared yet."""
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        """Notified when there is something to compute and ``is_waiting``."""
        self.is_waiting = False
        """The compute thread has nothing to do, or holds a batch back."""
        self.num_added = 0
        """Calls that were let wait for a batch so far."""
        self.max_batch_rows = options.max_batch_tokens
        self.quick = QuickCalls()
        """What the reader thread is to compute itself, when all is here that came together."""
        self._none_open = threading.Condition(self.lock)
        self._is_closing = False
        self.deadlines: Deadlines[OpenCall] = Deadlines()
        self.batcher: Batcher[OpenCall] = Batcher(
            max_batch_tokens=options.max_batch_tokens,
            max_delay_s=options.max_delay_s,
            max_waiting_tokens=options.max_waiting_tokens,
        )
        self.stats = HostStats()

    @property
    def num_calls(self) -> int:
        """Return how many are open."""
        return len(self._calls)

    def open(self, call: OpenCall, *, wake_by: Callable[[float], None]) -> None:
        """Enter a call, or end it at once: too much waits, its deadline has come, the server is closing.

        ``wake_by`` is told of its deadline, locked.
        """
        num_tokens = estimate_tokens(call.inputs)
        with self.lock:
            if call.call_id in self._calls:
                log.error("call %d came twice", call.call_id)
                call.is_ended = True
                return
            self._calls[call.call_id] = call
            try:
                if self._is_closing:
                    raise PredictLostError(CLOSED_REASON)
                self.batcher.refuse_beyond(num_tokens, num_elsewhere=self._num_estimated)
                if call.deadline_s is not None:
                    if call.deadline_s <= call.received_s:
                        raise ExpiredError(EXPIRED_REASON)
                    self.deadlines.add(call, call.deadline_s)
                    wake_by(call.deadline_s)
            except PredictError as error:
                out = Outgoing()
                self.fail(call, error, out)
            else:
                call.num_estimated = num_tokens
                self._num_estimated += num_tokens
                return
        self.flush(out)

    def add_to_batcher(self, call: OpenCall, *, is_padded: bool, out: Outgoing) -> None:
        """Let a call that is prepared wait for its batch; or fail it, if too much does. Locked."""
        self._num_estimated -= call.num_estimated
        call.num_estimated = 0
        now_s = self._clock.now()
        call.note_prepared(now_s)
        try:
            self.batcher.add(
                call.key,
                call,
                [item.num_tokens or 1 for item in call.items],
                now_s=now_s,
                deadline_s=call.deadline_s,
                is_padded=is_padded,
            )
        except PredictError as error:
            self.fail(call, error, out)
            return
        self.num_added += 1
        if self.is_waiting:
            self.work.notify()

    def take_quick(self, out: Outgoing) -> list[OpenCall]:
        """Return quick calls of one model, in use now: a batch; none if anything else waits. Locked."""
        while self.quick and not self.batcher.num_waiting_inputs:
            now_s = self._clock.now()
            calls = []
            for call in self.quick.take(self.max_batch_rows):
                if call.is_ended:
                    continue
                if call.deadline_s is not None and call.deadline_s <= now_s:
                    self.fail(call, ExpiredError(EXPIRED_REASON), out)
                    continue
                self._num_estimated -= call.num_estimated
                call.num_estimated = 0
                call.is_in_use = True
                calls.append(call)
            if calls:
                return calls
        return []

    def cancel(self, call_id: int) -> None:
        """End a call that nobody waits for; unknown ones are ignored."""
        out = Outgoing()
        with self.lock:
            call = self._calls.get(call_id)
            if call is None:
                return
            self.stats.count_cancelled(call)
            out.messages.append(call_failed(call_id, PredictLostError("the call was cancelled")))
            self._end(call, out)
        self.flush(out)

    def expire(self, calls: Sequence[OpenCall]) -> None:
        """End calls whose deadline has come."""
        out = Outgoing()
        with self.lock:
            for call in calls:
                self.fail(call, ExpiredError(EXPIRED_REASON), out)
        self.flush(out)

    def fail_now(self, call: OpenCall, error: Exception) -> None:
        """End a call that failed, if it has not ended."""
        out = Outgoing()
        with self.lock:
            self.fail(call, error, out)
        self.flush(out)

    def fail(self, call: OpenCall, error: Exception, out: Outgoing, *, index: int | None = None) -> None:
        """End a call that failed, if it has not ended. ``index``: the input at fault. Locked."""
        if not call.is_ended:
            self.stats.count_failure(call)
            out.messages.append(call_failed(call.call_id, error, index=index))
            self._end(call, out)

    def answer(self, call: OpenCall, out: Outgoing) -> None:
        """End a call whose outputs are there. Locked."""
        self.stats.count_answer(call)
        out.messages.append(call.answer())
        self._end(call, out)

    def let_go(self, call: OpenCall, out: Outgoing) -> None:
        """Say that a thread is done with a call's inputs. Locked."""
        if call.is_in_use:
            call.is_in_use = False
            if call.is_ended and call.lease is not None:
                out.leases.append(call.lease)

    def close(self, error: Exception, *, drain_s: float) -> None:
        """Take no more calls; end with ``error`` what is still open after ``drain_s``."""
        out = Outgoing()
        with self.lock:
            self._is_closing = True
            self._none_open.wait_for(lambda: not self._calls, timeout=drain_s)
            for call in list(self._calls.values()):
                self.fail(call, error, out)
        self.flush(out)

    def flush(self, out: Outgoing) -> None:
        """Release and send. Never locked."""
        out.flush(self._send, self._send_all)

    def _end(self, call: OpenCall, out: Outgoing) -> None:
        call.is_ended = True
        del self._calls[call.call_id]
        if call.deadline_s is not None:
            self.deadlines.discard(call)
        if call.num_left:
            self.batcher.cancel(call)
        self._num_estimated -= call.num_estimated
        if call.lease is None:
            call.forget_inputs()
        elif not call.is_in_use:
            out.leases.append(call.lease)
        if self._is_closing and not self._calls:
            self._none_open.notify_all()
