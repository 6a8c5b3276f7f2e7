"""Which experiments a mode runs, how often, and for how long at most."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from loadgen.experiments.peer_jobs import PeerSettings
from loadgen.experiments.policies import CAPACITIES_TOKENS
from loadgen.experiments.prefetch import PrefetchSizes
from loadgen.experiments.tiers import TierSizes

__all__ = ["PLANS", "Plan", "continuous_candidates", "generate_candidates"]

CONTINUOUS = "transformers continuous batching"
GENERATE = "transformers generate, padded"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One mode of the benchmark. Budgets in seconds; a run is given up after one."""

    shapes: tuple[str, ...]
    workloads: dict[str, tuple[str, ...]]
    """By shape."""
    repeats: int
    budget_s: float
    """Of one workload on one shape."""
    calibration_s: float
    """Of one setting of a peer."""
    repeat_lengths: tuple[int, ...]
    num_repeats: int
    decode_repeats: int
    tiers: TierSizes
    restart_tokens: int
    """Length of the shared system prompt."""
    restart_repeats: int
    prefetch: PrefetchSizes
    replay_seeds: int
    """Of each half of the recorded sessions."""
    policy_capacities: tuple[int, ...]
    """Cache sizes, in tokens."""
    trial_workload: str
    encoders: tuple[tuple[str, str], ...]
    """Shapes and types of weights that are held against their matrix products."""
    predict_seconds: float
    """Of each load of predict calls."""


PLANS = {
    "quick": Plan(
        shapes=("smollm2-135m", "tinyllama-1.1b"),
        workloads={"smollm2-135m": ("4 groups x 8 at 8", "no sharing at 8"), "tinyllama-1.1b": ()},
        repeats=1,
        budget_s=300.0,
        calibration_s=60.0,
        repeat_lengths=(64, 1024),
        num_repeats=20,
        decode_repeats=1,
        tiers=TierSizes(
            lengths=(16, 128, 512, 2048),
            repeats=3,
            once_from_tokens=512,
            places=("host", "disk", "redis"),
        ),
        restart_tokens=1024,
        restart_repeats=1,
        prefetch=PrefetchSizes(sessions=16, running=2, prefix_tokens=256, new_tokens=8, rounds=2),
        replay_seeds=1,
        policy_capacities=(1_000_000, 3_000_000, 6_500_000),
        trial_workload="4 groups x 8 at 8",
        encoders=(
            ("minilm", "bfloat16"),
            ("minilm", "float32"),
            ("bert-base", "bfloat16"),
            ("bert-base", "float32"),
        ),
        predict_seconds=10.0,
    ),
    "full": Plan(
        shapes=("smollm2-135m", "tinyllama-1.1b"),
        workloads={
            "smollm2-135m": ("4 groups x 8 at 8", "1 group x 32 at 32", "no sharing at 8"),
            "tinyllama-1.1b": ("4 groups x 8 at 8", "1 group x 32 at 32", "no sharing at 8"),
        },
        repeats=3,
        budget_s=1200.0,
        calibration_s=180.0,
        repeat_lengths=(64, 256, 1024, 3072),
        num_repeats=50,
        decode_repeats=3,
        tiers=TierSizes(
            lengths=(16, 128, 256, 512, 1024, 2048, 4096),
            repeats=5,
            once_from_tokens=2048,
            places=("host", "disk", "disk (zstd)", "disk (int8)", "redis"),
        ),
        restart_tokens=1024,
        restart_repeats=3,
        prefetch=PrefetchSizes(sessions=24, running=2, prefix_tokens=512, new_tokens=16, rounds=5),
        replay_seeds=3,
        policy_capacities=CAPACITIES_TOKENS,
        trial_workload="4 groups x 8 at 8",
        encoders=(
            ("minilm", "bfloat16"),
            ("minilm", "float32"),
            ("bert-base", "bfloat16"),
            ("bert-base", "float32"),
        ),
        predict_seconds=10.0,
    ),
    # For tests of the machinery: seconds, and figures that mean nothing.
    "smoke": Plan(
        shapes=("tiny",),
        workloads={"tiny": ("4 groups x 8 at 8",)},
        repeats=1,
        budget_s=60.0,
        calibration_s=60.0,
        repeat_lengths=(64,),
        num_repeats=5,
        decode_repeats=1,
        tiers=TierSizes(
            lengths=(16, 128, 1024),
            repeats=3,
            once_from_tokens=4096,
            places=("host", "disk", "disk (zstd)", "redis"),
        ),
        restart_tokens=1024,
        restart_repeats=1,
        prefetch=PrefetchSizes(sessions=12, running=2, prefix_tokens=256, new_tokens=16, rounds=2),
        replay_seeds=1,
        policy_capacities=(1_000_000,),
        trial_workload="small",
        encoders=(("minilm", "float32"),),
        predict_seconds=1.0,
    ),
}

TARGETS: dict[str, dict[str, dict[str, float]]] = {
    "smollm2-135m": {
        "4 groups x 8 at 8": {CONTINUOUS: 3.0, GENERATE: 2.0},
        "1 group x 32 at 32": {CONTINUOUS: 3.0, GENERATE: 2.0},
        "no sharing at 8": {CONTINUOUS: 1.3, GENERATE: 1.3},
    },
    "tinyllama-1.1b": {
        "4 groups x 8 at 8": {CONTINUOUS: 2.4, GENERATE: 2.0},
        "1 group x 32 at 32": {CONTINUOUS: 2.4, GENERATE: 2.0},
        "no sharing at 8": {CONTINUOUS: 1.3, GENERATE: 1.3},
    },
}
"""Ratios to reach, by shape, workload and peer."""


def _dtypes(capability: str) -> Sequence[str]:
    """Return the data types worth trying: without bfloat16 arithmetic, float32 may be faster."""
    return (
        ("bfloat16",) if capability.upper() not in ("AVX2", "DEFAULT", "NO AVX") else ("bfloat16", "float32")
    )


def generate_candidates(cores: int, capability: str) -> list[PeerSettings]:
    """Return the settings of padded ``generate`` to try: with all cores, and with one left to the rest."""
    return [
        msgspec.convert({"engine": "generate", "dtype": dtype, "threads": threads}, PeerSettings)
        for dtype in _dtypes(capability)
        for threads in sorted({cores, max(1, cores - 1)}, reverse=True)
    ]


def continuous_candidates(
    cores: int, capability: str, *, is_thorough: bool, like: PeerSettings
) -> list[PeerSettings]:
    """Return the settings of continuous batching to try; unless thorough, with the threads of ``like``."""
    variants: list[dict[str, str | int | bool]] = [
        {"attention": "sdpa", "page_size": 32, "num_blocks": 1024},
        {"attention": "paged|eager", "page_size": 32, "num_blocks": 1024},
    ]
    base = [like]
    if is_thorough:
        base = generate_candidates(cores, capability)
        variants += [
            {"attention": "sdpa", "page_size": 256, "num_blocks": 128},
            {"attention": "sdpa", "page_size": 16, "num_blocks": 2048},
            {"attention": "sdpa", "page_size": 32, "num_blocks": 1024, "sort_prompts": False},
            {"attention": "sdpa", "page_size": 32, "num_blocks": 1024, "share_blocks": False},
        ]
    return [
        msgspec.convert(
            {"engine": "continuous", "dtype": one.dtype, "threads": one.threads, **variant}, PeerSettings
        )
        for one in base
        for variant in variants
    ]
