"""What the front end knows of predict: a backend to call, in a process of its own or in this one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from enum import Enum
from typing import Protocol

from server.predict.messages import (
    ClearReuse,
    GetReuse,
    Inputs,
    LoadModel,
    ModelList,
    ModelStatus,
    OpProgress,
    PredictAnswer,
    PredictReady,
    PredictStats,
    ReuseEvent,
    ReuseReport,
    SetAlias,
    Task,
    UnloadModel,
)

__all__ = ["PredictBackend", "PredictState"]


class PredictState(Enum):
    """Of the predict process."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class PredictBackend(Protocol):
    """Every method belongs to the event loop; errors are those of ``server.predict.errors``."""

    @property
    def state(self) -> PredictState: ...

    @property
    def ready(self) -> PredictReady | None: ...

    @property
    def stats(self) -> PredictStats | None:
        """Return the latest snapshot. Its counters begin anew with every process."""
        ...

    @property
    def num_restarts(self) -> int: ...

    @property
    def num_open_calls(self) -> int: ...

    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        task: Task | None = None,
        truncate: bool = False,
        reuse: bool = True,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> PredictAnswer:
        """Compute; when cancelled, what was not begun is dropped. ``deadline_s``: seconds left."""
        ...

    async def models(self) -> ModelList:
        """Return the catalogue."""
        ...

    async def describe(self, model: str, version: str = "") -> ModelStatus:
        """Return the version that a call would go to (without being routed to a canary). Loads nothing.

        Cheap for a caller that asks before every call: answers are kept until something changes.
        """
        ...

    def load(self, op: LoadModel) -> AsyncGenerator[OpProgress | ModelStatus]:
        """Load; yield how it goes, the status last. The load goes on when nobody listens any more."""
        ...

    async def unload(self, op: UnloadModel) -> ModelList: ...

    async def set_alias(self, op: SetAlias) -> ModelList: ...

    async def reuse(self, op: GetReuse) -> ReuseReport: ...

    async def clear_reuse(self, op: ClearReuse) -> int: ...

    def watch_reuse(self) -> AsyncGenerator[ReuseEvent]:
        """Yield events from now on; a slow reader loses some and is told how many (``EventKind.LOST``)."""
        ...

    async def stop(self, *, grace_s: float) -> None:
        """Refuse new calls, let running ones finish for so long, then end it. Idempotent."""
        ...
