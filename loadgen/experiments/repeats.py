"""Exact repeats, and identical prompts that arrive together: what the cache saves, seen through gRPC."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from loadgen.experiments.figures import Figure
from loadgen.experiments.processes import run_loadgen

__all__ = ["measure_cold_prompts", "measure_repeats"]

TARGET_FIRST_TOKEN_MS = 5.0


def measure_repeats(
    shape_name: str, *, target: str, prompt_lengths: Sequence[int], repeats: int, timeout_s: float
) -> tuple[list[Figure], dict[str, object]]:
    """Return the time to the first token of a prompt that was asked before, by length, one call at a time."""
    figures: list[Figure] = []
    details: dict[str, object] = {}
    for length in prompt_lengths:
        sizes = ["--workload", "repeat", "--requests", "1", "--repeats", str(repeats), "--own", str(length)]
        arguments = [*sizes, "--new", "4", "--concurrency", "1", "--seed", str(length)]
        records = run_loadgen(target, arguments, timeout_s=timeout_s).records
        cold, warm = records[0], records[1:]
        client = statistics.median(r.first_token_s for r in warm if r.first_token_s is not None)
        server = statistics.median(r.timings.first_token_s for r in warm if r.timings is not None)
        computed = max(r.usage.computed_prompt_tokens for r in warm if r.usage is not None)
        details[str(length)] = {
            "cold_s": cold.first_token_s,
            "client_s": client,
            "server_s": server,
            "computed_prompt_tokens": computed,
        }
        figures.append(
            Figure(
                experiment="exact repeat",
                shape=shape_name,
                name=f"time to first token, {length} tokens",
                value=1000 * client,
                unit="ms",
                target=TARGET_FIRST_TOKEN_MS,
                lower_is_better=True,
                ours=1000 * server,
                other=1000 * (cold.first_token_s or 0.0),
                other_name="ms cold",
                note=f"'ours' as the server reports it; {computed} prompt tokens computed",
            )
        )
    return figures, details


def measure_cold_prompts(
    shape_name: str, *, target: str, num_requests: int, prompt_tokens: int, seed: int, timeout_s: float
) -> tuple[list[Figure], dict[str, object]]:
    """Return how many prefills identical prompts cost that arrive together; one is enough."""
    sizes = ["--workload", "shared-prefix", "--groups", "1", "--requests", str(num_requests)]
    prompt = ["--shared", str(prompt_tokens), "--own", "0", "--new", "4"]
    arguments = [*sizes, *prompt, "--concurrency", str(num_requests), "--seed", str(seed)]
    report = run_loadgen(target, arguments, timeout_s=timeout_s)
    computed = report.summary.computed_prompt_tokens
    figure = Figure(
        experiment="identical cold prompts",
        shape=shape_name,
        name=f"prefills for {num_requests} prompts of {prompt_tokens} tokens",
        value=computed / prompt_tokens,
        unit="",
        target=1.0,
        lower_is_better=True,
        ours=float(computed),
        other=float(report.summary.prompt_tokens),
        other_name="prompt tokens sent",
    )
    times = report.summary.first_token_s
    return [figure], {"computed": computed, "first_token_p50_s": times.p50 if times else None}
