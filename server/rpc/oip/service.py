"""``inference.GRPCInferenceService``: the same models for clients of the Open Inference Protocol (Triton's).

A model that was not used yet is ready: it is loaded by the first call that needs it, which may be a question
for its metadata. One that an operator unloaded is not, until it is loaded again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Any, TypeVar, cast

from grpc import aio

from server.predict.errors import InputError, PredictError
from server.predict.interface import PredictBackend, PredictState
from server.predict.messages import LoadModel, ModelList, ModelPhase, ModelStatus, UnloadModel
from server.rpc.call import Call, current_call
from server.rpc.errors import CallError, InvalidArgument, ModelNotLoaded, ResponseTooLarge, Unavailable
from server.rpc.model_infos import ModelInfos
from server.rpc.oip import open_inference_pb2 as pb
from server.rpc.oip import open_inference_pb2_grpc as services
from server.rpc.oip.parameters import InferOptions, check_model, check_repository, wanted_tensors
from server.rpc.oip.signature import classification_of, inputs_of, outputs_of, tensors_of
from server.rpc.oip.statistics import statistics_of
from server.rpc.oip.tensors import OutputTensor, read_inputs
from server.rpc.predict_errors import error_from_predict, internal_error
from server.rpc.predict_service import PredictObserver
from server.rpc.receiving import RequestStream
from server.rpc.stream_writer import StreamWriter

__all__ = ["InferenceService"]

MAX_IN_FLIGHT = 64
"""Requests of one stream that are worked on at once; then no more are read."""
DRAIN_S = 30.0
_EXTENSIONS = ("classification", "model_repository", "model_repository(unload_dependents)", "statistics")
_STATES = {ModelPhase.READY: "READY", ModelPhase.LOADING: "LOADING", ModelPhase.DRAINING: "UNLOADING"}

Context = aio.ServicerContext[Any, Any]
Answering = asyncio.Task[pb.ModelStreamInferResponse]
_T = TypeVar("_T")


class InferenceService(services.GRPCInferenceServiceServicer):
    """All methods run on the event loop."""

    def __init__(
        self,
        backend: PredictBackend,
        *,
        max_inputs: int,
        write_timeout_s: float,
        max_message_bytes: int = 4 << 20,
        observer: PredictObserver | None = None,
    ) -> None:
        self._backend = backend
        self._infos = ModelInfos(backend)
        self._observer = observer
        self._max_inputs = max_inputs
        self._write_timeout_s = write_timeout_s
        self._max_message_bytes = max_message_bytes
        self._readers: set[asyncio.Task[None]] = set()
        """Of open streams."""
        self._is_draining = False

    def drain(self) -> None:
        """Refuse new streams from now on; open ones answer what they have read and end."""
        self._is_draining = True
        for reader in self._readers:
            reader.cancel()

    # -- server and models --------------------------------------------------------------------------

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        """Say that the server answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:  # noqa: N802
        """Say whether it takes calls."""
        return pb.ServerReadyResponse(ready=self._backend.state is PredictState.READY)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: N802
        """Say whether a call for the model would be computed."""
        status = await self._describe(request.name, request.version)
        return pb.ModelReadyResponse(ready=_is_ready(status))

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Say what the server is."""
        return pb.ServerMetadataResponse(name="kvserve", version=_server_version(), extensions=_EXTENSIONS)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Describe a model's tensors; loads it if nobody has yet."""
        status = await self._loaded(request.name, request.version)
        info = status.info
        assert info is not None
        models = await self._models()
        metadata = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=status.name,
            versions=[model.version for model in models.models if model.name == status.name],
            platform=f"kvserve_{info.executor}",
            inputs=[
                metadata(name=spec.name, datatype=spec.datatype, shape=[-1, *spec.dims])
                for spec in inputs_of(info)
            ],
            outputs=[
                metadata(name=spec.name, datatype=spec.datatype, shape=[-1, *spec.dims])
                for spec in outputs_of(info)
            ],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:  # noqa: N802
        """Describe a model as Triton's configurations do; loads it if nobody has yet."""
        status = await self._loaded(request.name, request.version)
        info = status.info
        assert info is not None
        config = pb.ModelConfig(
            name=status.name,
            platform=f"kvserve_{info.executor}",
            backend="kvserve",
            max_batch_size=self._max_inputs,
            input=[
                pb.ModelInput(
                    name=spec.name,
                    data_type=_data_type(spec.datatype),
                    dims=spec.dims or (1,),
                    optional=spec.is_optional,
                )
                for spec in inputs_of(info)
            ],
            output=[
                pb.ModelOutput(name=spec.name, data_type=_data_type(spec.datatype), dims=spec.dims or (1,))
                for spec in outputs_of(info)
            ],
        )
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Count what models did, as of about a second ago."""
        version = ""
        if request.name:
            described = await self._describe(request.name, request.version)
            version = described.version if request.version else ""
        elif request.version:
            raise InvalidArgument.of("version", "is of a model, which must be named too")
        models = await self._models()
        stats = self._backend.stats
        counted = {} if stats is None else {(model.name, model.version): model for model in stats.models}
        return pb.ModelStatisticsResponse(
            model_stats=[
                statistics_of(model, counted.get((model.name, model.version)))
                for model in models.models
                if request.name in ("", model.name) and version in ("", model.version)
            ]
        )

    # -- repository ---------------------------------------------------------------------------------

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """List the catalogue."""
        check_repository(request.repository_name)
        models = await self._models()
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                index(
                    name=model.name,
                    version=model.version,
                    state=_STATES.get(model.phase, "UNAVAILABLE"),
                    reason=model.fault or ("unloaded" if model.phase is ModelPhase.UNLOADED else ""),
                )
                for model in models.models
                if not request.ready or model.phase is ModelPhase.READY
            ]
        )

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model's latest version; return when it is ready."""
        if request.parameters:
            raise InvalidArgument.of("parameters", "a model's configuration and files cannot be sent")
        check_repository(request.repository_name)
        check_model("model_name", request.model_name)
        await self._load(request.model_name, "")
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload all versions of a model, once the calls that run have ended."""
        check_repository(request.repository_name)
        check_model("model_name", request.model_name)
        remaining_s = current_call.get().remaining_s()
        try:
            drain_s = min(remaining_s or DRAIN_S, DRAIN_S)
            await self._backend.unload(UnloadModel(request.model_name, drain_s=drain_s))
        except PredictError as error:
            raise error_from_predict(error, inputs="model_name") from error
        return pb.RepositoryModelUnloadResponse()

    # -- inference ----------------------------------------------------------------------------------

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:  # noqa: N802
        """Compute."""
        return await self._infer(request, current_call.get())

    async def ModelStreamInfer(self, requests: RequestStream, context: Context) -> None:  # noqa: N802
        """Compute what comes, answering in the order of the requests; a failure is an answer as well.

        What cannot be read ends the stream, after the answers to what came before it.
        """
        self._check_taking_requests()
        call = current_call.get()
        writer = StreamWriter(context, timeout_s=self._write_timeout_s)
        order: asyncio.Queue[Answering] = asyncio.Queue(MAX_IN_FLIGHT)
        tasks: set[asyncio.Task[Any]] = set()

        def begin(work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
            task = asyncio.create_task(work)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            return task

        async def read() -> None:
            async for request in requests:
                await order.put(begin(self._infer_or_say(request, requests.fault, call)))

        reading = begin(read())
        self._readers.add(reading)
        try:
            while (task := await _next(order, reading)) is not None:
                await writer.write(await task)
        finally:
            self._readers.discard(reading)
            writer.close()
            running = list(tasks)
            for each in running:
                each.cancel()
            if running:
                await asyncio.wait(running)
        self._check_taking_requests()

    async def _infer_or_say(
        self, request: pb.ModelInferRequest, fault: InvalidArgument | None, call: Call
    ) -> pb.ModelStreamInferResponse:
        try:
            if fault is not None:
                raise fault
            return pb.ModelStreamInferResponse(infer_response=await self._infer(request, call))
        except CallError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - this request fails, the stream does not
            failure = internal_error(error)
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=request.id
        )
        return pb.ModelStreamInferResponse(error_message=failure.message, infer_response=response)

    async def _infer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        started_s = time.perf_counter()
        check_model("model_name", request.model_name, "model_version", request.model_version)
        options = InferOptions(request)
        inputs = read_inputs(request, max_inputs=self._max_inputs)
        deadline_s = call.remaining_s()
        if options.timeout_s is not None:
            deadline_s = options.timeout_s if deadline_s is None else min(deadline_s, options.timeout_s)
        try:
            answer = await self._backend.predict(
                request.model_name,
                inputs,
                version=request.model_version,
                truncate=options.truncate,
                reuse=options.reuse,
                deadline_s=deadline_s,
                tenant=call.caller.salt,
            )
        except PredictError as error:
            raise _error_of_infer(error, request) from error
        info = await self._infos.of(request.model_name, answer.version)
        tensors = tensors_of(info, answer.outputs)
        wanted = wanted_tensors(request.outputs, tensors)
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=answer.version, id=request.id
        )
        for tensor, num_classes in wanted:
            _append(response, classification_of(info, answer.outputs, num_classes) if num_classes else tensor)
        if response.ByteSize() > self._max_message_bytes:
            raise ResponseTooLarge("the answer exceeds the server's message limit; send fewer inputs at once")
        if self._observer is not None:
            self._observer.answered(
                info.task,
                request.model_name,
                answer.version,
                num_inputs=len(answer.outputs),
                num_tokens=sum(output.num_tokens for output in answer.outputs),
                num_hits=sum(output.cache_hit for output in answer.outputs),
                stats=answer.stats,
                total_s=time.perf_counter() - started_s,
            )
        return response

    # -- inside -------------------------------------------------------------------------------------

    def _check_taking_requests(self) -> None:
        if self._is_draining:
            raise Unavailable("the server is shutting down", reason="DRAINING")

    async def _models(self) -> ModelList:
        try:
            return await self._backend.models()
        except PredictError as error:
            raise error_from_predict(error) from error

    async def _describe(self, name: str, version: str) -> ModelStatus:
        check_model("name", name, "version", version)
        try:
            return await self._backend.describe(name, version)
        except PredictError as error:
            raise error_from_predict(error) from error

    async def _loaded(self, name: str, version: str) -> ModelStatus:
        status = await self._describe(name, version)
        if status.info is None or status.phase is not ModelPhase.READY:
            if not _is_ready(status):
                raise ModelNotLoaded(status.fault or "the model is not loaded")
            status = await self._load(name, version)
        return status

    async def _load(self, name: str, version: str) -> ModelStatus:
        status: ModelStatus | None = None
        try:
            async for news in self._backend.load(LoadModel(name, version)):
                if isinstance(news, ModelStatus):
                    status = news
        except PredictError as error:
            raise error_from_predict(error, inputs="model_name") from error
        if status is None or status.info is None:
            raise ModelNotLoaded("the model is not loaded")
        return status


async def _next(order: asyncio.Queue[Answering], reading: asyncio.Task[None]) -> Answering | None:
    """Return the next answer's task; None: all is read, or no more may be. Raises what ended the reading."""
    taking = asyncio.ensure_future(order.get())
    try:
        await asyncio.wait({taking, reading}, return_when=asyncio.FIRST_COMPLETED)
        if taking.done():
            return taking.result()
        if not reading.cancelled():
            reading.result()
        return None
    finally:
        taking.cancel()


def _error_of_infer(error: PredictError, request: pb.ModelInferRequest) -> CallError:
    """Return the call's error, naming the tensor of the text, the pair or the row that is at fault."""
    name = "pair" if isinstance(error, InputError) and error.part == "pair" else "text"
    order = [tensor.name for tensor in request.inputs]
    index = order.index(name) if name in order else 0
    return error_from_predict(error, inputs="inputs", item=f"inputs[{index}].contents", model="model_name")


def _server_version() -> str:
    try:
        return version_of("kvserve-server")
    except PackageNotFoundError:  # run from its sources
        return ""


def _append(response: pb.ModelInferResponse, tensor: OutputTensor) -> None:
    response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    response.raw_output_contents.append(tensor.data)


def _is_ready(status: ModelStatus) -> bool:
    return status.phase is ModelPhase.READY or (
        status.phase in (ModelPhase.UNLOADED, ModelPhase.LOADING) and not status.held
    )


def _data_type(datatype: str) -> pb.DataType:
    name = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    return cast("pb.DataType", pb.DataType.Value(name))
