"""What is kept of every request. Times are seconds; ``*_at_s`` count from the start of the run."""

from __future__ import annotations

import msgspec

__all__ = ["Record", "ServerTimings", "ServerUsage"]


class ServerUsage(msgspec.Struct, frozen=True):
    """Where the prompt's tokens came from, as the server reports it."""

    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    cached_tail_tokens: int
    computed_prompt_tokens: int
    generated_tokens: int

    @property
    def cached_tokens(self) -> int:
        """Return the prompt tokens that were not computed."""
        return self.cached_block_tokens + self.cached_partial_tokens + self.cached_tail_tokens


class ServerTimings(msgspec.Struct, frozen=True):
    """What the server says it spent its time on, in seconds."""

    tokenize_s: float
    queue_s: float
    lookup_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    total_s: float


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request, measured at the client."""

    conversation: int
    turn: int
    group: int
    scheduled_at_s: float
    """When it should have started; in an open loop it may start later than that."""
    started_at_s: float
    ended_at_s: float
    prompt_tokens: int
    generated_tokens: int = 0
    event_at_s: list[float] = []
    """When each message with tokens came."""
    event_tokens: list[int] = []
    """How many tokens each of them brought."""
    usage: ServerUsage | None = None
    timings: ServerTimings | None = None
    error: str | None = None
    """Name of the client's error class, and its message; None for a request that ended well."""

    @property
    def first_token_s(self) -> float | None:
        """Return the time to the first token from when the request was due."""
        return self.event_at_s[0] - self.scheduled_at_s if self.event_at_s else None

    @property
    def total_s(self) -> float:
        """Return the time to the end from when the request was due."""
        return self.ended_at_s - self.scheduled_at_s

    @property
    def time_per_token_s(self) -> float | None:
        """Return the mean time per token after the first message's."""
        later = sum(self.event_tokens[1:])
        return (self.event_at_s[-1] - self.event_at_s[0]) / later if later else None

    def gaps_s(self) -> list[float]:
        """Return the pauses between messages that brought tokens: what a reader sees as stutter."""
        return [after - before for before, after in zip(self.event_at_s, self.event_at_s[1:], strict=False)]
