"""Computing, a batch at a time over all models: a thread of its own, and the reader where that is quicker.

Waking a thread costs more than a cheap model's batch of a few rows. So the reader thread, when it has handled
what came together, computes such calls itself (:meth:`ComputeThread.help_out`), if nobody computes and
nothing else waits. Who computes holds the baton: there is never more than one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from kvcore.clock import Clock
from server.predict.batch import Batch, Turn
from server.predict.calls import OpenCall
from server.predict.computing import Culprit, compute_groups
from server.predict.desk import EXPIRED_REASON, CallDesk
from server.predict.errors import ExpiredError
from server.predict.model import PredictModel
from server.predict.outgoing import Outgoing
from server.predict.quick import prepare_together
from server.predict.waiting import Share

__all__ = ["ComputeThread"]

log = logging.getLogger(__name__)

JOIN_S = 10.0
"""How long the end waits for the batch that is being computed."""


class ComputeThread:
    """Takes batches from the desk's batcher, computes them, and ends the calls that are complete."""

    def __init__(self, desk: CallDesk, clock: Clock) -> None:
        self._desk = desk
        self._clock = clock
        self._is_stopped = False
        self._baton = threading.Lock()
        self.turn_started: float | None = None
        """Since when it is in one batch, by the clock; None: it is not. For a watchdog."""
        self._thread = threading.Thread(target=self._run, name="predict-compute", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> bool:
        """End the thread after its batch; False: that is not over yet, and the model still in use.

        The desk is closed: what the reader may be computing is the last of its batches, and waited for too.
        """
        with self._desk.lock:
            self._is_stopped = True
            self._desk.work.notify_all()
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)
        if self._thread.is_alive() or not self._baton.acquire(timeout=JOIN_S):
            return False
        self._baton.release()
        return True

    def help_out(self) -> Sequence[OpenCall]:
        """Compute quick calls here and now; return those that are to go the long way. The reader thread."""
        desk = self._desk
        if not desk.quick:
            return ()
        if self._baton.acquire(blocking=False):
            try:
                while desk.quick and (calls := self._take_quick()):
                    self._compute_quick(calls)
            finally:
                self._baton.release()
        if not desk.quick:
            return ()
        with desk.lock:
            return desk.quick.take_all()

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                with self._baton:
                    batch, wait_until_s, num_added = self._next_batch()
                    if batch is not None:
                        self._compute_and_learn(batch)
                if batch is None:
                    self._wait(wait_until_s, num_added)
        except Exception as error:
            # Not a model's fault, that is dealt with below: nothing known of calls can be trusted any more.
            log.exception("the compute thread has broken")
            with self._baton:  # else a batch of the reader's could end meanwhile, and say that all is well
                # It looks to the watchdog like a batch that never ends.
                self.turn_started = self._clock.now()
                self._desk.close(error, drain_s=0.0)

    def _wait(self, until_s: float | None, num_added: int) -> None:
        """Wait for something new to compute since ``num_added`` were, or for a time."""
        desk = self._desk
        with desk.lock:
            if desk.num_added == num_added and not self._is_stopped:
                desk.is_waiting = True
                desk.work.wait(None if until_s is None else max(0.0, until_s - self._clock.now()))
                desk.is_waiting = False

    def _next_batch(self) -> tuple[Batch[OpenCall] | None, float | None, int]:
        """Return a batch, whose calls are in use; else until when to wait, and what was added so far."""
        desk = self._desk
        out = Outgoing()
        with desk.lock:
            turn = self._take_turn(out)
            num_added = desk.num_added
        if out:
            desk.flush(out)
        return turn.batch, turn.look_again_s, num_added

    def _take_quick(self) -> list[OpenCall]:
        desk = self._desk
        out = Outgoing()
        with desk.lock:
            calls = desk.take_quick(out)
        if out:
            desk.flush(out)
        return calls

    def _compute_quick(self, calls: list[OpenCall]) -> None:
        """Prepare and compute calls of one model that are in use."""
        desk, lease = self._desk, calls[0].lease
        assert lease is not None
        self.turn_started = self._clock.now()  # a model may hang in this as well
        try:
            faults = prepare_together(lease.model, calls)
        finally:
            self.turn_started = None
        if faults:
            out = Outgoing()
            with desk.lock:
                for call, error in faults.items():
                    desk.let_go(call, out)
                    desk.fail(call, error, out)
            desk.flush(out)
            calls = [call for call in calls if call not in faults]
            if not calls:
                return
        now_s = self._clock.now()
        for call in calls:
            call.note_prepared(now_s)
        num_rows = sum(len(call.items) for call in calls)
        shares = tuple(Share(call, range(len(call.items)), len(call.items)) for call in calls)
        seconds = self._compute(Batch(calls[0].key, shares, num_rows, num_rows, 0))
        if seconds is not None:
            with desk.lock:
                desk.quick.learn(calls[0].key, num_rows, seconds)

    def _take_turn(self, out: Outgoing) -> Turn[OpenCall]:
        """Ask the batcher. Locked."""
        turn = self._desk.batcher.next(self._clock.now())
        for call in turn.expired:
            self._desk.fail(call, ExpiredError(EXPIRED_REASON), out)
        if turn.batch is not None:
            for share in turn.batch.shares:
                share.key.is_in_use = True
        return turn

    def _compute_and_learn(self, batch: Batch[OpenCall]) -> None:
        began_s = time.thread_time()
        seconds = self._compute(batch)
        if seconds is not None:
            processor_s = time.thread_time() - began_s
            with self._desk.lock:
                self._desk.batcher.done(batch, seconds)
                self._desk.quick.learn_elsewhere(batch.shares[0].key.key, batch.num_tokens, processor_s)

    def _compute(self, batch: Batch[OpenCall]) -> float | None:
        """Return how long the model took; None if it failed at first."""
        desk, shares = self._desk, batch.shares
        lease = shares[0].key.lease
        assert lease is not None
        padded_before = _num_padding_tokens(lease.model)
        started_s = self._clock.now()
        self.turn_started = started_s
        result = compute_groups(
            lease.model,
            [[share.key.items[index] for index in share.indices] for share in shares],
            is_wanted=lambda position: not shares[position].key.is_ended,
        )
        seconds = self._clock.now() - started_s
        self.turn_started = None
        padded = _num_padding_tokens(lease.model)
        num_padding = (
            batch.num_padding_tokens if padded is None or padded_before is None else padded - padded_before
        )
        out = Outgoing()
        with desk.lock:
            desk.stats.count_batch(shares[0].key.key, batch, seconds, num_padding_tokens=num_padding)
            for share, outcome in zip(shares, result.outcomes, strict=True):
                call = share.key
                desk.let_go(call, out)
                if call.is_ended:
                    continue
                call.note_batch(started_s, seconds, batch.num_inputs, batch.num_tokens)
                if isinstance(outcome, Culprit):
                    index = None if outcome.position is None else share.indices[outcome.position]
                    desk.fail(call, outcome.error, out, index=index)
                elif call.put(share.indices, outcome):
                    desk.answer(call, out)
        desk.flush(out)
        return seconds if result.is_clean else None


def _num_padding_tokens(model: PredictModel) -> int | None:
    """Return how many tokens the model has padded so far, if it counts them."""
    return getattr(model, "num_padding_tokens", None)
