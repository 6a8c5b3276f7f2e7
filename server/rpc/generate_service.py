"""``kvserve.v1.GenerateService``: text generation over any engine.

::

    validate -> claim the request id -> tokenize (thread pool) -> submit -> events as they become ready

Until the engine admits a request nothing is sent, not even headers, so that a refusal can be retried.
The first token goes out at once; afterwards whatever became ready while a message was being written goes
out together.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from grpc import aio

from kvserve.v1 import generate_pb2 as pb
from kvserve.v1 import generate_pb2_grpc
from server.engine.messages import GenerateSpec
from server.rpc import convert
from server.rpc.call import Call, current_call
from server.rpc.errors import (
    DeadlinePassed,
    InternalError,
    RequestIdInUse,
    ResponseTooLarge,
)
from server.rpc.generation import Generation
from server.rpc.samples import SampleDelta
from server.rpc.served_model import ServedModel
from server.rpc.stream_writer import StreamWriter

__all__ = ["GenerateService", "GenerationObserver", "ServiceLimits"]


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What the service holds its clients to."""

    write_timeout_s: float = 10.0
    max_message_bytes: int = 4 << 20


class GenerationObserver(Protocol):
    """Sees what generations do: metrics."""

    def message(self, num_tokens: int, interval_s: float | None) -> None:
        """Note a message with tokens, and the time since the one before it (None: it is the first)."""
        ...

    def finished(self, summary: pb.GenerateSummary, num_samples: int) -> None:
        """Note a generation that ended well."""
        ...


@dataclass(slots=True)
class _Running:
    """A generation between submission and its end."""

    call: Call
    spec: GenerateSpec
    generation: Generation
    tokenize_s: float
    first_token_s: float = 0.0

    def start(self, model_name: str) -> pb.GenerateStart:
        return convert.start_of(
            request_id=self.call.request_id,
            model=model_name,
            spec=self.spec,
            num_cached_tokens=self.generation.num_cached_tokens,
        )

    def since_received_s(self) -> float:
        return time.perf_counter() - self.call.received_s

    def summary(self) -> pb.GenerateSummary | None:
        """Return the summary once all samples have ended."""
        generation = self.generation
        if generation.usage is None or generation.timings is None:
            return None
        total_s = self.since_received_s()
        return convert.summary_of(
            generation.usage,
            generation.timings,
            num_generated_tokens=generation.num_generated_tokens,
            tokenize_s=self.tokenize_s,
            first_token_s=self.first_token_s or total_s,
            total_s=total_s,
        )


