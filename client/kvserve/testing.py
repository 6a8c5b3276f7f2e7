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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from google.protobuf.message import Message

from kvserve._calls import Call
from kvserve._errors import Cancelled
from kvserve.v1 import common_pb2, generate_pb2

__all__ = ["AsyncMockTransport", "Handler", "MockTransport", "events"]

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


class _Handled:
    """What both mock transports do and remember."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.requests: list[Any] = []
        """All requests so far, protobuf messages."""
        self.metadata: list[dict[str, str]] = []
        """Their headers."""
        self.streams: list[_Script] = []
        """All streams so far; each has ``is_cancelled``."""

    def _answer(self, call: Call[Any, Any]) -> Any:
        return self._handler(call.method.name, call.request)

    def _record(self, call: Call[Any, Any]) -> None:
        self.requests.append(call.request)
        self.metadata.append(dict(call.metadata))


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
