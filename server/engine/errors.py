"""What can go wrong around an engine, as a tree of types::

EngineError
|-- EngineStartError        the model could not be loaded; says why in an operator's words
|-- EngineUnavailableError  there is no engine now that could carry an operation out
|-- ModelBusyError          the model cannot be unloaded now
|-- EngineBrokenError       steps failed again and again; the engine has to be started afresh
`-- LinkError               the connection between front end and engine is unusable
    |-- FrameTooLargeError
    |-- MalformedFrameError
    `-- LinkClosedError
"""

from __future__ import annotations

from server.engine.messages import FailureKind

__all__ = [
    "EngineBrokenError",
    "EngineError",
    "EngineStartError",
    "EngineUnavailableError",
    "FrameTooLargeError",
    "LinkClosedError",
    "LinkError",
    "MalformedFrameError",
    "ModelBusyError",
]


class EngineError(Exception):
    """Base of everything this package raises about an engine."""


class EngineStartError(EngineError):
    """The engine did not become ready.

    ``str()`` is fit for an operator. ``kind`` is the name of the error that the engine itself met
    (for example ``ModelLoadError``), ``detail`` its traceback, present only when asked for.
    """

    def __init__(self, reason: str, *, kind: str = "EngineStartError", detail: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind
        self.detail = detail


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


class LinkError(EngineError):
    """The connection between front end and engine is unusable."""


class FrameTooLargeError(LinkError):
    """A frame, sent or announced, is larger than the link allows."""


class MalformedFrameError(LinkError):
    """A frame does not hold one of the messages expected."""


class LinkClosedError(LinkError):
    """The other side has closed the link, or does not read any more."""
