"""A call's way in: the model found and held, the inputs prepared, all of it before anything is computed.

::

    open --> route --> lease --+ loaded: at once, on the reader thread  +--> quick: left for it to settle
                               ' else: later, on a loader thread        +--> a few rows: prepared here
                                                                        '--> else: by tokenizers, in pieces
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from kvcore.clock import Clock
from server.predict.calls import OpenCall, check_count, check_task
from server.predict.catalogue import Catalogue
from server.predict.desk import CallDesk
from server.predict.errors import PredictError
from server.predict.failures import call_failed
from server.predict.messages import PredictCall, Task
from server.predict.model_cache import ModelCache, ModelLease
from server.predict.outgoing import Outgoing
from server.predict.tokenizing import TokenizerPool

__all__ = ["Intake"]

MAX_INLINE_ROWS = 64
"""Up to so many rows are prepared by the thread that brings them: handing them on would take longer."""
PADDING_EXECUTOR = "transformers"


class Intake:
    """One reader thread calls :meth:`open`; what follows runs where the drawing says."""

    def __init__(
        self,
        desk: CallDesk,
        catalogue: Catalogue,
        cache: ModelCache,
        *,
        clock: Clock,
        max_inputs: int,
        num_tokenizer_threads: int,
        seed: int,
        wake_by: Callable[[float], None],
        is_settled: bool,
    ) -> None:
        """``seed``: of the draw that routes calls to canaries. ``wake_by`` as for ``CallDesk.open``.

        ``is_settled``: somebody sees to it that quick calls are computed once they have been brought.
        """
        self._desk = desk
        self._catalogue = catalogue
        self._cache = cache
        self._clock = clock
        self._max_inputs = max_inputs
        self._wake_by = wake_by
        self._is_settled = is_settled
        self._max_quick_rows = min(MAX_INLINE_ROWS, desk.max_batch_rows)
        self._reader: int | None = None
        self._draw = random.Random(seed)  # noqa: S311 - shares of traffic are no secret
        self._tokenizers = TokenizerPool(num_tokenizer_threads, self._prepare_piece)

    def start(self) -> None:
        """Start the tokenizer threads."""
        self._tokenizers.start()

    def close(self) -> None:
        """End them; calls have ended."""
        self._tokenizers.close()

    def open(self, request: PredictCall) -> None:
        """Take in a call; what is wrong with it is answered, not raised."""
        try:
            check_count(request.inputs, max_inputs=self._max_inputs)
            entry = self._catalogue.route(request.model, request.version, roll=self._draw.random())
        except Exception as error:  # noqa: BLE001 - told, and logged if nobody has foreseen it
            out = Outgoing()
            out.messages.append(call_failed(request.call_id, error))
            self._desk.flush(out)
            return
        call = OpenCall(request, entry, now_s=self._clock.now())
        self._desk.open(call, wake_by=self._wake_by)
        if call.is_ended:
            return
        self._reader = threading.get_ident()
        try:
            self._cache.lease(entry, lambda answer: self._leased(call, answer))
        except Exception as error:  # noqa: BLE001 - as above
            self._desk.fail_now(call, error)

    def prepare(self, call: OpenCall) -> None:
        """Prepare a call that was quick after all, and let it wait for the compute thread."""
        self._prepare_piece(call)

    def _leased(self, call: OpenCall, answer: ModelLease | PredictError) -> None:
        if isinstance(answer, PredictError):
            self._desk.fail_now(call, answer)
            return
        with self._desk.lock:
            if not call.is_ended:
                call.lease = answer
                call.load_s = answer.load_s
        if call.lease is None:
            answer.release()
            return
        try:
            info = answer.model.info
            check_task(call.request, info)
        except Exception as error:  # noqa: BLE001 - as above
            self._desk.fail_now(call, error)
            return
        call.is_padded = info.executor == PADDING_EXECUTOR
        if info.task is not Task.FEATURES or call.inputs.num_rows > MAX_INLINE_ROWS:
            self._tokenizers.put(call)
            return
        with self._desk.lock:
            is_quick = self._is_quick(call)
            if is_quick:
                self._desk.quick.add(call)
        if not is_quick:
            self._prepare_piece(call)

    def _is_quick(self, call: OpenCall) -> bool:
        """Say whether the thread that brings a call may compute it. Locked."""
        num_rows = call.inputs.num_rows
        # What a loader thread brings nobody settles.
        if not self._is_settled or threading.get_ident() != self._reader or num_rows > self._max_quick_rows:
            return False
        return self._desk.quick.is_quick(call.key, num_rows)

    def _prepare_piece(self, call: OpenCall) -> bool:
        """Prepare some of a call's inputs; return whether there are more. Any thread."""
        desk = self._desk
        with desk.lock:
            if call.is_ended or call.lease is None:
                return False
            call.is_in_use = True
            model = call.lease.model
        error: Exception | None = None
        is_complete = False
        try:
            is_complete = call.prepare_piece(model)
        except Exception as failure:  # noqa: BLE001 - as above
            error = failure
        out = Outgoing()
        with desk.lock:
            desk.let_go(call, out)
            if error is not None:
                desk.fail(call, error, out)
            elif is_complete and not call.is_ended:
                desk.add_to_batcher(call, is_padded=call.is_padded, out=out)
        if out:
            desk.flush(out)
        return error is None and not is_complete
