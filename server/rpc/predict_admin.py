"""The part of CacheAdmin that is about predict models: load, unload, aliases, reuse under drift.

The name decides who is meant: the generating model's own (or none) is its, every other one is predict's.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from kvserve.v1 import cache_admin_pb2 as pb
from server.predict.errors import PredictError
from server.predict.interface import PredictBackend
from server.predict.messages import (
    ClearReuse,
    GetReuse,
    LoadModel,
    ModelPhase,
    ModelStatus,
    OpProgress,
    SetAlias,
    UnloadModel,
)
from server.predict.options import POOLINGS, TASKS
from server.rpc.errors import InternalError, InvalidArgument, Unavailable
from server.rpc.predict_errors import error_from_predict, predict_is_off
from server.rpc.reuse_convert import event_of, report_of
from server.rpc.validation import Violations

__all__ = ["PredictAdmin"]

PROGRESS_INTERVAL_S = 0.5
MAX_KEYS = 1000
_SOURCE = re.compile(r"(hf:|models:/)?[A-Za-z0-9][A-Za-z0-9._@/-]*")
_MAX_SOURCE_CHARS = 512
_STATES = {
    ModelPhase.UNLOADED: pb.MODEL_STATE_UNLOADED,
    ModelPhase.LOADING: pb.MODEL_STATE_LOADING,
    ModelPhase.READY: pb.MODEL_STATE_READY,
    ModelPhase.DRAINING: pb.MODEL_STATE_DRAINING,
    ModelPhase.FAILED: pb.MODEL_STATE_FAILED,
}


class PredictAdmin:
    """Without a backend nothing of predict is listed, and what is asked for is answered that it is off."""

    def __init__(self, backend: PredictBackend | None, *, generating: str) -> None:
        """``generating`` is the name that is not predict's."""
        self._backend = backend
        self._generating = generating

    def is_meant(self, request: pb.LoadModelRequest | pb.UnloadModelRequest) -> bool:
        """Say whether predict is to load or unload. Raises :class:`InvalidArgument` for what nobody could."""
        if request.model not in ("", self._generating):
            return True
        source = request.source if isinstance(request, pb.LoadModelRequest) else ""
        if source:
            problem = "is the generating model's name" if request.model else "must not be empty with a source"
            raise InvalidArgument.of("model", problem)
        if request.version:
            raise InvalidArgument.of("version", "only predict models have versions")
        return False

    async def add_statuses(self, response: pb.ListModelsResponse) -> None:
        """Add every version of every predict model."""
        if self._backend is None:
            return
        with _as_call_errors():
            listed = await self._backend.models()
        response.models.extend(map(_status_of, listed.models))
        response.predict_bytes = listed.num_bytes
        response.predict_memory = listed.memory_bytes

    async def load(self, request: pb.LoadModelRequest) -> AsyncGenerator[pb.LoadModelProgress]:
        """Yield how it goes, at every change and at least twice a second, until the model is ready.

        The load goes on when the caller leaves.
        """
        started_s = time.perf_counter()
        op = _read_load(request)
        backend = self._find_backend()
        progress: pb.LoadModelProgress | None = None
        with _as_call_errors():
            async with aclosing(backend.load(op)) as messages:
                following = asyncio.ensure_future(anext(messages, None))
                try:
                    while True:
                        await asyncio.wait({following}, timeout=PROGRESS_INTERVAL_S)
                        if following.done():
                            message = following.result()
                            if message is None:
                                break
                            progress = _progress_of(message)
                            following = asyncio.ensure_future(anext(messages, None))
                        if progress is not None:
                            progress.elapsed_s = time.perf_counter() - started_s
                            yield progress
                finally:
                    if not following.done():
                        following.cancel()
                        await asyncio.wait({following})
        if progress is None or not progress.done:
            raise InternalError("the load ended without a result")

    async def unload(self, request: pb.UnloadModelRequest) -> pb.UnloadModelResponse:
        """Unload one version, or all or none; return when their memory is free. The status is of the last."""
        violations = _names(request.model, request.version)
        drain_s = violations.age("drain", request.drain) if request.HasField("drain") else None
        violations.raise_if_any()
        backend = self._find_backend()
        with _as_call_errors():
            unloaded = await backend.unload(UnloadModel(request.model, request.version, drain_s))
        return pb.UnloadModelResponse(status=_status_of(unloaded.models[-1]) if unloaded.models else None)

    async def set_alias(self, request: pb.SetModelAliasRequest) -> pb.SetModelAliasResponse:
        """Let an alias name a version, or nothing."""
        violations = _names(request.model, request.version)
        violations.plain_name("alias", request.alias)
        share = request.traffic_share if request.HasField("traffic_share") else None
        if share is not None and violations.number("traffic_share", share, low=0.0, high=1.0):
            if request.alias == "latest":
                violations.add("traffic_share", "is not for latest, which gets the rest")
            elif not request.version:
                violations.add("traffic_share", "needs a version")
        violations.raise_if_any()
        backend = self._find_backend()
        with _as_call_errors():
            listed = await backend.set_alias(
                SetAlias(request.model, request.alias, request.version, traffic_share=share)
            )
        return pb.SetModelAliasResponse(versions=map(_status_of, listed.models))

    async def reuse(self, request: pb.GetReuseRequest) -> pb.GetReuseResponse:
        """Return what reuse does."""
        violations = _names(request.model, request.version)
        violations.integer("max_keys", request.max_keys, low=0, high=MAX_KEYS)
        violations.raise_if_any()
        backend = self._find_backend()
        with _as_call_errors():
            return report_of(await backend.reuse(GetReuse(request.model, request.version, request.max_keys)))

    async def clear_reuse(self, request: pb.ClearReuseRequest) -> pb.ClearReuseResponse:
        """Forget what is kept."""
        _names(request.model, request.version).raise_if_any()
        backend = self._find_backend()
        with _as_call_errors():
            num_entries = await backend.clear_reuse(ClearReuse(request.model, request.version))
        return pb.ClearReuseResponse(num_entries=num_entries)

    async def watch(self, request: pb.WatchReuseRequest) -> AsyncGenerator[pb.ReuseEvent]:
        """Yield that it has begun, then every event. Raises :class:`Unavailable` when there are no more."""
        if request.model:
            _names(request.model, "").raise_if_any()
            backend = self._find_backend()
            with _as_call_errors():
                await backend.describe(request.model)
        else:
            backend = self._find_backend()
        with _as_call_errors():
            async with aclosing(backend.watch_reuse()) as events:
                # Begun before it is said: a generator does nothing until its first event is asked for.
                following = asyncio.ensure_future(anext(events, None))
                try:
                    await asyncio.sleep(0)
                    yield pb.ReuseEvent(kind=pb.ReuseEvent.STARTED, model=request.model)
                    while (event := await following) is not None:
                        following = asyncio.ensure_future(anext(events, None))
                        if request.model in ("", event.model) or not event.model:
                            yield event_of(event)
                finally:
                    if not following.done():
                        following.cancel()
                        await asyncio.wait({following})
        raise Unavailable("the predict process has ended", reason="PREDICT_LOST", retry_after_s=1.0)

    def _find_backend(self) -> PredictBackend:
        if self._backend is None:
            raise predict_is_off()
        return self._backend


