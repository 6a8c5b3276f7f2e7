"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

from kvserve._cache_requests import CacheCalls
from kvserve._cache_sync import Cache
from kvserve._calls import Call
from kvserve._config import ClientOptions, resolve_config
from kvserve._errors import DeadlineExceeded, MisuseError, Unavailable
from kvserve._grpc_sync import GrpcTransport
from kvserve._health import HealthStatus, ReadyWait, health_status
from kvserve._models_requests import ModelCalls
from kvserve._models_sync import Models
from kvserve._options import CallOptions, DetokenizeOptions, GenerateOptions, TokenizeOptions
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
from kvserve._predict_sync import PredictStream, run_split
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
from kvserve._transport import Responses, Transport
from kvserve.v1 import generate_pb2

__all__ = ["Client", "GenerateStream"]


AnyPrediction = TypeVar("AnyPrediction", bound=Prediction)


class GenerateStream(StreamState):
    """The events of one call; made by ``Client.generate``. Use it as ``with ... as stream``.

    Entering the block starts the call and its deadline. Leaving it, in whatever way, ends the call if it
    still runs, and so does breaking out of ``for``; the server then frees what the call holds. Once the
    first event came, the call is never tried again: an error after it is for the caller to handle.
    """

    def __init__(
        self,
        call: Call[generate_pb2.GenerateRequest, generate_pb2.GenerateEvent],
        transport: Transport,
    ) -> None:
        super().__init__(call)
        self._transport = transport
        self._responses: Responses[generate_pb2.GenerateEvent] | None = None

    def __enter__(self) -> Self:
        if self._responses is not None:
            raise MisuseError("a stream can be entered only once; call generate() again")
        self._mark_opened()
        self._responses = self._transport.stream(self._call)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[GenerateEvent]:
        """Iterate over the events. Raises ``kvserve.Error``; ``Cancelled`` after ``cancel()``."""
        if self._responses is None:
            raise MisuseError("open the stream first: with client.generate(...) as stream")
        return self._events(self._responses)

    def _events(self, responses: Responses[generate_pb2.GenerateEvent]) -> Iterator[GenerateEvent]:
        try:
            while (message := responses.read()) is not None:
                event = self._add(message)
                if event is not None:
                    yield event
            self._check_complete()
        finally:
            responses.cancel()

    def collect(self) -> GenerateResult:
        """Read to the end and return the result."""
        for _ in self:
            pass
        return self.result

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        if self._responses is not None:
            self._responses.cancel()


