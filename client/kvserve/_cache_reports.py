"""What ``stats`` returns: how a cache does, in total and in parts, field for field what the contract says.

Times are in seconds, sizes in bytes; counters run from the start of the server's engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CacheReport",
    "CacheStats",
    "Divergence",
    "NamespaceStats",
    "PinStats",
    "PrefetchCounts",
    "PrefetchStats",
    "TierStats",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Counters of a whole cache or of a namespace; entries, blocks and bytes are of now, on the device.

    ``prompt_tokens`` is the sum of the three kinds of cached tokens, the restored and the computed ones.
    """

    entries: int
    blocks: int
    bytes: int
    requests: int
    """Those that looked a prompt up."""
    hits: int
    """Those that found at least one token."""
    misses: int
    request_hit_rate: float
    """Of requests that found at least one token: one that all prompts begin with counts. [0, 1]."""
    token_hit_rate: float
    """Reused tokens over prompt tokens."""
    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    cached_tail_tokens: int
    restored_tokens: int
    computed_tokens: int
    inserted_blocks: int
    evicted_blocks: Mapping[str, int]
    """By cause: "capacity", "quota", "admin", "released"."""
    expired_blocks: int
    pinned_blocks: int
    restored_blocks: int
    """Brought back from tiers."""
    time_saved_s: float
    """Estimate: what computing the reused tokens would have taken, less what bringing them back took."""

    @property
    def reused_tokens(self) -> int:
        """Return all prompt tokens that were not computed."""
        on_device = self.cached_block_tokens + self.cached_partial_tokens + self.cached_tail_tokens
        return on_device + self.restored_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStats:
    """One namespace: prompts in it share blocks with each other and with no others."""

    namespace: str
    tenant: str
    """Empty where none is configured."""
    stats: CacheStats
    policy: str
    """What evicts here: another than the server's in a canary."""
    quota_blocks: int
    """0: no quota."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far what a lossy codec gives back is from what it was given.

    Means over recent blocks, and the upper ends of their confidence intervals (95%).
    """

    measured_blocks: int
    cosine_distance: float
    """1 - cosine."""
    cosine_distance_upper: float
    relative_l2: float
    """Length of the difference over the length of the original."""
    relative_l2_upper: float
    is_over_budget: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Where blocks go from the device: "host", "disk" or "redis"."""

    tier: str
    is_available: bool
    """False while it is left alone after faults."""
    objects: int
    bytes: int
    max_bytes: int
    """0: no limit of its own."""
    hits: int
    misses: int
    stored: int
    fetched: int
    stored_bytes: int
    fetched_bytes: int
    evicted: int
    expired: int
    quarantined: int
    refused_stores: int
    store_failures: int
    failures: Mapping[str, int]
    """Failed fetches by kind, such as "missing", "timeout" or "corrupt"."""
    latency_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    crossover_tokens: int
    """Prefix length from which bringing it back pays; 0: always, -1: never, -2: not measured yet."""
    last_fault: str
    codec: str
    divergence: Divergence | None
    """Of a lossy codec; None if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinStats:
    """What pins hold, and what they may."""

    soft_pins: int
    hard_pins: int
    soft_blocks: int
    hard_blocks: int
    soft_budget_blocks: int
    hard_budget_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchCounts:
    """What became of blocks that were fetched ahead."""

    fetched_blocks: int
    used_blocks: int
    """In time."""
    late_blocks: int
    wasted_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStats:
    """Fetching from tiers ahead of need."""

    waiting: PrefetchCounts
    """For requests in the queue."""
    sessions: PrefetchCounts
    """For sessions that were expected to return."""
    restore_s: float
    hidden_s: float
    """The part of ``restore_s`` that requests spent waiting in the queue anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """How a model's cache does."""

    model: str
    fingerprint: str
    block_size: int
    """Token positions in one block."""
    bytes_per_block: int
    num_blocks: int
    num_blocks_in_use: int
    """Held by running requests."""
    num_blocks_cached: int
    """Cached, and held by nobody."""
    num_blocks_free: int
    total: CacheStats
    namespaces: tuple[NamespaceStats, ...]
    """The largest, by cached blocks; at most 1,000."""
    tiers: tuple[TierStats, ...]
    pins: PinStats
    prefetch: PrefetchStats
    uptime_s: float
    """What the counters cover."""
    policy: str
