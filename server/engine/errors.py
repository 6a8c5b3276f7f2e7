"""What can go wrong around an engine, as a tree of types::

EngineError
|-- EngineStartError        the model could not be loaded; says why in an operator's words
|-- EngineUnavailableError  there is no engine now that could carry an operation out
|-- ModelBusyError          the model cannot be unloaded now
`-- EngineBrokenError       steps failed again and again; the engine has to be started afresh

Those of the connection to an engine process are in ``server.process.errors``.
"""

from __future__ import annotations

from server.engine.messages import FailureKind
from server.process.errors import ProcessStartError

__all__ = [
    "EngineBrokenError",
    "EngineError",
    "EngineStartError",
    "EngineUnavailableError",
    "ModelBusyError",
]


class EngineError(Exception):
    """Base of everything this package raises about an engine."""


class EngineStartError(ProcessStartError, EngineError):
    """The engine did not become ready."""


class EngineUnavailableError(EngineError):
    """An operation on the cache found no engine, or lost it before the answer came.

    ``kind`` is that of a request which meets the same.
    """

    def __init__(self, kind: FailureKind, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.retry_after_s = retry_after_s


class ModelBusyError(EngineError):
    """Requests run, or the model is being loaded. The text is fit for a client."""


class EngineBrokenError(EngineError):
    """The engine cannot go on computing."""
