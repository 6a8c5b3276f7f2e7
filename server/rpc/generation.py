"""One running generation: the engine's events in, deltas of its samples out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from server.engine.interface import RequestStream
from server.engine.messages import (
    Admitted,
    Failed,
    Finish,
    Finished,
    GenerateSpec,
    Refused,
    RequestTimings,
    RequestUsage,
    Tokens,
)
from server.rpc.detokenizer import DetokenizerFactory
from server.rpc.errors import error_from_engine
from server.rpc.samples import Sample, SampleDelta
from server.rpc.stop_strings import StopMatcher, StopStrings

__all__ = ["Generation"]

MAX_DELTA_TOKENS = 4096
"""So that a message stays far below the size limit, even with 20 log-probabilities for each token."""


class Generation:
    """The front end's half of a request that was handed to an engine. For one reader; ``close`` it always."""

    def __init__(
        self,
        stream: RequestStream,
        spec: GenerateSpec,
        *,
        stop_strings: tuple[str, ...],
        detokenizers: DetokenizerFactory,
        text_of: Callable[[int], str],
    ) -> None:
        self._stream = stream
        strings = StopStrings(stop_strings) if stop_strings else None
        self._samples = [
            Sample(
                index,
                detokenizers.begin(spec.token_ids),
                matcher=None if strings is None else StopMatcher(strings),
                min_new_tokens=spec.min_new_tokens,
                text_of=text_of,
            )
            for index in range(spec.num_samples)
        ]
        self.num_cached_tokens = 0
        self.usage: RequestUsage | None = None
        """Set, like ``timings``, when the last deltas are returned."""
        self.timings: RequestTimings | None = None

    @property
    def num_generated_tokens(self) -> int:
        """Return how many tokens the deltas have held so far."""
        return sum(sample.num_tokens for sample in self._samples)

    async def deltas(self) -> AsyncIterator[list[SampleDelta]]:
        """Yield what is ready, one delta for each sample that has news; lists may be empty.

        Raises the :class:`CallError` of a refusal or failure.
        """
        async for events in self._stream:
            news: dict[int, SampleDelta] = {}
            for event in events:
                if type(event) is Tokens:
                    self._apply(event, news)
                elif type(event) is Admitted:
                    self.num_cached_tokens = event.num_cached_tokens
                elif type(event) is Finished:
                    self.usage, self.timings = event.usage, event.timings
                elif type(event) is Refused:
                    raise error_from_engine(event.kind, retry_after_s=event.retry_after_s)
                elif type(event) is Failed:
                    raise error_from_engine(event.kind)
            yield [part for delta in news.values() for part in split_delta(delta)]

    def close(self) -> None:
        """Give up what is not finished. Idempotent."""
        if self.usage is None:
            self._stream.cancel()

    def _apply(self, tokens: Tokens, news: dict[int, SampleDelta]) -> None:
        sample = self._samples[tokens.sample_index]
        delta = sample.push(tokens)
        if delta is None:
            return
        if sample.ended and tokens.finish is None:  # by a stop string, which the engine knows nothing of
            self._stream.cancel(sample.index)
        if delta.finish is Finish.CANCELLED:
            delta.finish = None
        earlier = news.setdefault(delta.index, delta)
        if earlier is not delta:
            earlier.merge(delta)


def split_delta(delta: SampleDelta) -> list[SampleDelta]:
    """Cut a delta of very many tokens; text and finish go with the last part."""
    total = len(delta.token_ids)
    if total <= MAX_DELTA_TOKENS:
        return [delta]
    parts: list[SampleDelta] = []
    for start in range(0, total, MAX_DELTA_TOKENS):
        end = start + MAX_DELTA_TOKENS
        part = SampleDelta(
            delta.index,
            token_ids=delta.token_ids[start:end],
            logprobs=None if delta.logprobs is None else delta.logprobs[start:end],
            top_logprobs=None if delta.top_logprobs is None else delta.top_logprobs[start:end],
        )
        parts.append(part)
    parts[-1].text, parts[-1].finish, parts[-1].stop_reason = delta.text, delta.finish, delta.stop_reason
    return parts
