"""Messages that every process behind a link says, whatever else it says::

front end                                   process
   | -- a start message, with its options -------> |   first frame, exactly once
   | <------------------------------- Heartbeat -- |   all the time, from a thread of its own
   | <-------------- a ready message, or Fault --- |
   | <------------ what it is there for ---------> |
   | <----------------------- Fault, then EOF ---- |   only if it breaks
"""

from __future__ import annotations

from typing import Protocol

import msgspec

__all__ = ["Fault", "Heartbeat", "StartMessage"]


class StartMessage(Protocol):
    """What the first frame must tell, besides what the process shall become."""

    @property
    def heartbeat_s(self) -> float: ...

    @property
    def debug(self) -> bool:
        """Send tracebacks along with faults, and log more."""
        ...

    @property
    def log_format(self) -> str: ...

    @property
    def log_level(self) -> str: ...


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The process lives; and so long its present turn has taken."""

    turn_s: float
    """0 while it waits for something to do."""
    num_failed: int = 0
    """Turns that came to nothing."""


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """Why the process ends: said once, before it does."""

    kind: str
    """Name of the error's type."""
    reason: str
    """Fit for an operator."""
    detail: str | None = None
    """Traceback; only when asked for."""
