"""From records to figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from loadgen.records import Record

__all__ = ["Percentiles", "Summary", "percentile", "summarize"]


class Percentiles(msgspec.Struct, frozen=True):
    """A distribution in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in figures. Distributions are None where there is nothing to distribute."""

    requests: int
    failed: int
    errors: dict[str, int]
    """By name of the error class."""
    elapsed_s: float
    """From the first request's start to the last one's end."""
    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    cached_tail_tokens: int
    computed_prompt_tokens: int
    generated_tokens: int
    generated_tokens_per_s: float
    requests_per_s: float
    first_token_s: Percentiles | None
    server_first_token_s: Percentiles | None
    """As the server reports it: without the network and the client."""
    time_per_token_s: Percentiles | None
    """Of requests: the mean time per token after the first."""
    gap_s: Percentiles | None
    """Of messages: the pause before each."""
    total_s: Percentiles | None


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the sorted values lie, between neighbours by weight."""
    if not ordered:
        raise ValueError("no values")
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _percentiles(values: Iterable[float | None]) -> Percentiles | None:
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return Percentiles(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p99=percentile(ordered, 0.99),
        max=ordered[-1],
    )


def summarize(records: Sequence[Record]) -> Summary:
    """Return the figures of a run. Requests that failed count as such and for tokens, not for times."""
    good = [record for record in records if record.error is None]
    usages = [record.usage for record in good if record.usage is not None]
    elapsed_s = 0.0
    if records:
        elapsed_s = max(r.ended_at_s for r in records) - min(r.started_at_s for r in records)
    generated = sum(record.generated_tokens for record in records)
    errors = Counter(r.error.partition(":")[0] for r in records if r.error is not None)
    return Summary(
        requests=len(records),
        failed=len(records) - len(good),
        errors=dict(errors.most_common()),
        elapsed_s=elapsed_s,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        cached_block_tokens=sum(usage.cached_block_tokens for usage in usages),
        cached_partial_tokens=sum(usage.cached_partial_tokens for usage in usages),
        cached_tail_tokens=sum(usage.cached_tail_tokens for usage in usages),
        computed_prompt_tokens=sum(usage.computed_prompt_tokens for usage in usages),
        generated_tokens=generated,
        generated_tokens_per_s=generated / elapsed_s if elapsed_s > 0 else 0.0,
        requests_per_s=len(good) / elapsed_s if elapsed_s > 0 else 0.0,
        first_token_s=_percentiles(record.first_token_s for record in good),
        server_first_token_s=_percentiles(r.timings.first_token_s if r.timings else None for r in good),
        time_per_token_s=_percentiles(record.time_per_token_s for record in good),
        gap_s=_percentiles(gap for record in good for gap in record.gaps_s()),
        total_s=_percentiles(record.total_s for record in good),
    )
