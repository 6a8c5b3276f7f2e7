"""The book of requests: which are open, until when, and what is said about them.

Every request that enters leaves by exactly one terminal event: ``finish``, ``fail`` or (never entered)
``refuse``.
"""

from __future__ import annotations

from kvcore.lease import PrefixMatch
from server.engine.counters import EngineCounters
from server.engine.deadlines import Deadlines
from server.engine.messages import Admitted, Failed, FailureKind, Finish, Finished, Progress, Refused, Tokens
from server.engine.plan import SampledToken
from server.engine.request import Request, Sequence

__all__ = ["Event", "RequestBook"]

Event = Admitted | Progress | Tokens | Finished | Refused | Failed


class RequestBook:
    """Requests by key, their deadlines, and the events since the last ``drain``."""

    def __init__(self, counters: EngineCounters) -> None:
        self.requests: dict[int, Request] = {}
        self._counters = counters
        self._deadlines = Deadlines()
        self._events: list[Event] = []

    def __len__(self) -> int:
        return len(self.requests)

    def drain(self) -> list[Event]:
        """Return everything said since the last call, in order."""
        events, self._events = self._events, []
        return events

    def refuse(self, refusal: Refused) -> None:
        """Turn a request away at the door."""
        self._events.append(refusal)

    def enter(self, request: Request) -> None:
        """Open a request."""
        self.requests[request.key] = request
        if request.deadline is not None:
            self._deadlines.add(request.key, request.deadline)

    def due(self, now: float) -> list[Request]:
        """Return the open requests whose deadline has passed, each once."""
        return [self.requests[key] for key in self._deadlines.due(now) if key in self.requests]

    def admit(self, request: Request, match: PrefixMatch, now: float) -> None:
        """Note the first step that a request takes part in, and what of its prompt was cached."""
        request.first_step_at = now
        request.cached_block_tokens = match.block_tokens - request.restored_tokens
        request.cached_partial_tokens = 0 if match.is_exact else match.partial_tokens
        request.cached_tail_tokens = match.partial_tokens if match.is_exact else 0
        self._counters.add_prompt(request)
        self._events.append(Admitted(request.key, match.num_tokens))

    def token(self, sequence: Sequence, sampled: SampledToken, finish: Finish | None, now: float) -> None:
        """Note a token that was drawn."""
        request = sequence.request
        if request.first_token_at is None:
            request.first_token_at = now
            request.prompt_done_at = now if request.usage().computed_prompt_tokens else request.first_step_at
        request.num_generated += 1
        self._counters.generated_tokens += 1
        logprobs = top_logprobs = None
        if request.spec.num_top_logprobs is not None and sampled.logprob is not None:
            logprobs, top_logprobs = [sampled.logprob], [list(sampled.top_logprobs)]
        self._events.append(
            Tokens(request.key, sequence.sample_index, [sampled.token_id], logprobs, top_logprobs, finish)
        )

    def progress(self, request: Request, num_computed: int) -> None:
        """Note how far the prompt of a request that asked for it is."""
        self._events.append(Progress(request.key, min(num_computed, len(request.prompt))))

    def finish(self, request: Request, now: float) -> None:
        """Close a request all of whose samples have ended."""
        self._close(request)
        request.finished_at = now
        self._counters.requests_finished += 1
        self._events.append(Finished(request.key, request.usage(), request.timings()))

    def fail(self, request: Request, kind: FailureKind, reason: str) -> None:
        """Close a request that ends with an error."""
        self._close(request)
        self._counters.requests_failed += 1
        terminal = Failed if request.was_admitted else Refused
        self._events.append(terminal(request.key, kind, reason))

    def _close(self, request: Request) -> None:
        del self.requests[request.key]
        if request.deadline is not None:
            self._deadlines.discard(request.key)
        request.sequences = []  # they point back: without this, only the garbage collector could free them
