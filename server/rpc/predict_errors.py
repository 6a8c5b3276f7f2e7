"""From the errors of predict to those of calls, with the fields of the request that was sent.

Where a model does something else than the call asks for, ``model`` is at fault: INVALID_ARGUMENT, as other
servers of models answer (nothing about the server's state would have to change for it to work, so it is no
FAILED_PRECONDITION).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

import grpc

from kvserve.v1 import predict_pb2 as pb
from server.predict.errors import (
    ComputeError,
    ExpiredError,
    InputError,
    ModelExistsError,
    ModelInUseError,
    ModelRefusedError,
    ModelTooLargeError,
    ModelUnloadedError,
    OverloadedError,
    PredictError,
    PredictLostError,
    QuarantinedError,
    UnknownModelError,
    WrongTaskError,
)
from server.rpc.errors import (
    CallError,
    DeadlinePassed,
    FieldViolation,
    InternalError,
    InvalidArgument,
    ModelBusy,
    ModelNotFound,
    ModelNotLoaded,
    NotSupported,
    Quarantined,
    QueueFull,
    Unavailable,
)

__all__ = [
    "ModelExists",
    "ModelRefused",
    "ModelTooLarge",
    "error_from_predict",
    "error_message",
    "internal_error",
    "predict_is_off",
]

_log = logging.getLogger(__name__)
RETRY_AFTER_S = 1.0
"""Where it is worth trying again and nobody knows when."""


class ModelRefused(CallError):
    """The model cannot be loaded as it is: its files, its source, its configuration."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_REFUSED"


class ModelExists(CallError):
    """The version stands in the catalogue as something else; what differs is in the details, as a field."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "MODEL_EXISTS"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self._violation = FieldViolation(field, description)

    @property
    def violations(self) -> Sequence[FieldViolation]:
        """Return the field that differs."""
        return (self._violation,)


class ModelTooLarge(CallError):
    """There is no room for the model. No time to try again is given: it does not fit by itself."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "MODEL_TOO_LARGE"


def error_from_predict(
    error: PredictError, *, inputs: str = "", item: str = "", model: str = "model"
) -> CallError:
    """Return the call's error, with the request's own names of fields.

    ``inputs`` is the one with all inputs, ``item`` the repeated one of them, ``model`` the model's name.
    """
    retry_after_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
    match error:
        case InputError():
            return InvalidArgument.of(_field_of(error, inputs, item), error.reason)
        case WrongTaskError():
            return InvalidArgument.of(model, error.reason)
        case UnknownModelError():
            return ModelNotFound(error.reason)
        case ModelRefusedError():
            return ModelRefused(error.reason)
        case ModelExistsError():
            return ModelExists(error.part, error.reason)
        case ModelTooLargeError():
            return ModelTooLarge(error.reason)
        case ModelInUseError():
            return ModelBusy(error.reason)
        case ModelUnloadedError():
            return ModelNotLoaded(error.reason)
        case OverloadedError():
            return QueueFull(error.reason, retry_after_s=retry_after_s)
        case PredictLostError():
            return Unavailable(error.reason, reason="PREDICT_LOST", retry_after_s=retry_after_s)
        case ExpiredError():
            return DeadlinePassed(error.reason)
        case ComputeError():
            return InternalError(error.reason, reason="NUMERICAL")
        case QuarantinedError():
            return Quarantined(error.reason)
    return internal_error(error)


def predict_is_off() -> NotSupported:
    """Return the error of every call about predict to a server that was started without it."""
    return NotSupported(
        "predict is off: this server has its generating model alone; start it with --predict on"
    )


def internal_error(error: Exception, *, request_id: str = "") -> InternalError:
    """Log what nobody expected; return what the client is told of it: a reference to the log."""
    reference = request_id or secrets.token_hex(8)
    _log.error("predict failed", exc_info=error, extra={"request_id": reference})
    return InternalError(f"internal error; reference {reference}")


def error_message(error: CallError) -> pb.PredictError:
    """Return an error as a message of a stream that goes on."""
    return pb.PredictError(
        code=error.code.value[0],
        message=error.message,
        reason=error.reason,
        field=error.violations[0].field if error.violations else "",
        retry_after_s=error.retry_after_s or 0.0,
    )


def _field_of(error: InputError, inputs: str, item: str) -> str:
    if error.index is None:
        return inputs or error.part  # of an operation on a model, which has no inputs
    path = f"{item}[{error.index}]"
    return f"{path}.{error.part}" if error.part else path