def _names(model: str, version: str) -> Violations:
    violations = Violations()
    if not model:
        violations.add("model", "must name a predict model")
    violations.model_name("model", model)
    if version:
        violations.plain_name("version", version)
    return violations


def _read_load(request: pb.LoadModelRequest) -> LoadModel:
    violations = _names(request.model, request.version)
    source = request.source
    if source:
        violations.plain_name("model", request.model)
        if len(source) > _MAX_SOURCE_CHARS or _SOURCE.fullmatch(source) is None or ".." in source:
            violations.add(
                "source",
                "must be a folder below the model root, hf:owner/name@commit or models:/name/version",
            )
    for field, value, choices in (("task", request.task, TASKS), ("pooling", request.pooling, POOLINGS)):
        violations.choice(field, value, choices)
        if value and not source:
            violations.add(field, "is only for a source that comes with it")
    violations.raise_if_any()
    return LoadModel(request.model, request.version, source, request.task, request.pooling)


def _progress_of(message: OpProgress | ModelStatus) -> pb.LoadModelProgress:
    if isinstance(message, ModelStatus):
        return pb.LoadModelProgress(status=_status_of(message), done=True)
    return pb.LoadModelProgress(
        status=_status_of(message.status),
        phase=message.phase,
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes,
    )


def _status_of(model: ModelStatus) -> pb.ModelStatus:
    status = pb.ModelStatus(
        name=model.name,
        version=model.version,
        state=_STATES[model.phase],
        kind="predict",
        load_s=model.load_s,
        running_requests=model.num_running,
        fault=model.fault,
        aliases=model.aliases,
        traffic_share=model.traffic_share,
        source_kind=model.source_kind,
        num_requests=model.num_requests,
        idle_s=model.idle_s,
    )
    if (info := model.info) is not None:
        status.task = info.task.value
        status.fingerprint = info.fingerprint
        status.num_parameters = info.num_parameters
        if model.phase in (ModelPhase.READY, ModelPhase.DRAINING):
            status.num_bytes = info.num_bytes
    return status


@contextmanager
def _as_call_errors() -> Iterator[None]:
    try:
        yield
    except PredictError as error:
        raise error_from_predict(error) from error
