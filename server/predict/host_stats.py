"""What the host counts, by model version since the start, and the snapshot of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from server.predict.batch import Batch
from server.predict.batcher import Batcher
from server.predict.calls import OpenCall
from server.predict.catalogue import Catalogue, ModelKey
from server.predict.errors import UnknownModelError
from server.predict.messages import ModelStats, ModelStatus, PolicyReport, PredictStats
from server.predict.model_cache import ModelCache
from server.predict.ops import reusing

__all__ = ["HostStats", "ModelCounters"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ModelCounters:
    """Of one model version. Calls are answered, failed, or were cancelled."""

    num_calls: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_inputs: int = 0
    """Answered."""
    num_tokens: int = 0
    """Computed."""
    num_batches: int = 0
    compute_s: float = 0.0
    queue_s: float = 0.0
    num_padding_tokens: int = 0


class HostStats:
    """Counts. Guarded by the host's lock, but for :meth:`snapshot`."""

    def __init__(self) -> None:
        self.by_model: dict[ModelKey, ModelCounters] = {}

    def of(self, key: ModelKey) -> ModelCounters:
        """Return a version's counters."""
        counters = self.by_model.get(key)
        if counters is None:
            counters = self.by_model[key] = ModelCounters()
        return counters

    def num_inputs_of(self, key: ModelKey) -> int:
        """Return how many inputs a version has answered. Any thread."""
        counters = self.by_model.get(key)
        return 0 if counters is None else counters.num_inputs

    def count_batch(
        self, key: ModelKey, batch: Batch[OpenCall], seconds: float, *, num_padding_tokens: int
    ) -> None:
        """Take in a batch that was computed, however it went."""
        counters = self.of(key)
        counters.num_batches += 1
        counters.num_tokens += batch.num_tokens
        counters.num_padding_tokens += num_padding_tokens
        counters.compute_s += seconds

    def count_answer(self, call: OpenCall) -> None:
        """Take in a call that is answered."""
        counters = self.of(call.key)
        counters.num_calls += 1
        counters.num_inputs += call.inputs.count
        counters.queue_s += call.queue_s

    def count_failure(self, call: OpenCall) -> None:
        """Take in a call that failed."""
        counters = self.of(call.key)
        counters.num_calls += 1
        counters.num_failed += 1

    def count_cancelled(self, call: OpenCall) -> None:
        """Take in a call that nobody waits for any more."""
        counters = self.of(call.key)
        counters.num_calls += 1
        counters.num_cancelled += 1

    def snapshot(
        self,
        catalogue: Catalogue,
        cache: ModelCache,
        batcher: Batcher[OpenCall],
        *,
        num_calls: int,
        memory_bytes: int | None,
    ) -> PredictStats:
        """Return what there is to tell. Without the host's lock: single figures may be an instant apart."""
        counters = cache.counters
        # A copy in one go: other threads may enter a model meanwhile.
        counted = list(self.by_model)
        loaded = {ModelKey(status.name, status.version): status for status in cache.loaded()}
        return PredictStats(
            models=tuple(
                self._model_stats(key, catalogue, cache, loaded.get(key))
                for key in sorted({*counted, *loaded})
            ),
            num_waiting_inputs=batcher.num_waiting_inputs,
            num_waiting_tokens=batcher.num_waiting_tokens,
            num_calls=num_calls,
            num_bytes=cache.num_bytes,
            memory_bytes=memory_bytes or 0,
            num_loads=counters.num_loads,
            num_failed_loads=counters.num_failed_loads,
            num_evictions=counters.num_evictions,
            load_s=counters.load_s,
        )

    def _model_stats(
        self, key: ModelKey, catalogue: Catalogue, cache: ModelCache, loaded: ModelStatus | None
    ) -> ModelStats:
        counters = self.by_model.get(key) or ModelCounters()
        return ModelStats(
            name=key.name,
            version=key.version,
            num_calls=counters.num_calls,
            num_failed=counters.num_failed,
            num_cancelled=counters.num_cancelled,
            num_inputs=counters.num_inputs,
            num_tokens=counters.num_tokens,
            num_batches=counters.num_batches,
            compute_s=counters.compute_s,
            queue_s=counters.queue_s,
            num_padding_tokens=counters.num_padding_tokens,
            is_loaded=loaded is not None,
            num_bytes=0 if loaded is None or loaded.info is None else loaded.info.num_bytes,
            policies=() if loaded is None else _policies_of(key, catalogue, cache),
        )


def _policies_of(key: ModelKey, catalogue: Catalogue, cache: ModelCache) -> tuple[PolicyReport, ...]:
    try:
        model = reusing(cache.loaded_model(catalogue.route(key.name, key.version)))
        return () if model is None else model.reuse_report(max_keys=0).policies
    except UnknownModelError:
        return ()  # the catalogue has just withdrawn it
    except Exception:
        # It may have been unloaded meanwhile; whatever it is, the other figures shall not be lost.
        log.exception("no report on reuse from model %s version %s", key.name, key.version)
        return ()
