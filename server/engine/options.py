"""What an engine is started with: resolved once by ``server.config``, the engine process's first message."""

from __future__ import annotations

import msgspec

__all__ = ["EngineOptions"]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides how one model is served. Sizes in bytes or tokens, times in seconds."""

    model: str
    """Local folder, hub name, or "builtin"."""
    revision: str | None = None
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto (the checkpoint's own; float32 where the device lacks it)."""
    executor: str = "auto"
    """auto, native or transformers."""
    block_size: int = 16
    kv_memory_bytes: int | None = None
    """None: a share of what is free once the model is loaded."""
    num_blocks: int | None = None
    """Overrides ``kv_memory_bytes``; for tests."""
    max_model_length: int | None = None
    """None: the model's own."""
    max_batch_tokens: int = 512
    """Token budget of one step. Larger steps prefill faster; smaller ones keep running streams smooth."""
    max_running: int = 256
    max_waiting: int = 1024
    waiting_bound_s: float = 30.0
    """After this long in the queue, no request that arrived later is admitted before a waiting one."""
    default_lifetime_s: float | None = None
    min_cached_tokens: int = 0
    """Prompts shorter than this leave nothing in the cache."""
    num_logits_slots: int = 1024
    """Rows of kept last logits, for exact repeats."""
    num_threads: int | None = None
    """None: one less than the cores given, at least one."""
    random_weights: bool = False
    """Build the model from its configuration alone: benchmarks of a shape whose weights are not at hand."""
    seed: int = 0
    """Seed of random weights."""