class Client:
    """Talks to a kvserve server, blocking. One client holds one connection, shared by all of its calls.

    ``target`` is ``host:port`` (default: ``KVSERVE_TARGET``, then ``localhost:50051``); ``ClientOptions``
    describes the keyword arguments. It connects with the first call; any thread may use it::

        with kvserve.Client("localhost:50051") as client:
            with client.generate("Once upon a time", max_new_tokens=32) as stream:
                for event in stream:
                    print(event.text, end="", flush=True)

    All methods raise ``kvserve.Error``.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        transport: Transport | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        config = resolve_config(target, options)
        self._target = config.target
        self._calls = CallFactory(config)
        self._transport = transport or GrpcTransport(config)
        self._predict_calls = PredictCalls(self._calls)
        self._cache = Cache(CacheCalls(self._calls), self._transport)
        self._models = Models(ModelCalls(self._calls), self._transport)

    @property
    def target(self) -> str:
        """Return where the server is."""
        return self._target

    @property
    def cache(self) -> Cache:
        """Return what sees and steers the server's cache."""
        return self._cache

    @property
    def models(self) -> Models:
        """Return what lists, loads and names the server's models, and tells of their reuse."""
        return self._models

    def generate(self, text: str | None = None, /, **options: Unpack[GenerateOptions]) -> GenerateStream:
        """Prepare a stream of generated tokens; entering it starts the call. See ``GenerateOptions``.

        Takes one prompt: text, ``token_ids=`` or ``messages=``. Raises TypeError, or ``InvalidArgument``
        for a value that no request can hold, at once.
        """
        return GenerateStream(self._calls.stream_generate(text, options), self._transport)

    def generate_once(self, text: str | None = None, /, **options: Unpack[GenerateOptions]) -> GenerateResult:
        """Generate, and return the whole answer. Takes what ``generate`` takes."""
        return generate_result_from_pb(self._transport.unary(self._calls.generate(text, options)))

    @overload
    def predict(
        self, inputs: TextInputs, /, *, model: str | None = None, **options: Unpack[PredictOptions]
    ) -> PredictResult[Prediction]: ...
    @overload
    def predict(
        self,
        inputs: TextInputs,
        /,
        *,
        model: str | None = None,
        output: type[AnyPrediction],
        **options: Unpack[PredictOptions],
    ) -> PredictResult[AnyPrediction]: ...
    def predict(
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

            result = client.predict(["good", "bad"], model="sentiment", output=kvserve.Classification)
            print(result[0].label, result[0].score, result.version)

        A list that is too long for one call (4,096 inputs, ``max_message_bytes``) takes several, up to four
        at a time, all answered by the same version; one that fails fails the whole. See ``PredictOptions``.
        """
        return run_split(self._predict_calls.predict(inputs, model, output, options), self._transport)

    def predict_features(
        self, rows: FeatureRows, /, *, model: str | None = None, **options: Unpack[PredictOptions]
    ) -> PredictResult[FeaturePrediction]:
        """Ask a predict model about rows of numbers: lists, tuples, a numpy array, anything with its buffer.

        ``((client.predict_features([[0.1, 0.2, ...]], model="risk"))[0]).prediction``. Long lists are as in
        ``predict``. See ``PredictOptions``.
        """
        split = self._predict_calls.predict_features(rows, model, FeaturePrediction, options)
        return run_split(split, self._transport)

    def embed(
        self, inputs: TextInputs, /, *, model: str | None = None, **options: Unpack[PredictOptions]
    ) -> EmbedResult:
        """Return the vectors of texts, from a model with the task "embed".

        Each vector is an ``array('f')``; ``numpy.asarray(result.vectors)`` is their matrix. Long lists are
        as in ``predict``. Of ``PredictOptions``, ``top_k`` and ``reuse`` have no meaning here.
        """
        return run_split(self._predict_calls.embed(inputs, model, options), self._transport)

    def stream_predict(
        self,
        requests: Iterable[StreamItem] | None = None,
        /,
        *,
        model: str | None = None,
        **options: Unpack[PredictOptions],
    ) -> PredictStream:
        """Prepare a stream of requests, each answered as soon as it is ready; entering it starts the call.

        Takes an iterable of what ``predict`` takes, or of ``PredictRequest`` for more; without
        one, ``send`` them. The arguments here are the defaults of requests that don't say otherwise::

            with client.stream_predict(lines, model="sentiment") as outcomes:
                for outcome in outcomes:
                    print(outcome.request_id, outcome.error or outcome.result[0])

        Requests without an id of their own are numbered from "1". Has no deadline unless given here.
        """
        call = self._predict_calls.stream_predict(model, options)
        return PredictStream(call, self._predict_calls, requests, self._transport)

    def predict_model(self, name: str, /, **options: Unpack[ModelOptions]) -> PredictModelInfo:
        """Describe a predict model: its task, labels, limits. Loads nothing."""
        call = self._predict_calls.predict_model(name, options)
        return predict_model_from_pb(self._transport.unary(call))

    def tokenize(self, text: str | None = None, /, **options: Unpack[TokenizeOptions]) -> Tokens:
        """Turn text, or a conversation (``messages=``), into the token ids that ``generate`` would use."""
        return tokens_from_pb(self._transport.unary(self._calls.tokenize(text, options)))

    def detokenize(self, token_ids: Sequence[int], /, **options: Unpack[DetokenizeOptions]) -> str:
        """Turn token ids into text."""
        return (self._transport.unary(self._calls.detokenize(token_ids, options))).text

    def model_info(self, **options: Unpack[CallOptions]) -> ModelInfo:
        """Describe a served model."""
        return model_info_from_pb(self._transport.unary(self._calls.model_info(options)))

    def check_health(self) -> HealthStatus:
        """Return what the server says of itself. Raises ``Unavailable`` if it can't be reached."""
        return health_status(self._transport.unary(self._calls.health_check()))

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the server can be reached and serves.

        Raises ``DeadlineExceeded`` if it doesn't in time.
        """
        wait = ReadyWait(timeout_s, clock=time.monotonic)
        while True:
            lost = None
            watch = self._transport.stream(self._calls.health_watch(timeout_s=wait.remaining_s))
            try:
                while (answer := watch.read()) is not None:
                    if wait.is_ready(answer):
                        return
            except Unavailable as error:
                lost = error
            except DeadlineExceeded as error:
                raise wait.timed_out() from error
            finally:
                watch.cancel()
            time.sleep(wait.pause_s(lost))

    def close(self) -> None:
        """End what runs and disconnect. Idempotent."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._target!r})"
