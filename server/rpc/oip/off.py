"""The Open Inference Protocol of a server that was started without predict: it says so."""

from __future__ import annotations

from typing import Any, NoReturn

from grpc import aio

from server.rpc.oip import open_inference_pb2 as pb
from server.rpc.oip import open_inference_pb2_grpc as services
from server.rpc.predict_errors import predict_is_off

__all__ = ["InferenceOff"]

Context = aio.ServicerContext[Any, Any]


class InferenceOff(services.GRPCInferenceServiceServicer):
    """Live and not ready; every other method that is served elsewhere is refused."""

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        """Say that the server answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:  # noqa: N802
        """Say that it takes no calls."""
        return pb.ServerReadyResponse(ready=False)

    async def _refuse(self, request: object, context: Context) -> NoReturn:
        raise predict_is_off()

    ModelReady = _refuse
    ServerMetadata = _refuse
    ModelMetadata = _refuse
    ModelConfig = _refuse
    ModelStatistics = _refuse
    RepositoryIndex = _refuse
    RepositoryModelLoad = _refuse
    RepositoryModelUnload = _refuse
    ModelInfer = _refuse
    ModelStreamInfer = _refuse
