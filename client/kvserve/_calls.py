"""A call as a value: which method, with what, until when. What a transport is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from kvserve import _health
from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import generate_pb2, predict_pb2

__all__ = [
    "CLEAR_CACHE",
    "CLEAR_REUSE",
    "DETOKENIZE",
    "EMBED",
    "EVICT_PREFIXES",
    "GENERATE",
    "GET_MODEL_INFO",
    "GET_POLICY",
    "GET_PREDICT_MODEL",
    "GET_REUSE",
    "GET_STATS",
    "HEALTH_CHECK",
    "HEALTH_WATCH",
    "LIST_MODELS",
    "LIST_PREFIXES",
    "LOAD_MODEL",
    "LOOKUP_PREFIX",
    "PIN_PREFIX",
    "PREDICT",
    "RELEASE_PREFIX",
    "RESTORE_SNAPSHOT",
    "SAVE_SNAPSHOT",
    "SET_LIFETIME",
    "SET_MODEL_ALIAS",
    "SET_POLICY",
    "STREAM_GENERATE",
    "STREAM_PREDICT",
    "TOKENIZE",
    "UNLOAD_MODEL",
    "UNPIN_PREFIX",
    "WARM_PREFIX",
    "WATCH_CACHE",
    "WATCH_REUSE",
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

_PREDICT_SERVICE = "/kvserve.v1.PredictService/"

PREDICT: Method[predict_pb2.PredictRequest, predict_pb2.PredictResponse] = Method(
    _PREDICT_SERVICE + "Predict", predict_pb2.PredictResponse.FromString
)
STREAM_PREDICT: Method[predict_pb2.PredictRequest, predict_pb2.StreamPredictResponse] = Method(
    _PREDICT_SERVICE + "StreamPredict", predict_pb2.StreamPredictResponse.FromString
)
EMBED: Method[predict_pb2.EmbedRequest, predict_pb2.EmbedResponse] = Method(
    _PREDICT_SERVICE + "Embed", predict_pb2.EmbedResponse.FromString
)
GET_PREDICT_MODEL: Method[predict_pb2.GetPredictModelRequest, predict_pb2.PredictModel] = Method(
    _PREDICT_SERVICE + "GetPredictModel", predict_pb2.PredictModel.FromString
)

_CACHE_ADMIN_SERVICE = "/kvserve.v1.CacheAdminService/"

GET_STATS: Method[pb.GetStatsRequest, pb.GetStatsResponse] = Method(
    _CACHE_ADMIN_SERVICE + "GetStats", pb.GetStatsResponse.FromString
)
LIST_PREFIXES: Method[pb.ListPrefixesRequest, pb.ListPrefixesResponse] = Method(
    _CACHE_ADMIN_SERVICE + "ListPrefixes", pb.ListPrefixesResponse.FromString
)
LOOKUP_PREFIX: Method[pb.LookupPrefixRequest, pb.LookupPrefixResponse] = Method(
    _CACHE_ADMIN_SERVICE + "LookupPrefix", pb.LookupPrefixResponse.FromString
)
WARM_PREFIX: Method[pb.WarmPrefixRequest, pb.WarmPrefixProgress] = Method(
    _CACHE_ADMIN_SERVICE + "WarmPrefix", pb.WarmPrefixProgress.FromString
)
PIN_PREFIX: Method[pb.PinPrefixRequest, pb.PinPrefixResponse] = Method(
    _CACHE_ADMIN_SERVICE + "PinPrefix", pb.PinPrefixResponse.FromString
)
UNPIN_PREFIX: Method[pb.UnpinPrefixRequest, pb.UnpinPrefixResponse] = Method(
    _CACHE_ADMIN_SERVICE + "UnpinPrefix", pb.UnpinPrefixResponse.FromString
)
SET_LIFETIME: Method[pb.SetLifetimeRequest, pb.SetLifetimeResponse] = Method(
    _CACHE_ADMIN_SERVICE + "SetLifetime", pb.SetLifetimeResponse.FromString
)
RELEASE_PREFIX: Method[pb.ReleasePrefixRequest, pb.ReleasePrefixResponse] = Method(
    _CACHE_ADMIN_SERVICE + "ReleasePrefix", pb.ReleasePrefixResponse.FromString
)
EVICT_PREFIXES: Method[pb.EvictPrefixesRequest, pb.EvictPrefixesResponse] = Method(
    _CACHE_ADMIN_SERVICE + "EvictPrefixes", pb.EvictPrefixesResponse.FromString
)
CLEAR_CACHE: Method[pb.ClearCacheRequest, pb.ClearCacheResponse] = Method(
    _CACHE_ADMIN_SERVICE + "ClearCache", pb.ClearCacheResponse.FromString
)
GET_POLICY: Method[pb.GetPolicyRequest, pb.GetPolicyResponse] = Method(
    _CACHE_ADMIN_SERVICE + "GetPolicy", pb.GetPolicyResponse.FromString
)
SET_POLICY: Method[pb.SetPolicyRequest, pb.GetPolicyResponse] = Method(
    _CACHE_ADMIN_SERVICE + "SetPolicy", pb.GetPolicyResponse.FromString
)
WATCH_CACHE: Method[pb.WatchCacheRequest, pb.CacheEvent] = Method(
    _CACHE_ADMIN_SERVICE + "WatchCache", pb.CacheEvent.FromString
)
SAVE_SNAPSHOT: Method[pb.SaveSnapshotRequest, pb.SnapshotProgress] = Method(
    _CACHE_ADMIN_SERVICE + "SaveSnapshot", pb.SnapshotProgress.FromString
)
RESTORE_SNAPSHOT: Method[pb.RestoreSnapshotRequest, pb.SnapshotProgress] = Method(
    _CACHE_ADMIN_SERVICE + "RestoreSnapshot", pb.SnapshotProgress.FromString
)
LIST_MODELS: Method[pb.ListModelsRequest, pb.ListModelsResponse] = Method(
    _CACHE_ADMIN_SERVICE + "ListModels", pb.ListModelsResponse.FromString
)
LOAD_MODEL: Method[pb.LoadModelRequest, pb.LoadModelProgress] = Method(
    _CACHE_ADMIN_SERVICE + "LoadModel", pb.LoadModelProgress.FromString
)
UNLOAD_MODEL: Method[pb.UnloadModelRequest, pb.UnloadModelResponse] = Method(
    _CACHE_ADMIN_SERVICE + "UnloadModel", pb.UnloadModelResponse.FromString
)
SET_MODEL_ALIAS: Method[pb.SetModelAliasRequest, pb.SetModelAliasResponse] = Method(
    _CACHE_ADMIN_SERVICE + "SetModelAlias", pb.SetModelAliasResponse.FromString
)
GET_REUSE: Method[pb.GetReuseRequest, pb.GetReuseResponse] = Method(
    _CACHE_ADMIN_SERVICE + "GetReuse", pb.GetReuseResponse.FromString
)
WATCH_REUSE: Method[pb.WatchReuseRequest, pb.ReuseEvent] = Method(
    _CACHE_ADMIN_SERVICE + "WatchReuse", pb.ReuseEvent.FromString
)
CLEAR_REUSE: Method[pb.ClearReuseRequest, pb.ClearReuseResponse] = Method(
    _CACHE_ADMIN_SERVICE + "ClearReuse", pb.ClearReuseResponse.FromString
)

_HEALTH_SERVICE = "/grpc.health.v1.Health/"

HEALTH_CHECK: Method[Any, Any] = Method(_HEALTH_SERVICE + "Check", _health.HealthCheckResponse.FromString)
HEALTH_WATCH: Method[Any, Any] = Method(_HEALTH_SERVICE + "Watch", _health.HealthCheckResponse.FromString)
