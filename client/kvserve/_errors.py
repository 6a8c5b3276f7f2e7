"""What can go wrong with a call, one class per gRPC status code.

Every error of a call is an ``Error``; the original gRPC error, where there is one, is its ``__cause__``::

    Error
    |-- InvalidArgument         .violations: which field, and what is wrong with it
    |-- Unauthenticated         no API key, or not a valid one
    |-- PermissionDenied        a valid key that may not do this
    |-- NotFound                no such model, version, prefix or snapshot
    |-- AlreadyExists           request_id is in use by a running call, or a snapshot has this name
    |-- FailedPrecondition      well formed, but not in this state: a prompt larger than the memory,
    |                           a prefix or model in use, a model that can't be loaded as it is
    |                           (.reason tells which, for a program)
    |-- OutOfRange
    |-- DeadlineExceeded        timeout_s passed
    |-- Cancelled               cancelled by stream.cancel(), by leaving the block, or by the server
    |-- Retryable               the same call may succeed later
    |   |-- ResourceExhausted   .retry_after_s: queue full, rate limit reached, no room for a model
    |   |-- Unavailable         .retry_after_s: not reachable, loading, draining, or the engine was lost
    |   `-- Aborted             .retry_after_s
    |-- Unimplemented           the server is older than the client, or is something else
    |-- Internal
    |-- DataLoss
    `-- Unknown

``MisuseError`` stands apart (a ``RuntimeError``): a mistake in the calling code, such as iterating over a
stream outside ``async with``. It is never raised for something that the server or the network did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "DataLoss",
    "DeadlineExceeded",
    "Error",
    "FailedPrecondition",
    "FieldViolation",
    "Internal",
    "InvalidArgument",
    "MisuseError",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Retryable",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "error_from_code",
    "error_from_rpc",
]


class MisuseError(RuntimeError):
    """A mistake in the calling code: a stream outside its block, a closed client, a result before its end."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that the server, or the client before sending, refused."""

    field: str
    """Path in the protobuf request, for example ``parameters.temperature``."""
    description: str


class Error(Exception):
    """Base of every error of a call.

    ``message`` is fit for a user; ``reason``, ``domain`` and ``details`` come from ``google.rpc.ErrorInfo``
    and are fit for a program (empty where the server sent none).
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        reason: str = "",
        domain: str = "",
        details: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)
        """Which fields were refused; filled for InvalidArgument."""
        self.retry_after_s = retry_after_s
        """How long the server asks to wait before another attempt; filled for Retryable, if it said so."""
        self.reason = reason
        self.domain = domain
        self.details = dict(details or {})


class InvalidArgument(Error):
    """The request is wrong and would be wrong again."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(Error):
    """No API key, or not a valid one."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(Error):
    """The API key is valid, but may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(Error):
    """The server has no such model, version, alias, prefix or snapshot."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(Error):
    """A running call of the same caller has this request id, or a snapshot has this name."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(Error):
    """The request is well formed, but the server's state forbids it.

    A prompt is larger than the server's memory; a prefix is held by running requests or by a hard pin; a
    model still serves, or can't be loaded as it is. ``reason`` tells which, where the server sent one.
    Nothing was changed.
    """

    code = grpc.StatusCode.FAILED_PRECONDITION


class OutOfRange(Error):
    """A position past the end of something."""

    code = grpc.StatusCode.OUT_OF_RANGE


class DeadlineExceeded(Error):
    """``timeout_s`` passed before the call ended."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(Error):
    """The call was cancelled: by its owner, or by the server."""

    code = grpc.StatusCode.CANCELLED


class Retryable(Error):
    """Base of the errors after which the same call may succeed later.

    The client's own retries are used up.
    """


class ResourceExhausted(Retryable):
    """The server's queue is full, a rate limit was reached, a message or a model was too large."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(Retryable):
    """The server can't be reached, is loading or draining, or lost the engine that ran the call."""

    code = grpc.StatusCode.UNAVAILABLE


class Aborted(Retryable):
    """The server gave the call up, for example because its reader was too slow."""

    code = grpc.StatusCode.ABORTED


class Unimplemented(Error):
    """The server doesn't know this method."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(Error):
    """A fault in the server, or an answer that breaks the contract."""

    code = grpc.StatusCode.INTERNAL


class DataLoss(Error):
    """Unrecoverable loss of data."""

    code = grpc.StatusCode.DATA_LOSS


class Unknown(Error):
    """The server gave no usable status."""

    code = grpc.StatusCode.UNKNOWN


_BY_CODE: dict[grpc.StatusCode, type[Error]] = {
    error_type.code: error_type
    for error_type in (
        Aborted,
        AlreadyExists,
        Cancelled,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        NotFound,
        OutOfRange,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        Unknown,
    )
}


def error_from_rpc(error: grpc.RpcError) -> Error:
    """Make the typed error of a failed call, from its code, text and rich details.

    Takes the error of a synchronous or an asyncio call. The caller raises the result ``from error``.
    """
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    info = error_details_pb2.ErrorInfo()
    for detail in _details_of(error):
        if isinstance(detail, error_details_pb2.BadRequest):
            violations += [FieldViolation(v.field, v.description) for v in detail.field_violations]
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.ToTimedelta().total_seconds()
        elif isinstance(detail, error_details_pb2.ErrorInfo):
            info = detail
    return _BY_CODE.get(code, Unknown)(
        message,
        violations=violations,
        retry_after_s=retry_after_s,
        reason=info.reason,
        domain=info.domain,
        details=info.metadata,
    )


_BY_NUMBER = {code.value[0]: error_type for code, error_type in _BY_CODE.items()}


def error_from_code(
    number: int,
    message: str,
    *,
    violations: Sequence[FieldViolation],
    reason: str,
    retry_after_s: float | None,
) -> Error:
    """Make the typed error of one request among many, from a ``google.rpc.Code`` inside a message."""
    error_type = _BY_NUMBER.get(number, Unknown)
    return error_type(
        message or error_type.code.name, violations=violations, reason=reason, retry_after_s=retry_after_s
    )


_DETAIL_TYPES = (error_details_pb2.BadRequest, error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo)


def _details_of(error: grpc.RpcError) -> Iterator[Message]:
    """Yield the rich details that this module knows; none if they are damaged or contradict the status."""
    try:
        status = rpc_status.from_call(error)
        for packed in status.details if status is not None else ():
            for detail_type in _DETAIL_TYPES:
                detail = detail_type()
                if packed.Unpack(detail):
                    yield detail
    except (ValueError, DecodeError):  # The plain status is still right; only its decoration is lost.
        return
