"""The client for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

from kvserve._cache_aio import AsyncCache
from kvserve._cache_requests import CacheCalls
from kvserve._calls import Call
from kvserve._config import ClientOptions, resolve_config
from kvserve._errors import DeadlineExceeded, MisuseError, Unavailable
from kvserve._grpc_aio import AsyncGrpcTransport
from kvserve._health import HealthStatus, ReadyWait, health_status
from kvserve._models_aio import AsyncModels
from kvserve._models_requests import ModelCalls
from kvserve._options import CallOptions, DetokenizeOptions, GenerateOptions, TokenizeOptions
from kvserve._predict_aio import AsyncPredictStream, run_split
from kvserve._predict_convert import predict_model_from_pb
from kvserve._predict_inputs import FeatureRows, ModelOptions, PredictOptions, TextInputs
from kvserve._predict_requests import PredictCalls, StreamItem
from kvserve._predict_results import (
    EmbedResult,
    FeaturePrediction,
    Prediction,
    PredictModelInfo,
    PredictResult,
)
from kvserve._requests import CallFactory
from kvserve._results import (
    GenerateEvent,
    GenerateResult,
    ModelInfo,
    Tokens,
    generate_result_from_pb,
    model_info_from_pb,
    tokens_from_pb,
)
from kvserve._streams import StreamState
from kvserve._transport import AsyncResponses, AsyncTransport
from kvserve.v1 import generate_pb2

__all__ = ["AsyncClient", "AsyncGenerateStream"]


AnyPrediction = TypeVar("AnyPrediction", bound=Prediction)


class AsyncGenerateStream(StreamState):
    """The events of one call; made by ``AsyncClient.generate``. Use it as ``async with ... as stream``.

    Entering the block starts the call and its deadline. Leaving it, in whatever way, ends the call if it
    still runs, and so does breaking out of ``async for``; the server then frees what the call holds. Once
    the first event came, the call is never tried again: an error after it is for the caller to handle.
    """

    def __init__(
        self,
        call: Call[generate_pb2.GenerateRequest, generate_pb2.GenerateEvent],
        transport: AsyncTransport,
    ) -> None:
        super().__init__(call)
        self._transport = transport
        self._responses: AsyncResponses[generate_pb2.GenerateEvent] | None = None

    async def __aenter__(self) -> Self:
        if self._responses is not None:
            raise MisuseError("a stream can be entered only once; call generate() again")
        self._mark_opened()
        self._responses = self._transport.stream(self._call)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[GenerateEvent]:
        """Iterate over the events. Raises ``kvserve.Error``; ``Cancelled`` after ``cancel()``."""
        if self._responses is None:
            raise MisuseError("open the stream first: async with client.generate(...) as stream")
        return self._events(self._responses)

    async def _events(
        self, responses: AsyncResponses[generate_pb2.GenerateEvent]
    ) -> AsyncIterator[GenerateEvent]:
        try:
            while (message := await responses.read()) is not None:
                event = self._add(message)
                if event is not None:
                    yield event
            self._check_complete()
        finally:
            responses.cancel()

    async def collect(self) -> GenerateResult:
        """Read to the end and return the result."""
        async for _ in self:
            pass
        return self.result

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        if self._responses is not None:
            self._responses.cancel()


class AsyncClient:
    """Talks to a kvserve server from asyncio code. One client holds one connection for all of its calls.

    ``target`` is ``host:port`` (default: ``KVSERVE_TARGET``, then ``localhost:50051``); ``ClientOptions``
    describes the keyword arguments. It connects with the first call and belongs to the event loop of that
    call::

        async with kvserve.AsyncClient("localhost:50051") as client:
            async with client.generate("Once upon a time", max_new_tokens=32) as stream:
                async for event in stream:
                    print(event.text, end="", flush=True)

    All methods raise ``kvserve.Error``.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        transport: AsyncTransport | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        config = resolve_config(target, options)
        self._target = config.target
        self._calls = CallFactory(config)
        self._transport = transport or AsyncGrpcTransport(config)
        self._predict_calls = PredictCalls(self._calls)
        self._cache = AsyncCache(CacheCalls(self._calls), self._transport)
        self._models = AsyncModels(ModelCalls(self._calls), self._transport)

    @property
    def target(self) -> str:
        """Return where the server is."""
        return self._target

    @property
    def cache(self) -> AsyncCache:
        """Return what sees and steers the server's cache."""
        return self._cache

    @property
    def models(self) -> AsyncModels:
        """Return what lists, loads and names the server's models, and tells of their reuse."""
        return self._models

    def generate(self, text: str | None = None, /, **options: Unpack[GenerateOptions]) -> AsyncGenerateStream:
        """Prepare a stream of generated tokens; entering it starts the call. See ``GenerateOptions``.

        Takes one prompt: text, ``token_ids=`` or ``messages=``. Raises TypeError, or ``InvalidArgument``
        for a value that no request can hold, at once.
        """
        return AsyncGenerateStream(self._calls.stream_generate(text, options), self._transport)

    async def generate_once(
        self, text: str | None = None, /, **options: Unpack[GenerateOptions]
    ) -> GenerateResult:
        """Generate, and return the whole answer.

        Takes what ``generate`` takes. Cancelling the task ends the call.
        """
        return generate_result_from_pb(await self._transport.unary(self._calls.generate(text, options)))

    @overload
    async def predict(
        self, inputs: TextInputs, /, *, model: str | None = None, **options: Unpack[PredictOptions]
    ) -> PredictResult[Prediction]: ...
    @overload
    async def predict(
        self,
        inputs: TextInputs,
        /,
        *,
        model: str | None = None,
        output: type[AnyPrediction],
        **options: Unpack[PredictOptions],
    ) -> PredictResult[AnyPrediction]: ...
    async def predict(
        self,
        inputs: TextInputs,
        /,
        *,
        model: str | None = None,
        output: Any = Prediction,
        **options: Unpack[PredictOptions],
    ) -> PredictResult[Any]:
        """Ask a predict model about a text, or about several at once; each may be a pair of texts.

        Returns a sequence of predictions in the order of the inputs. Of which kind they are is the model's
        task; ``output=`` says which kind is expected, for type checkers too, and refuses any other::

            result = await client.predict(["good", "bad"], model="sentiment", output=kvserve.Classification)
            print(result[0].label, result[0].score, result.version)

        A list that is too long for one call (4,096 inputs, ``max_message_bytes``) takes several, up to four
        at a time, all answered by the same version; one that fails fails the whole. See ``PredictOptions``.
        """
        return await run_split(self._predict_calls.predict(inputs, model, output, options), self._transport)

    async def predict_features(
        self, rows: FeatureRows, /, *, model: str | None = None, **options: Unpack[PredictOptions]
    ) -> PredictResult[FeaturePrediction]:
        """Ask a predict model about rows of numbers: lists, tuples, a numpy array, anything with its buffer.

        ``((await client.predict_features([[0.1, 0.2, ...]], model="risk"))[0]).prediction``. Long lists are
        as in ``predict``. See ``PredictOptions``.
        """
        split = self._predict_calls.predict_features(rows, model, FeaturePrediction, options)
        return await run_split(split, self._transport)

    async def embed(
        self, inputs: TextInputs, /, *, model: str | None = None, **options: Unpack[PredictOptions]
    ) -> EmbedResult:
        """Return the vectors of texts, from a model with the task "embed".

        Each vector is an ``array('f')``; ``numpy.asarray(result.vectors)`` is their matrix. Long lists are
        as in ``predict``. Of ``PredictOptions``, ``top_k`` and ``reuse`` have no meaning here.
        """
        return await run_split(self._predict_calls.embed(inputs, model, options), self._transport)

    def stream_predict(
        self,
        requests: AsyncIterable[StreamItem] | Iterable[StreamItem] | None = None,
        /,
        *,
        model: str | None = None,
        **options: Unpack[PredictOptions],
    ) -> AsyncPredictStream:
        """Prepare a stream of requests, each answered as soon as it is ready; entering it starts the call.

        Takes an iterable, asynchronous or not, of what ``predict`` takes, or of ``PredictRequest`` for
        more; without one, ``send`` them. The arguments here are the defaults of requests that don't say
        otherwise::

            async with client.stream_predict(lines, model="sentiment") as outcomes:
                async for outcome in outcomes:
                    print(outcome.request_id, outcome.error or outcome.result[0])

        Requests without an id of their own are numbered from "1". Has no deadline unless given here.
        """
        call = self._predict_calls.stream_predict(model, options)
        return AsyncPredictStream(call, self._predict_calls, requests, self._transport)

    async def predict_model(self, name: str, /, **options: Unpack[ModelOptions]) -> PredictModelInfo:
        """Describe a predict model: its task, labels, limits. Loads nothing."""
        call = self._predict_calls.predict_model(name, options)
        return predict_model_from_pb(await self._transport.unary(call))

    async def tokenize(self, text: str | None = None, /, **options: Unpack[TokenizeOptions]) -> Tokens:
        """Turn text, or a conversation (``messages=``), into the token ids that ``generate`` would use."""
        return tokens_from_pb(await self._transport.unary(self._calls.tokenize(text, options)))

    async def detokenize(self, token_ids: Sequence[int], /, **options: Unpack[DetokenizeOptions]) -> str:
        """Turn token ids into text."""
        return (await self._transport.unary(self._calls.detokenize(token_ids, options))).text

    async def model_info(self, **options: Unpack[CallOptions]) -> ModelInfo:
        """Describe a served model."""
        return model_info_from_pb(await self._transport.unary(self._calls.model_info(options)))

    async def check_health(self) -> HealthStatus:
        """Return what the server says of itself. Raises ``Unavailable`` if it can't be reached."""
        return health_status(await self._transport.unary(self._calls.health_check()))

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the server can be reached and serves.

        Raises ``DeadlineExceeded`` if it doesn't in time.
        """
        wait = ReadyWait(timeout_s, clock=time.monotonic)
        while True:
            lost = None
            watch = self._transport.stream(self._calls.health_watch(timeout_s=wait.remaining_s))
            try:
                while (answer := await watch.read()) is not None:
                    if wait.is_ready(answer):
                        return
            except Unavailable as error:
                lost = error
            except DeadlineExceeded as error:
                raise wait.timed_out() from error
            finally:
                watch.cancel()
            await asyncio.sleep(wait.pause_s(lost))

    async def aclose(self) -> None:
        """End what runs and disconnect. Idempotent."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncClient({self._target!r})"
