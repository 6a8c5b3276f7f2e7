"""What an engine is started with: resolved once by ``server.config``, the engine process's first message."""

from __future__ import annotations

import msgspec

__all__ = ["EngineOptions", "TierOptions"]


class TierOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where blocks go besides the device. Everything is off by default."""

    host_bytes: int | None = None
    host_codec: str = "none"
    disk_path: str | None = None
    disk_bytes: int = 16 << 30
    disk_codec: str = "none"
    redis_url: str | None = None
    redis_lifetime_s: float = 3600.0
    redis_codec: str = "none"
    restore: str = "auto"
    """auto: bring blocks back when that is expected to be faster than computing them; always; never."""
    prefetches_sessions: bool = False
    snapshot_root: str | None = None

    @property
    def has_any(self) -> bool:
        """Say whether there is any tier. Snapshots are restored into one: there is one for them, too."""
        places = (self.host_bytes, self.disk_path, self.redis_url, self.snapshot_root)
        return any(place is not None for place in places)


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
    policy: str = "lru"
    """Of eviction: a name that ``kvcore.policies`` knows."""
    trial: tuple[str, ...] = ()
    """Policies in the shadow of the live one."""
    canary: tuple[str, float] | None = None
    """Another policy, and the share of namespaces that it serves for real."""
    namespace_quota: float | None = None
    """Share of the blocks that one namespace may keep when others want them."""
    soft_pin_share: float = 0.8
    hard_pin_share: float = 0.5
    tiers: TierOptions = TierOptions()
    num_logits_slots: int = 1024
    """Rows of kept last logits, for exact repeats."""
    num_threads: int | None = None
    """None: one less than the cores given, at least one."""
    random_weights: bool = False
    """Build the model from its configuration alone: benchmarks of a shape whose weights are not at hand."""
    seed: int = 0
    """Seed of random weights."""
