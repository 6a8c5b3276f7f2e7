"""A stand-in for the server in tests of code that uses the client: no network, no model.

Give ``MockTransport`` a function from method name and protobuf request to what the server would answer::

    def handler(method, request):
        return events("Once", " upon")

    async with kvserve.AsyncClient(transport=AsyncMockTransport(handler)) as client: ...
    with kvserve.Client(transport=MockTransport(handler)) as client: ...

The function returns one message, or for a stream an iterable of messages; it raises ``kvserve.Error`` to
refuse. An iterable may raise halfway. Calls about the cache are answered in the same way::

    def handler(method, request):
        match method:
            case "GetStats":
                return cache_admin_pb2.GetStatsResponse(model="m")
            case "WarmPrefix":
                return [cache_admin_pb2.WarmPrefixProgress(num_tokens=8, done=True)]

So are predict calls, for which ``classified`` and ``embedded`` make answers. A list that takes several calls
is asked for in several; of ``stream_predict`` the function is called for each request::

    def handler(method, request):
        match method:
            case "Predict":
                return classified(*("POSITIVE" for _ in request.texts.items))
            case "StreamPredict":
                answer = classified("POSITIVE", request_id=request.request_id)
                return predict_pb2.StreamPredictResponse(request_id=request.request_id, response=answer)
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from google.protobuf.message import Message

from kvserve._calls import Call
from kvserve._errors import Cancelled, Error
from kvserve.v1 import common_pb2, generate_pb2, predict_pb2

__all__ = ["AsyncMockTransport", "Handler", "MockTransport", "classified", "embedded", "events"]

Handler = Callable[[str, Any], Message | Iterable[Message]]
"""From the method's name (``"StreamGenerate"``) and its request to the answer."""


class _Script:
    """The answers of one scripted call."""

    def __init__(self, answer: Callable[[], Iterable[Message]]) -> None:
        self._answer = answer
        self._messages: Iterator[Message] | None = None
        self._is_over = False
        self.is_cancelled = False

    def next_message(self) -> Any:
        if self.is_cancelled:
            raise Cancelled("the call was cancelled")
        if self._messages is None:
            self._messages = iter(self._answer())
        message = next(self._messages, None)
        self._is_over = message is None
        return message

    def cancel(self) -> None:
        self.is_cancelled = not self._is_over


class _Responses(_Script):
    def read(self) -> Any:
        return self.next_message()


class _AsyncResponses(_Script):
    async def read(self) -> Any:
        return self.next_message()


class _Pending:
    """A call that is answered when somebody waits for it."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    def result(self) -> Any:
        return self._answer()

    def cancel(self) -> None:
        pass


class _DuplexScript:
    """A scripted call with many requests: the handler answers each as it is written."""

    def __init__(
        self, answer: Callable[[Any], Iterable[Message]], put: Callable[[Message | Error | None], None]
    ) -> None:
        """``put`` hands the reader a message, an error to end with, or None for a good end."""
        self._answer = answer
        self._put = put
        self._is_over = False
        self.is_cancelled = False

    def take_request(self, request: Any) -> bool:
        if self._is_over or self.is_cancelled:
            return False
        try:
            for message in self._answer(request):
                self._put(message)
        except Error as error:
            self._is_over = True
            self._put(error)
        return not self._is_over

    def end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._put(None)

    def cancel(self) -> None:
        if not self._is_over:
            self.is_cancelled = self._is_over = True
            self._put(Cancelled("the call was cancelled"))

    def opened(self, item: Any) -> Any:
        if isinstance(item, Error):
            raise item
        return item


class _Duplex(_DuplexScript):
    def __init__(self, answer: Callable[[Any], Iterable[Message]]) -> None:
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        super().__init__(answer, self._items.put)

    def write(self, request: Any, /) -> bool:
        return self.take_request(request)

    def end_writes(self) -> None:
        self.end()

    def read(self) -> Any:
        return self.opened(self._items.get())


class _AsyncDuplex(_DuplexScript):
    def __init__(self, answer: Callable[[Any], Iterable[Message]]) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        super().__init__(answer, self._items.put_nowait)

    async def write(self, request: Any, /) -> bool:
        return self.take_request(request)

    async def end_writes(self) -> None:
        self.end()

    async def read(self) -> Any:
        return self.opened(await self._items.get())


class _Handled:
    """What both mock transports do and remember."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.requests: list[Any] = []
        """All requests so far, protobuf messages."""
        self.metadata: list[dict[str, str]] = []
        """Their headers."""
        self.streams: list[_Script | _DuplexScript] = []
        """All streams so far; each has ``is_cancelled``."""

    def _answer(self, call: Call[Any, Any]) -> Any:
        return self._handler(call.method.name, call.request)

    def _record(self, call: Call[Any, Any]) -> None:
        self.requests.append(call.request)
        self.metadata.append(dict(call.metadata))

    def _answer_each(self, call: Call[Any, Any]) -> Callable[[Any], Iterable[Message]]:
        """Return what answers each request of a call with many."""
        self.metadata.append(dict(call.metadata))

        def answer(request: Any) -> Iterable[Message]:
            self.requests.append(request)
            answered = self._handler(call.method.name, request)
            return [answered] if isinstance(answered, Message) else answered

        return answer


