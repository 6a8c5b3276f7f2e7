"""``ListModels``, ``LoadModel`` and ``UnloadModel`` for the model that the server was started with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from kvserve.v1 import cache_admin_pb2 as pb
from server.engine.errors import EngineStartError, ModelBusyError
from server.engine.interface import Engine, EngineState, ModelControl, ModelReport, ModelState
from server.rpc.errors import ModelBusy, ModelLoadFailed, NotSupported
from server.rpc.served_model import ServedModel
from server.rpc.validation import Violations

__all__ = ["ModelAdmin"]

PROGRESS_INTERVAL_S = 0.5

_STATES = {
    ModelState.LOADING: pb.MODEL_STATE_LOADING,
    ModelState.READY: pb.MODEL_STATE_READY,
    ModelState.DRAINING: pb.MODEL_STATE_DRAINING,
    ModelState.UNLOADED: pb.MODEL_STATE_UNLOADED,
    ModelState.FAILED: pb.MODEL_STATE_FAILED,
}
_STATES_OF_ENGINE = {
    EngineState.LOADING: ModelState.LOADING,
    EngineState.READY: ModelState.READY,
    EngineState.DRAINING: ModelState.DRAINING,
    EngineState.DEAD: ModelState.FAILED,
    EngineState.UNLOADED: ModelState.UNLOADED,
}


class ModelAdmin:
    """Without a ``ModelControl`` the model can be looked at, but neither loaded nor unloaded."""

    def __init__(self, model: ServedModel, control: ModelControl | None) -> None:
        self._model = model
        self._control = control

    def statuses(self) -> pb.ListModelsResponse:
        """Return all models: the one."""
        return pb.ListModelsResponse(models=[self._status()])

    async def load(self, request: pb.LoadModelRequest) -> AsyncGenerator[pb.LoadModelProgress]:
        """Yield how it goes, at once and then twice a second, until the model is ready.

        The load goes on when the caller leaves. Raises :class:`ModelLoadFailed`.
        """
        violations = self._begin(request.model)
        violations.raise_if_any()
        control = self._need_control()
        started_s = time.perf_counter()

        def progress() -> pb.LoadModelProgress:
            return pb.LoadModelProgress(status=self._status(), elapsed_s=time.perf_counter() - started_s)

        loading = asyncio.ensure_future(control.load())
        try:
            await asyncio.sleep(0)  # it begins, and is LOADING
            while not loading.done():
                yield progress()
                await asyncio.wait({loading}, timeout=PROGRESS_INTERVAL_S)
            try:
                loading.result()
            except EngineStartError as error:
                reason = control.report().fault or "the model could not be loaded"
                raise ModelLoadFailed(reason) from error
            last = progress()
            last.done = True
            yield last
        finally:
            loading.cancel()  # ends the wait for the load, not the load

    async def unload(self, request: pb.UnloadModelRequest) -> pb.UnloadModelResponse:
        """Unload; return when its memory is free. The unloading goes on when the caller leaves."""
        violations = self._begin(request.model)
        drain_s = violations.age("drain", request.drain) if request.HasField("drain") else None
        violations.raise_if_any()
        try:
            await self._need_control().unload(drain_s=drain_s)
        except ModelBusyError as error:
            raise ModelBusy(str(error)) from error
        return pb.UnloadModelResponse(status=self._status())

    def _begin(self, name: str) -> Violations:
        self._model.check_name(name)
        violations = Violations()
        violations.model_name("model", name)
        return violations

    def _need_control(self) -> ModelControl:
        if self._control is None:
            raise NotSupported("this server cannot load and unload models")
        return self._control

    def _status(self) -> pb.ModelStatus:
        report = _report_of(self._model.engine) if self._control is None else self._control.report()
        status = pb.ModelStatus(
            name=self._model.name,
            state=_STATES[report.state],
            kind="generate",
            running_requests=report.num_requests,
            fault=report.fault,
        )
        if (ready := report.ready) is not None:
            status.fingerprint = ready.fingerprint
            status.num_parameters = ready.num_parameters
            status.kv_bytes = ready.num_blocks * ready.bytes_per_block
            status.load_s = ready.load_s
        return status


def _report_of(engine: Engine) -> ModelReport:
    stats = engine.stats
    num_requests = 0 if stats is None else stats.num_running + stats.num_waiting
    state = _STATES_OF_ENGINE[engine.state]
    fault = "the engine is not running" if state is ModelState.FAILED else ""
    return ModelReport(state, engine.ready, num_requests, fault)
