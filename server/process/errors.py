"""What can go wrong between two processes, as a tree of types::

ProcessStartError           it did not become ready; says why in an operator's words
LinkError                   the connection between the two is unusable
|-- FrameTooLargeError
|-- MalformedFrameError
`-- LinkClosedError
"""

from __future__ import annotations

__all__ = [
    "FrameTooLargeError",
    "LinkClosedError",
    "LinkError",
    "MalformedFrameError",
    "ProcessStartError",
]


class ProcessStartError(Exception):
    """The process did not become ready.

    ``str()`` is fit for an operator. ``kind`` is the name of the error that the process itself met
    (for example ``ModelLoadError``), ``detail`` its traceback, present only when asked for.
    """

    def __init__(self, reason: str, *, kind: str | None = None, detail: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind or type(self).__name__
        self.detail = detail


class LinkError(Exception):
    """The connection between front end and process is unusable."""


class FrameTooLargeError(LinkError):
    """A frame, sent or announced, is larger than the link allows."""


class MalformedFrameError(LinkError):
    """A frame does not hold one of the messages expected."""


class LinkClosedError(LinkError):
    """The other side has closed the link, or does not read any more."""
