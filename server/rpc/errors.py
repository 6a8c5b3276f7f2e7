"""What can go wrong with a call, as exceptions; each knows its status code and its details.

::

    CallError
    ├── InvalidArgument      INVALID_ARGUMENT     every violated field, as google.rpc.BadRequest
    ├── ModelNotFound        NOT_FOUND
    ├── RequestIdInUse       ALREADY_EXISTS
    ├── NeverFits            FAILED_PRECONDITION  the KV pool is too small for it, now and always
    ├── ModelNotLoaded       FAILED_PRECONDITION  unloaded on purpose; LoadModel brings it back
    ├── ModelBusy            FAILED_PRECONDITION  it cannot be unloaded now
    ├── ModelLoadFailed      FAILED_PRECONDITION  it can be tried again
    ├── PrefixNotFound       NOT_FOUND            no such prefix, namespace or snapshot
    ├── PrefixInUse          FAILED_PRECONDITION  held by running requests or hard pins
    ├── NotSupported         FAILED_PRECONDITION  this server is not configured for it
    ├── PinBudgetExceeded    FAILED_PRECONDITION
    ├── SnapshotExists       ALREADY_EXISTS
    ├── ResponseTooLarge     RESOURCE_EXHAUSTED   the unary answer exceeds the message limit
    ├── QueueFull            RESOURCE_EXHAUSTED   with RetryInfo and pushback
    ├── Unavailable          UNAVAILABLE          loading, draining or lost engine; RetryInfo where it helps
    ├── DeadlinePassed       DEADLINE_EXCEEDED
    ├── ReaderTooSlow        ABORTED
    ├── Unauthenticated      UNAUTHENTICATED
    ├── PermissionDenied     PERMISSION_DENIED
    ├── Quarantined          INTERNAL             the process has died each time it computed this request
    └── InternalError        INTERNAL             a reference to the server's log, nothing else

Servicers raise them; ``server.rpc.interceptor`` alone turns them into statuses. Messages are written for
clients: no paths, no type names, nothing of another caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from server.engine.messages import FailureKind

__all__ = [
    "CallError",
    "DeadlinePassed",
    "FieldViolation",
    "InternalError",
    "InvalidArgument",
    "ModelBusy",
    "ModelLoadFailed",
    "ModelNotFound",
    "ModelNotLoaded",
    "NeverFits",
    "NotSupported",
    "OutOfMemory",
    "PermissionDenied",
    "PinBudgetExceeded",
    "PrefixInUse",
    "PrefixNotFound",
    "Quarantined",
    "QueueFull",
    "ReaderTooSlow",
    "RequestIdInUse",
    "ResponseTooLarge",
    "SnapshotExists",
    "Unauthenticated",
    "Unavailable",
    "error_from_engine",
    "trailing_metadata",
]

ERROR_DOMAIN = "kvserve"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
_MAX_REPORTED_VIOLATIONS = 32
"""Details travel in trailing metadata, of which clients accept 8 KiB. No request has more fields."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that cannot be accepted, by its path, and why."""

    field: str
    description: str


