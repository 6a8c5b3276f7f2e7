"""What can go wrong with a predict call, as exceptions of the predict process and of its front-end side.

::

    PredictError
    ├── InputError            the caller's input; names it
    ├── UnknownModelError     no such name, version or alias
    ├── WrongTaskError        the model does something else
    ├── ModelRefusedError     it cannot be loaded: its files, its source, its configuration
    ├── ModelExistsError      the version stands in the catalogue as something else; names the field
    ├── ModelTooLargeError    it exceeds the memory for models, or that is held by models in use
    ├── ModelInUseError       it cannot be unloaded now
    ├── ModelUnloadedError    an operator unloaded it; LoadModel brings it back
    ├── OverloadedError       too much waits; with a delay to try again
    ├── PredictLostError      the predict process is being (re)started, drained, or was lost
    ├── ExpiredError          the deadline passed
    ├── ComputeError          the model could not compute it
    └── QuarantinedError      the process has died each time it computed it

``reason`` is fit for clients: no paths, addresses, type names. What operators need goes to the log.
"""

from __future__ import annotations

__all__ = [
    "ComputeError",
    "ExpiredError",
    "InputError",
    "ModelExistsError",
    "ModelInUseError",
    "ModelRefusedError",
    "ModelTooLargeError",
    "ModelUnloadedError",
    "OverloadedError",
    "PredictError",
    "PredictLostError",
    "QuarantinedError",
    "UnknownModelError",
    "WrongTaskError",
]


class PredictError(Exception):
    """A predict call, or an operation on a model, that cannot be done."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class InputError(PredictError):
    """One input cannot be accepted. ``index`` counts inputs of the call; None: it is about all of them."""

    def __init__(self, reason: str, *, index: int | None = None, part: str = "") -> None:
        """``part``: field below the input, such as "text", "pair" or "values[3]"."""
        super().__init__(reason)
        self.index = index
        self.part = part


class UnknownModelError(PredictError):
    """No model of this name is in the catalogue, or it has no such version or alias."""


class WrongTaskError(PredictError):
    """The model does something else: texts for a model over features, vectors from a classifier."""


class ModelRefusedError(PredictError):
    """The model cannot be loaded as it is."""


class ModelExistsError(PredictError):
    """The catalogue has this version already, and it is not what was asked for."""

    def __init__(self, reason: str, *, part: str = "", retry_after_s: float | None = None) -> None:
        """``part``: the field that differs."""
        super().__init__(reason, retry_after_s=retry_after_s)
        self.part = part


class ModelTooLargeError(PredictError):
    """There is no room for the model. Models that were loaded before are untouched."""


class ModelInUseError(PredictError):
    """Requests run on the model."""


class ModelUnloadedError(PredictError):
    """An operator unloaded the model, so that calls do not load it again."""


class OverloadedError(PredictError):
    """As much waits as may."""


class PredictLostError(PredictError):
    """There is no predict process to ask now."""


class ExpiredError(PredictError):
    """The deadline passed before it was computed."""


class ComputeError(PredictError):
    """The model failed on this input, or gave numbers that are none."""


class QuarantinedError(PredictError):
    """The process has died each time it computed this, so that it is not tried for a while."""
