"""A call as a value: which method, with what, until when. What a transport is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from kvserve import _health
from kvserve.v1 import generate_pb2

__all__ = [
    "DETOKENIZE",
    "GENERATE",
    "GET_MODEL_INFO",
    "HEALTH_CHECK",
    "HEALTH_WATCH",
    "STREAM_GENERATE",
    "TOKENIZE",
    "Call",
    "Method",
]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Response]):
    """A remote method."""

    path: str
    """``/package.Service/Method``."""
    parse: Callable[[bytes], Response]

    @property
    def name(self) -> str:
        """Return the method's own name."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Request, Response]):
    """One call, ready to be sent."""

    method: Method[Request, Response]
    request: Request
    timeout_s: float | None
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Headers, the API key among them."""
    wait_for_ready: bool | None = None
    """True: wait for the connection until the deadline. None: fail at once if it can't be made."""


_GENERATE_SERVICE = "/kvserve.v1.GenerateService/"

STREAM_GENERATE: Method[generate_pb2.GenerateRequest, generate_pb2.GenerateEvent] = Method(
    _GENERATE_SERVICE + "StreamGenerate", generate_pb2.GenerateEvent.FromString
)
GENERATE: Method[generate_pb2.GenerateRequest, generate_pb2.GenerateResponse] = Method(
    _GENERATE_SERVICE + "Generate", generate_pb2.GenerateResponse.FromString
)
TOKENIZE: Method[generate_pb2.TokenizeRequest, generate_pb2.TokenizeResponse] = Method(
    _GENERATE_SERVICE + "Tokenize", generate_pb2.TokenizeResponse.FromString
)
DETOKENIZE: Method[generate_pb2.DetokenizeRequest, generate_pb2.DetokenizeResponse] = Method(
    _GENERATE_SERVICE + "Detokenize", generate_pb2.DetokenizeResponse.FromString
)
GET_MODEL_INFO: Method[generate_pb2.GetModelInfoRequest, generate_pb2.ModelInfo] = Method(
    _GENERATE_SERVICE + "GetModelInfo", generate_pb2.ModelInfo.FromString
)

_HEALTH_SERVICE = "/grpc.health.v1.Health/"

HEALTH_CHECK: Method[Any, Any] = Method(_HEALTH_SERVICE + "Check", _health.HealthCheckResponse.FromString)
HEALTH_WATCH: Method[Any, Any] = Method(_HEALTH_SERVICE + "Watch", _health.HealthCheckResponse.FromString)
