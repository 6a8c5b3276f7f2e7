"""Operations on models: each one is answered once, at once or when the load or the drain is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import msgspec

from kvcore.clock import Clock
from server.predict.catalogue import Catalogue, CatalogueEntry, ModelKey
from server.predict.errors import PredictError, WrongTaskError
from server.predict.failures import op_failed
from server.predict.messages import (
    ClearReuse,
    DescribeModel,
    FromPredict,
    GetReuse,
    ListModels,
    LoadModel,
    ModelList,
    ModelStatus,
    NumCleared,
    OneModel,
    OpDone,
    OpProgress,
    PredictOp,
    ReuseReport,
    SetAlias,
    UnloadModel,
)
from server.predict.model import PredictModel, ReusingModel
from server.predict.model_cache import ModelCache

__all__ = ["OpsDesk", "reusing"]

PROGRESS_INTERVAL_S = 0.2


class OpsDesk:
    """Carries out operations. One thread calls :meth:`handle`; answers leave from any."""

    def __init__(
        self,
        catalogue: Catalogue,
        cache: ModelCache,
        *,
        clock: Clock,
        memory_bytes: int | None,
        num_inputs_of: Callable[[ModelKey], int],
        send: Callable[[FromPredict], None],
    ) -> None:
        """``num_inputs_of``: what a version has computed so far."""
        self._catalogue = catalogue
        self._cache = cache
        self._clock = clock
        self._memory_bytes = memory_bytes
        self._num_inputs_of = num_inputs_of
        self._send = send

    def handle(self, message: PredictOp) -> None:
        """Carry out one operation; what goes wrong is answered, not raised."""
        try:
            self._handle(message)
        except Exception as error:  # noqa: BLE001 - told, and logged if nobody has foreseen it
            self._send(op_failed(message.op_id, error))

    def status(self, entry: CatalogueEntry) -> ModelStatus:
        """Return how a version stands, complete."""
        return self._named(self._cache.status(entry))

    def _handle(self, message: PredictOp) -> None:
        op_id, op = message.op_id, message.op
        match op:
            case ListModels():
                self._send(OpDone(op_id, self._list(self._catalogue.entries())))
            case DescribeModel():
                entry = self._catalogue.route(op.model, op.version)
                self._send(OpDone(op_id, OneModel(self.status(entry))))
            case LoadModel():
                self._load(op_id, op)
            case UnloadModel():
                self._unload(op_id, op)
            case SetAlias():
                self._catalogue.set_alias(op)
                self._send(OpDone(op_id, self._list(self._catalogue.entries(op.model))))
            case GetReuse():
                self._send(OpDone(op_id, self._report(op)))
            case ClearReuse():
                model = self._reusing(self._catalogue.route(op.model, op.version))
                self._send(OpDone(op_id, NumCleared(0 if model is None else model.clear_reuse())))

    def _load(self, op_id: int, op: LoadModel) -> None:
        entry = self._catalogue.add(op) if op.source else self._catalogue.route(op.model, op.version)
        if op.lazy:
            self._send(OpDone(op_id, OneModel(self.status(entry))))
            return
        told_s = -PROGRESS_INTERVAL_S
        told_phase = ""

        def on_progress(status: ModelStatus, phase: str, num_done: int, num_total: int) -> None:
            nonlocal told_s, told_phase
            now_s = self._clock.now()
            if phase == told_phase and now_s - told_s < PROGRESS_INTERVAL_S:
                return
            told_s, told_phase = now_s, phase
            self._send(OpProgress(op_id, self._named(status), phase, num_done, num_total))

        def done(answer: ModelStatus | PredictError) -> None:
            if isinstance(answer, PredictError):
                if self._catalogue.withdraw(entry):
                    self._cache.forget(entry)
                self._send(op_failed(op_id, answer))
            else:
                self._catalogue.confirm(entry)
                self._send(OpDone(op_id, OneModel(self._named(answer))))

        self._cache.load(entry, on_progress, done)

    def _unload(self, op_id: int, op: UnloadModel) -> None:
        if op.version:
            entries = [self._catalogue.route(op.model, op.version)]
        else:
            entries = self._catalogue.entries(op.model)

        def done(answer: tuple[ModelStatus, ...] | PredictError) -> None:
            if isinstance(answer, PredictError):
                self._send(op_failed(op_id, answer))
            else:
                self._send(OpDone(op_id, self._list(entries)))

        self._cache.unload(entries, op.drain_s, done)

    def _report(self, op: GetReuse) -> ReuseReport:
        entry = self._catalogue.route(op.model, op.version)
        model = self._reusing(entry)
        if model is None:
            kind = "features" if entry.spec.features is not None else "semantic"
            return ReuseReport(entry.spec.name, entry.spec.version, kind, ())
        report = model.reuse_report(max_keys=op.max_keys)
        return msgspec.structs.replace(report, model=entry.spec.name, version=entry.spec.version)

    def _reusing(self, entry: CatalogueEntry) -> ReusingModel | None:
        """Return the model, None while it is not loaded. Raises ``WrongTaskError`` for one without reuse."""
        if entry.spec.features is None and entry.spec.semantic is None:
            raise WrongTaskError("the model reuses nothing")
        return reusing(self._cache.loaded_model(entry))

    def _list(self, entries: list[CatalogueEntry]) -> ModelList:
        return ModelList(
            tuple(map(self.status, entries)), self._cache.num_bytes, memory_bytes=self._memory_bytes or 0
        )

    def _named(self, status: ModelStatus) -> ModelStatus:
        num_inputs = self._num_inputs_of(ModelKey(status.name, status.version))
        return self._catalogue.named(msgspec.structs.replace(status, num_inputs=num_inputs))


def reusing(model: PredictModel | None) -> ReusingModel | None:
    """Return a model as one that reuses, if it does."""
    return cast("ReusingModel", model) if hasattr(model, "reuse_report") else None
