"""Decoding one sequence: time per token beside the time that reading the weights once takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from loadgen.experiments.figures import Figure
from loadgen.experiments.peer_jobs import PeerSettings
from loadgen.experiments.processes import ProcessFailed, run_loadgen
from loadgen.experiments.shapes import ModelShape
from loadgen.experiments.throughput import Peer
from loadgen.workloads import unique_prompts

__all__ = ["measure_decode"]

PROMPT_TOKENS = 32
TARGET_SHARE = 0.6


def _ours(target: str, new_tokens: int, repeats: int, timeout_s: float) -> list[float]:
    sizes = ["--workload", "unique", "--requests", str(1 + repeats), "--own", str(PROMPT_TOKENS)]
    arguments = [*sizes, "--new", str(new_tokens), "--concurrency", "1"]
    records = run_loadgen(target, arguments, timeout_s=timeout_s).records
    times = [record.time_per_token_s for record in records[1:]]
    return [time for time in times if time is not None]


def _peers(
    peer: Peer, shape: ModelShape, settings: PeerSettings, new_tokens: int, repeats: int, timeout_s: float
) -> list[float]:
    """Return the peer's times per token: a long run less a run of one token, so the prompt cancels out."""
    times = []
    for seed in range(repeats):
        (conversation,) = unique_prompts(
            num_requests=1,
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=new_tokens,
            vocab_size=shape.vocab_size,
            seed=seed,
        )
        prompts = [list(conversation.turns[0].token_ids)]
        short = peer.ask(settings, prompts, 1, timeout_s).elapsed_s
        whole = peer.ask(settings, prompts, new_tokens, timeout_s).elapsed_s
        times.append((whole - short) / (new_tokens - 1))
    return times


def measure_decode(
    shape: ModelShape,
    *,
    target: str,
    peer: Peer,
    candidates: Sequence[PeerSettings],
    read_bytes_per_s: float,
    repeats: int,
    timeout_s: float,
    new_tokens: int = 32,
) -> tuple[list[Figure], dict[str, object]]:
    """Return the share of the bandwidth limit that decoding reaches, ours and the best peer's."""
    limit_s = shape.bytes_read_per_step / read_bytes_per_s
    ours = statistics.median(_ours(target, new_tokens, repeats, timeout_s))
    figures = [
        Figure(
            experiment="decode of one sequence",
            shape=shape.name,
            name="share of the read bandwidth limit",
            value=limit_s / ours,
            unit="",
            target=TARGET_SHARE,
            ours=1000 * ours,
            other=1000 * limit_s,
            other_name="ms a token at the limit",
        )
    ]
    details: dict[str, object] = {"kvserve_s": ours, "limit_s": limit_s}
    for settings in candidates:
        name = f"transformers {settings.engine}, {settings.dtype}, {settings.threads} threads"
        try:
            time_s = statistics.median(_peers(peer, shape, settings, new_tokens, repeats, timeout_s))
        except ProcessFailed as failure:
            details[name] = str(failure)
            continue
        details[name] = time_s
        figures.append(
            Figure(
                experiment="decode of one sequence",
                shape=shape.name,
                name=f"against {name}",
                value=time_s / ours,
                unit="x",
                ours=1000 * ours,
                other=1000 * time_s,
                other_name="ms a token",
            )
        )
    return figures, details