class MockTransport(_Handled):
    """Answers a ``Client`` from a function."""

    def unary(self, call: Call[Any, Any], /) -> Any:
        self._record(call)
        return self._answer(call)

    def stream(self, call: Call[Any, Any], /) -> _Responses:
        self._record(call)
        responses = _Responses(lambda: self._answer(call))
        self.streams.append(responses)
        return responses

    def start(self, call: Call[Any, Any], /) -> _Pending:
        self._record(call)
        return _Pending(lambda: self._answer(call))

    def duplex(self, call: Call[Any, Any], /) -> _Duplex:
        duplex = _Duplex(self._answer_each(call))
        self.streams.append(duplex)
        return duplex

    def close(self) -> None:
        pass


class AsyncMockTransport(_Handled):
    """Answers an ``AsyncClient`` from a function."""

    async def unary(self, call: Call[Any, Any], /) -> Any:
        self._record(call)
        return self._answer(call)

    def stream(self, call: Call[Any, Any], /) -> _AsyncResponses:
        self._record(call)
        responses = _AsyncResponses(lambda: self._answer(call))
        self.streams.append(responses)
        return responses

    def duplex(self, call: Call[Any, Any], /) -> _AsyncDuplex:
        duplex = _AsyncDuplex(self._answer_each(call))
        self.streams.append(duplex)
        return duplex

    async def aclose(self) -> None:
        pass


def events(
    *texts: str,
    model: str = "mock",
    request_id: str = "mock-1",
    prompt_tokens: int = 8,
    cached_tokens: int = 0,
    finish_reason: generate_pb2.FinishReason = generate_pb2.FINISH_REASON_EOS,
) -> list[generate_pb2.GenerateEvent]:
    """Return the messages of a stream that writes ``texts``, one token each, as a server would send them."""
    if not texts:
        raise ValueError("at least one text")
    messages = [generate_pb2.GenerateEvent(text=text, token_ids=[i]) for i, text in enumerate(texts)]
    messages[0].start.CopyFrom(
        generate_pb2.GenerateStart(
            request_id=request_id, model=model, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens
        )
    )
    messages[-1].finish_reason = finish_reason
    usage = common_pb2.Usage(
        prompt_tokens=prompt_tokens,
        cached_block_tokens=cached_tokens,
        computed_prompt_tokens=prompt_tokens - cached_tokens,
        generated_tokens=len(texts),
    )
    messages[-1].summary.CopyFrom(generate_pb2.GenerateSummary(usage=usage, timings=common_pb2.Timings()))
    return messages


def classified(
    *labels: str, score: float = 1.0, model: str = "mock", version: str = "1", request_id: str = "mock-1"
) -> predict_pb2.PredictResponse:
    """Return the answer of a classifier, one label for each input, as a server would send it."""
    answers = [
        predict_pb2.Classification(
            label=label, score=score, scores=[predict_pb2.LabelScore(label=label, score=score)]
        )
        for label in labels
    ]
    return predict_pb2.PredictResponse(
        request_id=request_id,
        model=model,
        version=version,
        predictions=[predict_pb2.Prediction(classification=answer, num_tokens=8) for answer in answers],
        timings=predict_pb2.PredictTimings(batch_size=len(labels)),
    )


def embedded(
    *vectors: Sequence[float], model: str = "mock", version: str = "1", request_id: str = "mock-1"
) -> predict_pb2.EmbedResponse:
    """Return the answer to ``embed``, one vector for each input, as a server would send it."""
    return predict_pb2.EmbedResponse(
        request_id=request_id,
        model=model,
        version=version,
        vectors=[predict_pb2.Vector(values=vector) for vector in vectors],
        num_tokens=8 * len(vectors),
        timings=predict_pb2.PredictTimings(batch_size=len(vectors)),
    )
