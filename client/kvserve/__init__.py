"""Client of kvserve, a gRPC model server that computes a shared prefix once.

``AsyncClient`` for asyncio, ``Client`` for everything else; both have the same methods, take the same
arguments and raise the same errors (see ``kvserve.Error`` and its subclasses). ``kvserve.testing`` replaces
the server in tests.
"""

from kvserve._aio import AsyncClient, AsyncGenerateStream
from kvserve._config import ClientOptions, RetryPolicy, Tls
from kvserve._errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    MisuseError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Retryable,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
)
from kvserve._health import HealthStatus
from kvserve._options import ChatMessage, GenerateOptions
from kvserve._results import (
    FinishReason,
    GenerateEvent,
    GenerateResult,
    GenerateStart,
    ModelInfo,
    Sample,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Tokens,
    Usage,
)
from kvserve._sync import Client, GenerateStream

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncGenerateStream",
    "Cancelled",
    "ChatMessage",
    "Client",
    "ClientOptions",
    "DataLoss",
    "DeadlineExceeded",
    "Error",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "GenerateEvent",
    "GenerateOptions",
    "GenerateResult",
    "GenerateStart",
    "GenerateStream",
    "HealthStatus",
    "Internal",
    "InvalidArgument",
    "MisuseError",
    "ModelInfo",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "RetryPolicy",
    "Retryable",
    "Sample",
    "Timings",
    "Tls",
    "TokenLogprob",
    "TokenLogprobs",
    "Tokens",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "Usage",
    "__version__",
]
