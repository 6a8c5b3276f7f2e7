"""Exceptions as what is told of them, and back: typed ones as they are, others by a reference to the log."""

from __future__ import annotations

import logging
import secrets

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
from server.predict.messages import CallFailed, FailureKind, OpFailed

__all__ = ["call_failed", "error_of", "is_out_of_memory", "kind_of", "op_failed"]

log = logging.getLogger(__name__)

OUT_OF_MEMORY_RETRY_S = 1.0

_KINDS: dict[type[PredictError], FailureKind] = {
    InputError: FailureKind.INPUT,
    UnknownModelError: FailureKind.UNKNOWN_MODEL,
    WrongTaskError: FailureKind.WRONG_TASK,
    ModelRefusedError: FailureKind.MODEL_REFUSED,
    ModelExistsError: FailureKind.MODEL_EXISTS,
    ModelTooLargeError: FailureKind.MODEL_TOO_LARGE,
    ModelInUseError: FailureKind.MODEL_IN_USE,
    ModelUnloadedError: FailureKind.MODEL_UNLOADED,
    OverloadedError: FailureKind.OVERLOADED,
    PredictLostError: FailureKind.LOST,
    ExpiredError: FailureKind.EXPIRED,
    ComputeError: FailureKind.COMPUTE,
    QuarantinedError: FailureKind.QUARANTINED,
    PredictError: FailureKind.INTERNAL,
}
_ERRORS = {kind: error for error, kind in _KINDS.items()}


def kind_of(error: BaseException) -> FailureKind:
    """Return what kind of failure an error is; INTERNAL if nobody has foreseen it."""
    return next((_KINDS[base] for base in type(error).__mro__ if base in _KINDS), FailureKind.INTERNAL)


def error_of(failed: CallFailed | OpFailed) -> PredictError:
    """Return what to raise for a failure that was told; new each time."""
    if failed.kind is FailureKind.INPUT:
        index = failed.index if isinstance(failed, CallFailed) else None
        return InputError(failed.reason, index=index, part=failed.part)
    if failed.kind is FailureKind.MODEL_EXISTS:
        return ModelExistsError(failed.reason, part=failed.part, retry_after_s=failed.retry_after_s)
    return _ERRORS[failed.kind](failed.reason, retry_after_s=failed.retry_after_s)


def call_failed(call_id: int, error: Exception, *, index: int | None = None) -> CallFailed:
    """Say why a call has no answer. ``index``: the input at fault, where the error does not know it."""
    told, kind = _told(error)
    part = ""
    if isinstance(told, InputError):
        index, part = told.index, told.part
    return CallFailed(call_id, kind, told.reason, index=index, part=part, retry_after_s=told.retry_after_s)


def op_failed(op_id: int, error: Exception) -> OpFailed:
    """Say why an operation was not done."""
    told, kind = _told(error)
    part = told.part if isinstance(told, InputError | ModelExistsError) else ""
    return OpFailed(op_id, kind, told.reason, part=part, retry_after_s=told.retry_after_s)


def is_out_of_memory(error: Exception) -> bool:
    """Say whether memory was lacking. torch's errors are known by their name and text: no torch in here."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _told(error: Exception) -> tuple[PredictError, FailureKind]:
    if isinstance(error, PredictError):
        return error, kind_of(error)
    if is_out_of_memory(error):
        log.warning("out of memory: %s", type(error).__name__)
        reason = "there is not enough memory for this now"
        return OverloadedError(reason, retry_after_s=OUT_OF_MEMORY_RETRY_S), FailureKind.OVERLOADED
    reference = secrets.token_hex(4)
    log.error("internal error %s", reference, exc_info=error, extra={"reference": reference})
    return PredictError(f"internal error {reference}"), FailureKind.INTERNAL
