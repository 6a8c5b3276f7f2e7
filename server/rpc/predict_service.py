"""``kvserve.v1.PredictService``: any model that the predict process has.

::

    validate, every field --> PredictBackend.predict --> what the version that answered means --> answer

Which models there are, and what their numbers mean, the backend knows; it is asked with every call.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from google.protobuf.message import Message
from grpc import aio

from kvserve.v1 import predict_pb2 as pb
from kvserve.v1 import predict_pb2_grpc
from server.predict.errors import PredictError
from server.predict.interface import PredictBackend
from server.predict.messages import CallStats, PredictAnswer, Task
from server.rpc import predict_convert as convert
from server.rpc.call import Call, current_call
from server.rpc.errors import (
    DeadlinePassed,
    InvalidArgument,
    RequestIdInUse,
    ResponseTooLarge,
    Unavailable,
)
from server.rpc.model_infos import ModelInfos
from server.rpc.predict_errors import error_from_predict, predict_is_off
from server.rpc.predict_read import PredictAsk, read_embed, read_model_request, read_predict
from server.rpc.predict_stream import PredictStream
from server.rpc.receiving import RequestStream

__all__ = ["PredictLimits", "PredictObserver", "PredictService"]

Context = aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class PredictLimits:
    """What the service holds its clients to."""

    max_inputs: int = 4096
    """Of one call."""
    write_timeout_s: float = 10.0
    max_message_bytes: int = 4 << 20


class PredictObserver(Protocol):
    """Sees predict calls that were answered: metrics."""

    def answered(
        self,
        task: Task,
        model: str,
        version: str,
        *,
        num_inputs: int,
        num_tokens: int,
        num_hits: int,
        stats: CallStats,
        total_s: float,
    ) -> None:
        """Note an answer; one of a stream counts like a call."""
        ...


class PredictService(predict_pb2_grpc.PredictServiceServicer):
    """Serves the models of one backend; without one every method answers that it is not configured.

    All methods run on the event loop and are named by the service definition.
    """

    def __init__(
        self,
        backend: PredictBackend | None,
        *,
        limits: PredictLimits,
        observer: PredictObserver | None = None,
    ) -> None:
        self._maybe_backend = backend
        self._limits = limits
        self._observer = observer
        self._request_ids: set[tuple[str, str]] = set()
        self._infos = None if backend is None else ModelInfos(backend)
        self._streams: set[PredictStream] = set()
        self._is_draining = False

    def drain(self) -> None:
        """Refuse new calls from now on; streams answer what they have read and end."""
        self._is_draining = True
        for stream in self._streams:
            stream.drain()

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:  # noqa: N802
        """Answer some inputs."""
        call = current_call.get()
        ask = read_predict(request, max_inputs=self._limits.max_inputs)
        claim = self._claim(call, ask)
        response = pb.PredictResponse()
        try:
            await self._predict(call, ask, call.received_s, response)
        finally:
            self._request_ids.discard(claim)
        return response

    async def StreamPredict(self, requests: RequestStream, context: Context) -> None:  # noqa: N802
        """Answer any number of requests, each as it is ready."""
        self._check_taking_requests()
        self._backend  # noqa: B018 - there is one, or this call ends here
        answer = partial(self._predict, current_call.get())
        stream = PredictStream(answer, max_inputs=self._limits.max_inputs)
        self._streams.add(stream)
        try:
            await stream.run(requests, context, write_timeout_s=self._limits.write_timeout_s)
        finally:
            self._streams.discard(stream)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """Return the vectors of some texts."""
        call = current_call.get()
        ask = read_embed(request, max_inputs=self._limits.max_inputs)
        claim = self._claim(call, ask)
        try:
            model, answer = await self._compute(call, ask)
            total_s = time.perf_counter() - call.received_s
            response = pb.EmbedResponse()
            await convert.write_embed_response(response, ask, answer, model=model, total_s=total_s)
            self._check_size(response)
            self._answered(Task.EMBED, model, answer, total_s)
            return response
        finally:
            self._request_ids.discard(claim)

    async def GetPredictModel(  # noqa: N802
        self, request: pb.GetPredictModelRequest, context: Context
    ) -> pb.PredictModel:
        """Describe a model."""
        read_model_request(request)
        backend = self._backend
        try:
            model = request.model or await self._only_model()
            return convert.model_of(await backend.describe(model, request.version))
        except PredictError as error:
            raise error_from_predict(error) from error

    # -- inside -------------------------------------------------------------------------------------

    @property
    def _backend(self) -> PredictBackend:
        if self._maybe_backend is None:
            raise predict_is_off()
        return self._maybe_backend

    async def _predict(
        self, call: Call, ask: PredictAsk, received_s: float, response: pb.PredictResponse
    ) -> None:
        """Write the answer into ``response``, which is empty."""
        model, answer = await self._compute(call, ask)
        info = None
        if ask.inputs.texts and self._infos is not None:
            info = await self._infos.of(model, answer.version)
        total_s = time.perf_counter() - received_s
        max_bytes = self._limits.max_message_bytes
        await convert.write_response(
            response, ask, answer, info, model=model, total_s=total_s, max_bytes=max_bytes
        )
        self._check_size(response)
        self._answered(Task.FEATURES if info is None else info.task, model, answer, total_s)

    async def _compute(self, call: Call, ask: PredictAsk) -> tuple[str, PredictAnswer]:
        """Return the model's name and its answer."""
        self._check_taking_requests()
        backend = self._backend
        try:
            model = ask.model or await self._only_model()
            call.attributes["gen_ai.request.model"] = model
            remaining_s = call.remaining_s()
            if remaining_s == 0:
                raise DeadlinePassed("the deadline passed before the request was queued")
            answer = await backend.predict(
                model,
                ask.inputs,
                version=ask.version,
                task=ask.task,
                truncate=ask.truncate,
                reuse=ask.reuse,
                deadline_s=remaining_s,
                tenant=call.caller.salt,
            )
        except PredictError as error:
            raise error_from_predict(error, inputs=ask.inputs_path, item=ask.item_path) from error
        return model, answer

    async def _only_model(self) -> str:
        """Return the name of the only model: an empty one stands for it."""
        names = {model.name for model in (await self._backend.models()).models}
        if len(names) != 1:
            raise InvalidArgument.of("model", "must name a model: this server does not serve exactly one")
        return names.pop()

    def _claim(self, call: Call, ask: PredictAsk) -> tuple[str, str]:
        """Take the call's id while it runs: of two calls of a tenant with one id, logs could not tell.

        Give back what this returns. Raises :class:`RequestIdInUse`.
        """
        call.request_id = ask.request_id
        claim = (call.caller.tenant, ask.request_id)
        if claim in self._request_ids:
            raise RequestIdInUse("a running call of yours has this request_id")
        self._request_ids.add(claim)
        return claim

    def _check_taking_requests(self) -> None:
        if self._is_draining:
            raise Unavailable("the server is shutting down", reason="DRAINING")

    def _check_size(self, response: Message) -> None:
        if response.ByteSize() > self._limits.max_message_bytes:
            raise ResponseTooLarge("the answer exceeds the server's message limit; send fewer inputs at once")

    def _answered(self, task: Task, model: str, answer: PredictAnswer, total_s: float) -> None:
        if self._observer is not None:
            outputs = answer.outputs
            self._observer.answered(
                task,
                model,
                answer.version,
                num_inputs=len(outputs),
                num_tokens=sum([output.num_tokens for output in outputs]),
                num_hits=sum([output.cache_hit for output in outputs]),
                stats=answer.stats,
                total_s=total_s,
            )
