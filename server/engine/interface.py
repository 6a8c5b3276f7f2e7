"""What the front end knows of an engine: submit a request, iterate over its events; steer its cache.

Implemented by ``server.engine.local.LocalEngine`` (same process, for tests and notebooks),
``server.engine.process.EngineProcess`` (a process of its own, for serving) and
``server.engine.model_slot.ModelSlot`` (one of those at a time, loaded and unloaded at run time).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from server.engine.admin_messages import AdminOp, AdminProgress, AdminResult, CacheEvents
from server.engine.messages import (
    Admitted,
    EngineReady,
    EngineStats,
    Failed,
    Finished,
    GenerateSpec,
    Progress,
    Refused,
    Tokens,
)

__all__ = [
    "Engine",
    "EngineState",
    "ModelControl",
    "ModelReport",
    "ModelState",
    "RequestEvent",
    "RequestStream",
]

RequestEvent = Admitted | Progress | Tokens | Finished | Refused | Failed


class EngineState(Enum):
    """Whether an engine takes requests."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"
    UNLOADED = "unloaded"
    """On purpose: the model can be loaded again (``ModelControl``)."""


class RequestStream(Protocol):
    """The events of one request. Leaving it early cancels the request and frees what it holds.

    Yields lists: everything that was ready at the time (never empty). The last list ends with the
    terminal event, ``Finished``, ``Refused`` or ``Failed``; a lost engine yields
    ``Failed(kind=ENGINE_LOST)``. Memory is bounded by the request itself: at most
    ``num_samples * max_new_tokens`` tokens can wait here, merged per sample.
    """

    def __aiter__(self) -> AsyncIterator[list[RequestEvent]]: ...

    def cancel(self, sample_index: int | None = None) -> None:
        """End one sample, or all of them. Idempotent; never blocks."""
        ...


class Engine(Protocol):
    """One generating model."""

    @property
    def state(self) -> EngineState: ...

    @property
    def ready(self) -> EngineReady | None:
        """Return what the engine said when it was loaded; None before."""
        ...

    @property
    def stats(self) -> EngineStats | None:
        """Return the latest snapshot."""
        ...

    async def start(self) -> None:
        """Load the model; return when READY. Raises ``EngineStartError``, its reason fit for an operator."""
        ...

    def submit(self, spec: GenerateSpec, *, deadline_s: float | None = None) -> RequestStream:
        """Hand over a request. Never blocks; a refusal is the stream's first event."""
        ...

    async def administer(self, op: AdminOp) -> AdminResult:
        """Have an operation on the cache carried out between two steps; return its result or refusal.

        Raises ``EngineUnavailableError``. Cancelling the caller cancels a long operation.
        """
        ...

    def administer_with_progress(self, op: AdminOp) -> AsyncGenerator[AdminProgress | AdminResult]:
        """As ``administer``, with progress now and then before the result, which comes last.

        Progress that is not read in time is replaced by the next. Closing it early cancels the operation.
        """
        ...

    def watch(self) -> AsyncGenerator[CacheEvents]:
        """Tell what happens to the cache from now on, in order, over restarts of the engine.

        A message without events comes first, and again whenever another engine process (``epoch``)
        has taken over. A gap in the sequence is what was lost because it was not read in time. Ends
        with the engine. The engine tells events only while somebody watches.
        """
        ...

    async def wait_state(self, state: EngineState) -> None:
        """Return when the engine reaches ``state``."""
        ...

    async def stop(self, *, grace_s: float) -> None:
        """Refuse new requests, let running ones finish for ``grace_s``, then end."""
        ...


class ModelState(Enum):
    """Where a model is between not being loaded and serving."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    UNLOADED = "unloaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model as an operator sees it."""

    state: ModelState
    ready: EngineReady | None
    """What is known of the loaded model."""
    num_requests: int
    fault: str
    """Why it is not READY, fit for a client with the admin scope; empty if that is no fault."""


class ModelControl(Protocol):
    """Loads and unloads one model at run time."""

    def report(self) -> ModelReport:
        """Return how it is now."""
        ...

    async def load(self) -> None:
        """Return when the model is READY; several callers share one load. Cancelling ends only the wait.

        Raises ``EngineStartError``: then nothing is left behind, and it can be tried again.
        """
        ...

    async def unload(self, *, drain_s: float | None = None) -> None:
        """End the engine and free its memory; return when it has gone. Cancelling ends only the wait.

        ``drain_s``: running requests may take so long to finish, new ones are refused meanwhile. Raises
        ``ModelBusyError``, and changes nothing, if requests run and ``drain_s`` is None, or while it loads.
        """
        ...
