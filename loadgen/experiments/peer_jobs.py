"""What the peer's process is asked and answers, one JSON object per line."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Answer", "Job", "PeerSettings"]


class PeerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the peer is run; the fields that a job's engine does not know are ignored."""

    engine: Literal["generate", "continuous"]
    batch_size: int = 8
    """Sequences at a time."""
    threads: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: str = "sdpa"
    """sdpa, or "paged|eager" for continuous batching."""
    page_size: int = 32
    num_blocks: int = 1024
    max_batch_tokens: int = 2048
    share_blocks: bool = True
    sort_prompts: bool = True
    """What `generate_batch` does to find more shared prefixes; else in the order given."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts to continue, and how."""

    settings: PeerSettings
    prompts: list[list[int]]
    max_new_tokens: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a job took. ``first_token_s`` only where the engine tells (continuous batching)."""

    elapsed_s: float
    generated_tokens: int
    first_token_s: list[float] = []
    token_ids: list[list[int]] = []
    error: str | None = None