class CallError(Exception):
    """A call that ends with a status other than OK. ``message`` reaches the client as it stands."""

    code: ClassVar[grpc.StatusCode]
    reason: str

    def __init__(
        self, message: str, *, reason: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        if reason is not None:
            self.reason = reason

    @property
    def violations(self) -> Sequence[FieldViolation]:
        """Return the violated fields; empty but for :class:`InvalidArgument`."""
        return ()


class InvalidArgument(CallError):
    """The request itself is at fault, whatever the state of the server."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        self._violations = tuple(violations)
        first = self._violations[0]
        more = f" (and {len(self._violations) - 1} more)" if len(self._violations) > 1 else ""
        super().__init__(f"{first.field}: {first.description}{more}")

    @property
    def violations(self) -> Sequence[FieldViolation]:
        """Return every violation found."""
        return self._violations

    @classmethod
    def of(cls, field: str, description: str) -> InvalidArgument:
        """Return the error for a single field."""
        return cls((FieldViolation(field, description),))


class ModelNotFound(CallError):
    """No model of that name is served here."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "MODEL_NOT_FOUND"


class RequestIdInUse(CallError):
    """The caller has a running call of that id."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "REQUEST_ID_IN_USE"


class NeverFits(CallError):
    """Prompt and generation need more KV blocks than the pool has altogether."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "KV_POOL_TOO_SMALL"


class ModelNotLoaded(CallError):
    """The model was unloaded."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_NOT_LOADED"


class ModelBusy(CallError):
    """Requests run, or the model is being loaded."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_BUSY"


class ModelLoadFailed(CallError):
    """The model could not be loaded; it stays unloaded."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_LOAD_FAILED"


class PrefixNotFound(CallError):
    """Nothing in the cache has that name."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_CACHED"


class SnapshotNotFound(CallError):
    """There is no snapshot of that name."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "SNAPSHOT_NOT_FOUND"


class PrefixInUse(CallError):
    """Running requests or hard pins hold some of it; nothing has changed."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "IN_USE"


class NotSupported(CallError):
    """The server is not configured for it."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NOT_CONFIGURED"


class PinBudgetExceeded(CallError):
    """There is no room within the pins' budget; nothing has changed."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    """Not RESOURCE_EXHAUSTED, which clients try again: an operator has to unpin something first."""
    reason = "PIN_BUDGET"


class SnapshotExists(CallError):
    """The snapshot's name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "SNAPSHOT_EXISTS"


class ResponseTooLarge(CallError):
    """A unary answer that exceeds the limit on messages; the stream has no such limit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "RESPONSE_TOO_LARGE"


class QueueFull(CallError):
    """As many requests wait as may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class OutOfMemory(CallError):
    """A step did not fit into memory."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OUT_OF_MEMORY"


class Unavailable(CallError):
    """The engine takes no requests now, or was lost while it worked on this one."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class DeadlinePassed(CallError):
    """The caller's deadline or the server's own limit has passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class ReaderTooSlow(CallError):
    """The client did not take a message within the write timeout."""

    code = grpc.StatusCode.ABORTED
    reason = "READER_TOO_SLOW"


class Unauthenticated(CallError):
    """No acceptable key."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(CallError):
    """A good key that may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class Quarantined(CallError):
    """The process that computes it has died each time with this request in it: not tried for a while."""

    code = grpc.StatusCode.INTERNAL
    reason = "QUARANTINED"


class InternalError(CallError):
    """Something failed that should not have. The client learns a reference into the log alone."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


def error_from_engine(kind: FailureKind, *, retry_after_s: float | None = None) -> CallError:
    """Return the error for an engine's refusal or failure. The engine's own text stays in the log."""
    match kind:
        case FailureKind.QUEUE_FULL:
            after_s = 1.0 if retry_after_s is None else retry_after_s
            return QueueFull("the queue is full", retry_after_s=after_s)
        case FailureKind.TOO_LARGE:
            return NeverFits("prompt and max_new_tokens can never fit the KV cache of this server")
        case FailureKind.DEADLINE:
            return DeadlinePassed("the deadline passed before the request finished")
        case FailureKind.DRAINING:
            return Unavailable(
                "the server is shutting down, or its model is being unloaded",
                reason="DRAINING",
                retry_after_s=retry_after_s,
            )
        case FailureKind.NOT_LOADED:
            return ModelNotLoaded("the model is not loaded")
        case FailureKind.ENGINE_LOST:
            after_s = 1.0 if retry_after_s is None else retry_after_s
            return Unavailable(
                "the engine was lost and is being restarted", reason="ENGINE_LOST", retry_after_s=after_s
            )
        case FailureKind.NUMERICAL:
            return InternalError("the model could not compute this request", reason="NUMERICAL")
        case FailureKind.OUT_OF_MEMORY:
            return OutOfMemory("the server ran out of memory while it computed this request")
        case FailureKind.QUARANTINED:
            return Quarantined(
                "the engine has died each time it computed this request; it is not tried again for a while"
            )
        case FailureKind.INTERNAL:
            return InternalError("internal error")


def trailing_metadata(error: CallError) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata that carries an error's details."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    details = status.details
    if error.violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations[:_MAX_REPORTED_VIOLATIONS]:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        _pack(details.add(), bad_request)
    _pack(details.add(), error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))
    metadata: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        delay_ms = max(1, math.ceil(error.retry_after_s * 1000))
        delay = duration_pb2.Duration(seconds=delay_ms // 1000, nanos=delay_ms % 1000 * 1_000_000)
        _pack(details.add(), error_details_pb2.RetryInfo(retry_delay=delay))
        metadata.append((PUSHBACK_KEY, str(delay_ms)))
    elif error.code is grpc.StatusCode.RESOURCE_EXHAUSTED or isinstance(error, Quarantined):
        # Clients' retry policies try the former again unless told that time alone changes nothing; some
        # try everything.
        metadata.append((PUSHBACK_KEY, "-1"))
    metadata.append((STATUS_DETAILS_KEY, status.SerializeToString()))
    return tuple(metadata)


def _pack(
    target: any_pb2.Any,
    message: error_details_pb2.BadRequest | error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo,
) -> None:
    target.Pack(message)
