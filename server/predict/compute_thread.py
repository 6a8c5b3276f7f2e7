"""The one thread that computes, a batch at a time over all models."""

from __future__ import annotations

import logging
import threading

from kvcore.clock import Clock
from server.predict.batch import Batch
from server.predict.calls import OpenCall
from server.predict.computing import Culprit, compute_groups
from server.predict.desk import EXPIRED_REASON, CallDesk
from server.predict.errors import ExpiredError
from server.predict.model import PredictModel
from server.predict.outgoing import Outgoing

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
        self.turn_started: float | None = None
        """Since when it is in one batch, by the clock; None: it is not. For a watchdog."""
        self._thread = threading.Thread(target=self._run, name="predict-compute", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> bool:
        """End the thread after its batch; False: that is not over yet, and the model still in use."""
        with self._desk.lock:
            self._is_stopped = True
            self._desk.work.notify_all()
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                batch = self._next_batch()
                if batch is not None:
                    self._compute(batch)
        except Exception as error:
            # Not a model's fault, that is dealt with below: nothing known of calls can be trusted any more.
            log.exception("the compute thread has broken")
            # It looks to the watchdog like a batch that never ends.
            self.turn_started = self._clock.now()
            self._desk.close(error, drain_s=0.0)

    def _next_batch(self) -> Batch[OpenCall] | None:
        """Wait for a batch; None: look again. Its calls are in use."""
        desk = self._desk
        out = Outgoing()
        with desk.lock:
            now_s = self._clock.now()
            turn = desk.batcher.next(now_s)
            for call in turn.expired:
                desk.fail(call, ExpiredError(EXPIRED_REASON), out)
            if turn.batch is not None:
                for share in turn.batch.shares:
                    share.key.is_in_use = True
            elif not out and not self._is_stopped:
                desk.is_waiting = True
                desk.work.wait(None if turn.look_again_s is None else turn.look_again_s - now_s)
                desk.is_waiting = False
        if out:
            desk.flush(out)
        return turn.batch

    def _compute(self, batch: Batch[OpenCall]) -> None:
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
            if result.is_clean:
                desk.batcher.done(batch, seconds)
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


def _num_padding_tokens(model: PredictModel) -> int | None:
    """Return how many tokens the model has padded so far, if it counts them."""
    return getattr(model, "num_padding_tokens", None)
