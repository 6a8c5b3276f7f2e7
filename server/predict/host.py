"""Calls in, answers out: the threads of the predict process and what they hand each other.

::

    reader       handle: route, lease --------------+--> rows, few: prepare --.    settle: quick calls
    loaders      a lease that waited for its load --+                          >-- batcher
    tokenizers                                      '--> prepare, in pieces --'       |
    compute      next batch, run it, answer  <----------------------------------------'
    housekeeper  deadlines of calls, statistics, events of reuse

One lock guards calls, batcher and counters (``server.predict.desk``): for microseconds, never while a model
works, while the cache is asked, or while something is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kvcore.clock import Clock
from server.predict.catalogue import Catalogue
from server.predict.compute_thread import ComputeThread
from server.predict.desk import CLOSED_REASON, CallDesk
from server.predict.errors import PredictLostError
from server.predict.housekeeping import Housekeeper
from server.predict.intake import Intake
from server.predict.messages import (
    CancelCall,
    FromPredict,
    PredictCall,
    PredictReady,
    PredictStats,
    ToPredict,
)
from server.predict.model import ModelLoader
from server.predict.model_cache import ModelCache
from server.predict.ops import OpsDesk
from server.predict.options import PredictOptions
from server.predict.preload import preload, ready_message

__all__ = ["PredictHost"]

log = logging.getLogger(__name__)


class PredictHost:
    """See the module's text. One reader thread calls :meth:`handle`; any one calls the rest."""

    def __init__(
        self,
        options: PredictOptions,
        loader: ModelLoader,
        *,
        clock: Clock,
        send: Callable[[FromPredict], None],
        send_all: Callable[[Sequence[FromPredict]], None] | None = None,
        num_tokenizer_threads: int = 2,
        seed: int = 0,
        is_settled: bool = False,
    ) -> None:
        """Start nothing yet. ``send``, and ``send_all`` for several at once, are called from any thread.

        ``is_settled``: the reader calls :meth:`settle` after each few messages, and quick calls are computed.

        ``seed``: of the draw that routes calls to canaries. Raises ``ModelRefusedError`` for a catalogue that
        makes no sense.
        """
        self._options = options
        self._desk = CallDesk(options, clock=clock, send=send, send_all=send_all)
        self._catalogue = Catalogue(options, clock=clock)
        self._housekeeper = Housekeeper(
            self._desk.lock,
            clock,
            deadlines=self._desk.deadlines,
            expire=self._desk.expire,
            send=send,
            stats=self._snapshot,
        )
        self._cache = ModelCache(
            loader,
            memory_bytes=options.memory_bytes,
            max_models=options.max_models,
            clock=clock,
            find_embedder=self._catalogue.route,
            on_reuse_event=self._housekeeper.note_event,
        )
        self._ops = OpsDesk(
            self._catalogue,
            self._cache,
            clock=clock,
            memory_bytes=options.memory_bytes,
            num_inputs_of=self._desk.stats.num_inputs_of,
            send=send,
        )
        self._intake = Intake(
            self._desk,
            self._catalogue,
            self._cache,
            clock=clock,
            max_inputs=options.max_inputs,
            num_tokenizer_threads=num_tokenizer_threads,
            seed=seed,
            wake_by=self._housekeeper.wake_by,
            is_settled=is_settled,
        )
        self._compute = ComputeThread(self._desk, clock)

    @property
    def turn_started(self) -> float | None:
        """Return since when the compute thread is in one batch, by the host's clock; None: idle."""
        return self._compute.turn_started

    def start(self) -> PredictReady:
        """Start the threads and load the models marked ``preload``; one that fails is logged and FAILED."""
        self._housekeeper.start()
        self._intake.start()
        self._compute.start()
        statuses = preload(self._catalogue, self._cache, self._options.models)
        return ready_message(self._options, self._catalogue, statuses)

    def handle(self, message: ToPredict) -> None:
        """Take in a message; what goes wrong with it is answered, not raised. The reader thread."""
        if isinstance(message, PredictCall):
            self._intake.open(message)
        elif isinstance(message, CancelCall):
            self._desk.cancel(message.call_id)
        else:
            self._ops.handle(message)

    def settle(self) -> None:
        """Compute quick calls: all messages that came together were handled. The reader thread."""
        for call in self._compute.help_out():
            self._intake.prepare(call)

    def close(self, *, drain_s: float = 0.0) -> None:
        """Refuse new calls, let open ones finish for so long, fail the rest, end all threads. Idempotent."""
        self._desk.close(PredictLostError(CLOSED_REASON), drain_s=drain_s)
        self._intake.close()
        self._housekeeper.close()
        if self._compute.close():
            self._cache.close()
        else:
            log.warning("a batch is still being computed: the models stay as they are")

    def _snapshot(self) -> PredictStats:
        return self._desk.stats.snapshot(
            self._catalogue,
            self._cache,
            self._desk.batcher,
            num_calls=self._desk.num_calls,
            memory_bytes=self._options.memory_bytes,
        )