class GenerateService(generate_pb2_grpc.GenerateServiceServicer):
    """Serves one model. All methods run on the event loop."""

    def __init__(self, model: ServedModel, *, limits: ServiceLimits, observer: GenerationObserver) -> None:
        self._model = model
        self._limits = limits
        self._observer = observer
        self._request_ids: set[tuple[str, str]] = set()

    async def StreamGenerate(  # noqa: N802 - named by the service definition
        self, request: pb.GenerateRequest, context: aio.ServicerContext[Any, Any]
    ) -> None:
        """Stream tokens as they are drawn."""
        async with self._begin(request) as running:
            writer = StreamWriter(context, timeout_s=self._limits.write_timeout_s)
            try:
                await self._stream(running, writer)
            finally:
                writer.close()

    async def _stream(self, running: _Running, writer: StreamWriter) -> None:
        write, observer = writer.write, self._observer
        started = False
        written_s = 0.0
        async for deltas in running.generation.deltas():
            summary = running.summary()
            if summary is None and not deltas:
                continue
            events = [convert.event_of(delta) for delta in deltas] or [pb.GenerateEvent()]
            if summary is not None:
                events[-1].summary.CopyFrom(summary)
            if not started:
                events[0].start.CopyFrom(running.start(self._model.name))
            for event in events:
                await write(event)
                now_s = time.perf_counter()
                observer.message(len(event.token_ids), now_s - written_s if started else None)
                if not started:
                    started = True
                    running.first_token_s = running.since_received_s()
                written_s = now_s
            if summary is not None:
                self._finished(running, summary)
                return
        raise InternalError("the generation ended without a result")

    async def Generate(  # noqa: N802 - named by the service definition
        self, request: pb.GenerateRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.GenerateResponse:
        """Generate, collected into one answer."""
        async with self._begin(request) as running:
            samples = [SampleDelta(index) for index in range(running.spec.num_samples)]
            async for deltas in running.generation.deltas():
                if deltas and not running.first_token_s:
                    running.first_token_s = running.since_received_s()
                for delta in deltas:
                    samples[delta.index].merge(delta)
            summary = running.summary()
            if summary is None:
                raise InternalError("the generation ended without a result")
            response = convert.response_of(running.start(self._model.name), samples, summary)
            if response.ByteSize() > self._limits.max_message_bytes:
                raise ResponseTooLarge("the answer exceeds the server's message limit; use StreamGenerate")
            self._finished(running, summary)
            return response

    async def Tokenize(  # noqa: N802 - named by the service definition
        self, request: pb.TokenizeRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        """Return a prompt's token ids."""
        limits = self._model.loaded(request.model).limits
        prompt, add_special_tokens = convert.read_tokenize(request)
        token_ids = await self._model.tokenize(prompt, limits, add_special_tokens=add_special_tokens)
        return pb.TokenizeResponse(token_ids=token_ids, max_model_length=limits.max_model_length)

    async def Detokenize(  # noqa: N802 - named by the service definition
        self, request: pb.DetokenizeRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.DetokenizeResponse:
        """Return the text of tokens."""
        limits = self._model.loaded(request.model).limits
        token_ids, skip = convert.read_detokenize(request, limits)
        text = await self._model.in_pool(
            partial(self._model.tokenizer.decode, token_ids, skip_special_tokens=skip)
        )
        return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(  # noqa: N802 - named by the service definition
        self, request: pb.GetModelInfoRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.ModelInfo:
        """Describe the model."""
        ready = self._model.loaded(request.model).ready
        convert.read_model_info(request)
        return convert.model_info(
            ready,
            name=self._model.name,
            eos_token_ids=self._model.tokenizer.eos_token_ids,
            has_chat_template=self._model.tokenizer.has_chat_template,
        )

    @asynccontextmanager
    async def _begin(self, request: pb.GenerateRequest) -> AsyncIterator[_Running]:
        """Do all that comes before the first token; free all that the call holds in the end."""
        call = current_call.get()
        model = self._model
        model.check_taking_requests()
        limits = model.loaded(request.model).limits
        wanted = convert.read_generate(
            request, limits, eos_token_ids=model.tokenizer.eos_token_ids, salt=call.caller.salt
        )
        call.request_id = wanted.request_id
        call.attributes["gen_ai.request.model"] = model.name
        claim = (call.caller.tenant, wanted.request_id)
        if claim in self._request_ids:
            raise RequestIdInUse("a running call of yours has this request_id")
        self._request_ids.add(claim)
        try:
            tokenize_started_s = time.perf_counter()
            token_ids = await model.tokenize(wanted.prompt, limits)
            tokenize_s = time.perf_counter() - tokenize_started_s
            spec = wanted.complete(token_ids, limits)
            remaining_s = call.remaining_s()
            if remaining_s == 0:
                raise DeadlinePassed("the deadline passed before the request was queued")
            model.check_taking_requests()
            generation = Generation(
                model.engine.submit(spec, deadline_s=remaining_s),
                spec,
                stop_strings=wanted.stop_strings,
                detokenizers=model.tokenizer.detokenizers,
                text_of=model.tokenizer.text_of,
            )
            try:
                yield _Running(call, spec, generation, tokenize_s)
            finally:
                generation.close()
        finally:
            self._request_ids.discard(claim)

    def _finished(self, running: _Running, summary: pb.GenerateSummary) -> None:
        usage = summary.usage
        running.call.attributes.update(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.generated_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.prompt_tokens - usage.computed_prompt_tokens,
            }
        )
        self._observer.finished(summary, running.spec.num_samples)
