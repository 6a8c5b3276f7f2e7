"""What the front end knows of the call it is serving, from the interceptor to the servicer."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import grpc

__all__ = ["ANONYMOUS", "Call", "CallObserver", "Caller", "current_call"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. ``salt`` keeps tenants' caches apart; it is derived from the key and never shown."""

    tenant: str
    scopes: frozenset[str]
    salt: str = field(default="", repr=False)


ANONYMOUS = Caller(tenant="", scopes=frozenset({"generate", "predict", "admin"}))
"""Everybody, where no keys are configured."""


@dataclass(slots=True)
class Call:
    """One call. Its task sees it as ``current_call.get()``; times are of ``time.perf_counter``."""

    method: str
    caller: Caller
    request_id: str = ""
    started_s: float = field(default_factory=time.perf_counter)
    received_s: float = 0.0
    """When the whole request was in hand."""
    deadline_s: float | None = None
    """When nobody waits for the answer any more: the client's deadline or the server's limit."""
    attributes: dict[str, str | int | float] = field(default_factory=dict)
    """What is known of it for traces, by the names of the GenAI conventions."""

    def remaining_s(self) -> float | None:
        """Return the seconds left, at least 0."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - time.perf_counter())


current_call: ContextVar[Call] = ContextVar("current_call")


class CallObserver(Protocol):
    """Sees calls begin and end: metrics, traces."""

    def begin(self, call: Call, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        """Note a call; runs in its task."""
        ...

    def end(self, call: Call, code: grpc.StatusCode) -> None:
        """Note a call's end; runs exactly once for each begin."""
        ...
