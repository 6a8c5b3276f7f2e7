"""Messages that only the two ends of an engine process say to each other, besides ``messages``::

front end                                   engine process
   | -- Start (options) -------------------------> |   first frame, exactly once
   | <------------------------------- Heartbeat -- |   all the time, from a thread of its own
   | <----------------- EngineReady, or Fault ---- |
   | -- Submit, Cancel, AdminCall, ... ----------> |
   | <------------------ Outputs, EngineStats ---- |
   | <-- AdminReply, AdminProgress, CacheEvents -- |
   | <----------------------- Fault, then EOF ---- |   only if it breaks
"""

from __future__ import annotations

import msgspec

from server.engine.admin_messages import AdminProgress, AdminReply, CacheEvents
from server.engine.messages import EngineReady, EngineStats, Outputs
from server.engine.options import EngineOptions

__all__ = ["Fault", "FromChild", "Heartbeat", "Start"]


class Start(msgspec.Struct, frozen=True, tag="start"):
    """What the process shall become."""

    options: EngineOptions
    heartbeat_s: float = 0.5
    debug: bool = False
    """Send tracebacks along with faults, and log more."""
    log_format: str = "text"
    log_level: str = "info"


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The process lives; and so long its present turn of the loop has taken."""

    turn_s: float
    """0 while waiting for requests."""
    num_failed_steps: int = 0


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """Why the engine ends: said once, before it does."""

    kind: str
    """Name of the error's type."""
    reason: str
    """Fit for an operator."""
    detail: str | None = None
    """Traceback; only when ``Start.debug``."""


FromChild = Outputs | EngineStats | Heartbeat | EngineReady | Fault | AdminReply | AdminProgress | CacheEvents
