"""A summary as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from loadgen.summary import Percentiles, Summary

__all__ = ["summary_lines"]


def _milliseconds(name: str, times: Percentiles | None) -> str:
    if times is None:
        return f"{name:<24} -"
    values = (times.p50, times.p90, times.p99, times.max)
    return f"{name:<24} {'  '.join(f'{1000 * value:9.2f}' for value in values)}"


def summary_lines(summary: Summary) -> Iterator[str]:
    """Yield the lines of a summary: counts, tokens, then times in milliseconds."""
    errors = ", ".join(f"{count} {name}" for name, count in summary.errors.items())
    failed = f", {summary.failed} failed ({errors})" if summary.failed else ""
    yield f"{summary.requests} requests in {summary.elapsed_s:.2f} s{failed}"
    yield (
        f"{summary.generated_tokens} tokens generated, {summary.generated_tokens_per_s:.1f} a second; "
        f"{summary.requests_per_s:.2f} requests a second"
    )
    yield (
        f"{summary.prompt_tokens} prompt tokens: {summary.cached_block_tokens} from whole blocks, "
        f"{summary.cached_partial_tokens} from parts of blocks, {summary.cached_tail_tokens} from exact "
        f"tails, {summary.computed_prompt_tokens} computed"
    )
    yield f"{'milliseconds':<24} {'  '.join(f'{name:>9}' for name in ('p50', 'p90', 'p99', 'max'))}"
    yield _milliseconds("first token", summary.first_token_s)
    yield _milliseconds("  as the server says", summary.server_first_token_s)
    yield _milliseconds("per later token", summary.time_per_token_s)
    yield _milliseconds("pause before a message", summary.gap_s)
    yield _milliseconds("whole request", summary.total_s)
