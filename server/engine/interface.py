"""What the front end knows of an engine: submit a request, iterate over its events.

Implemented by ``server.engine.local.LocalEngine`` (same process, for tests and notebooks) and
``server.engine.process.EngineProcess`` (a process of its own, for serving).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import Enum
from typing import Protocol

from server.engine.messages import (
    Admitted,
    EngineReady,
    EngineStats,
    Failed,
    Finished,
    GenerateSpec,
    Refused,
    Tokens,
)

__all__ = ["Engine", "EngineState", "RequestStream"]


class EngineState(Enum):
    """Whether an engine takes requests."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class RequestStream(Protocol):
    """The events of one request. Leaving it early cancels the request and frees what it holds.

    Yields lists: everything that was ready at the time (never empty). The last list ends with the
    terminal event, ``Finished``, ``Refused`` or ``Failed``; a lost engine yields
    ``Failed(kind=ENGINE_LOST)``. Memory is bounded by the request itself: at most
    ``num_samples * max_new_tokens`` tokens can wait here, merged per sample.
    """

    def __aiter__(self) -> AsyncIterator[list[Admitted | Tokens | Finished | Refused | Failed]]: ...

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

    async def wait_state(self, state: EngineState) -> None:
        """Return when the engine reaches ``state``."""
        ...

    async def stop(self, *, grace_s: float) -> None:
        """Refuse new requests, let running ones finish for ``grace_s``, then end."""
        ...
