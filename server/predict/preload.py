"""Models that are loaded before the process says that it is ready."""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence

from server.predict.catalogue import Catalogue
from server.predict.errors import PredictError
from server.predict.messages import ModelStatus, PredictReady
from server.predict.model_cache import ModelCache
from server.predict.options import ModelSpec, PredictOptions

__all__ = ["preload", "ready_message"]


def preload(catalogue: Catalogue, cache: ModelCache, specs: Sequence[ModelSpec]) -> list[ModelStatus]:
    """Load the models that are marked, wait for all of them, and return how they stand.

    One that fails is FAILED (the cache has logged why) and holds nobody up.
    """
    entries = [catalogue.route(spec.name, spec.version) for spec in specs if spec.preload]
    answers: queue.SimpleQueue[ModelStatus | PredictError] = queue.SimpleQueue()
    for entry in entries:
        cache.load(entry, None, answers.put)
    for _ in entries:
        answers.get()
    return [catalogue.named(cache.status(entry)) for entry in entries]


def ready_message(
    options: PredictOptions, catalogue: Catalogue, preloaded: Sequence[ModelStatus]
) -> PredictReady:
    """Return what the front end is told once calls are taken."""
    return PredictReady(
        num_models=len(catalogue.entries()),
        num_threads=options.num_threads or max(1, _num_cores() - 1),
        device=_device_of(options, preloaded),
        preloaded=tuple(preloaded),
    )


def _num_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _device_of(options: PredictOptions, preloaded: Sequence[ModelStatus]) -> str:
    """Return the device of the models that compute; what "auto" will be is known with the first of them."""
    devices = [status.info.device for status in preloaded if status.info is not None and status.info.device]
    return devices[0] if devices else options.device
