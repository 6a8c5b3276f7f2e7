"""What a generate stream knows, whichever client reads it: the events folded so far, and its result.

Life of a stream::

    generate() --> [new] --enter block--> [open] --last event--> [finished]       result
                                            |
                                            `--error, cancel(), break, leaving early    no result; text so far
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvserve._calls import Call
from kvserve._errors import Internal, MisuseError
from kvserve._results import (
    FinishReason,
    GenerateEvent,
    GenerateResult,
    GenerateStart,
    Sample,
    TokenLogprobs,
    generate_event_from_pb,
    generate_start_from_pb,
    timings_from_pb,
    usage_from_pb,
)
from kvserve.v1 import generate_pb2

__all__ = ["StreamState"]


@dataclass(slots=True)
class _SampleSoFar:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None

    def add(self, event: GenerateEvent) -> None:
        self.texts.append(event.text)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason
        self.stop_reason = event.stop_reason


class StreamState:
    """The part of a stream that does no input or output.

    Base of ``GenerateStream`` and ``AsyncGenerateStream``.
    """

    def __init__(
        self,
        call: Call[generate_pb2.GenerateRequest, generate_pb2.GenerateEvent],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._call = call
        self._clock = clock
        self._opened_at_s = 0.0
        self._samples: dict[int, _SampleSoFar] = {}
        self._start: GenerateStart | None = None
        self._first_token_s: float | None = None
        self._result: GenerateResult | None = None

    @property
    def start(self) -> GenerateStart | None:
        """Return what the server said at admission; None before the first event."""
        return self._start

    @property
    def first_token_s(self) -> float | None:
        """Return how long the first token took from opening the call, seen from here; None before it."""
        return self._first_token_s

    @property
    def text(self) -> str:
        """Return the first sample's text so far, also of a stream that was cut short."""
        sample = self._samples.get(0)
        return "" if sample is None else "".join(sample.texts)

    @property
    def result(self) -> GenerateResult:
        """Return the whole answer. Raises ``MisuseError`` before the stream was read to its end."""
        if self._result is None:
            raise MisuseError("no result: the stream was not read to its end; .text holds what came so far")
        return self._result

    @property
    def is_finished(self) -> bool:
        """Return whether the stream was read to its end."""
        return self._result is not None

    def __repr__(self) -> str:
        num_tokens = sum(len(sample.token_ids) for sample in self._samples.values())
        request_id = "" if self._start is None else f" {self._start.request_id}"
        return f"<{type(self).__name__}{request_id}: {num_tokens} tokens, finished: {self.is_finished}>"

    def _mark_opened(self) -> None:
        self._opened_at_s = self._clock()

    def _add(self, message: generate_pb2.GenerateEvent) -> GenerateEvent | None:
        """Fold a message in. Return the event for the caller, or None if it has no news of a sample."""
        if message.HasField("start"):
            self._start = generate_start_from_pb(message.start)
        event = None
        if message.token_ids or message.text or message.finish_reason:
            if self._first_token_s is None:
                self._first_token_s = self._clock() - self._opened_at_s
            event = generate_event_from_pb(message)
            self._samples.setdefault(event.index, _SampleSoFar()).add(event)
        if message.HasField("summary"):
            self._result = self._finish(message.summary)
        return event

    def _finish(self, summary: generate_pb2.GenerateSummary) -> GenerateResult:
        if self._start is None or not self._samples:
            raise Internal("the stream ended without a start or without a sample")
        return GenerateResult(
            request_id=self._start.request_id,
            model=self._start.model,
            seed=self._start.seed,
            samples=tuple(
                Sample(
                    index=index,
                    text="".join(sample.texts),
                    token_ids=tuple(sample.token_ids),
                    logprobs=tuple(sample.logprobs),
                    finish_reason=sample.finish_reason or FinishReason.OTHER,
                    stop_reason=sample.stop_reason,
                )
                for index, sample in sorted(self._samples.items())
            ),
            usage=usage_from_pb(summary.usage),
            timings=timings_from_pb(summary.timings),
        )

    def _check_complete(self) -> None:
        """Raise ``Internal`` if the server ended the stream without its last event."""
        if self._result is None:
            raise Internal("the stream ended without its summary")
