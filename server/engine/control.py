"""What an engine process is started with, and everything that it says.

::

front end                                   engine process
   | -- Start (options) -------------------------> |   first frame, exactly once
   | <------------------------------- Heartbeat -- |   all the time (server.process.messages)
   | <----------------- EngineReady, or Fault ---- |
   | -- Submit, Cancel, AdminCall, ... ----------> |
   | <------------------ Outputs, EngineStats ---- |
   | <-- AdminReply, AdminProgress, CacheEvents -- |
   | <----------------------- Fault, then EOF ---- |   only if it breaks
"""

from __future__ import annotations

import msgspec

from server.engine.messages import FromEngine
from server.engine.options import EngineOptions
from server.process.messages import Fault, Heartbeat

__all__ = ["FromChild", "Start"]


class Start(msgspec.Struct, frozen=True, tag="start"):
    """What the process shall become; a ``StartMessage`` of ``server.process``."""

    options: EngineOptions
    heartbeat_s: float = 0.5
    debug: bool = False
    """Send tracebacks along with faults, and log more."""
    log_format: str = "text"
    log_level: str = "info"


FromChild = FromEngine | Heartbeat | Fault
