"""What an engine answers to operations on its cache: reports, pages, counts, or a refusal."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from server.engine.admin_ops import PinType

__all__ = [
    "AdminErrorKind",
    "AdminRefusal",
    "AdminResult",
    "CacheReport",
    "CacheTotals",
    "CanaryReport",
    "DivergenceReport",
    "Evicted",
    "NamespaceReport",
    "PinReport",
    "Pinned",
    "PolicyReport",
    "PrefetchReport",
    "PrefixEntry",
    "PrefixFound",
    "PrefixPage",
    "SnapshotDone",
    "TierReport",
    "Touched",
    "TrialReport",
]


class AdminErrorKind(StrEnum):
    """Why an operation was not carried out; nothing has changed then."""

    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"
    """Several prefixes begin with the digits given."""
    IN_USE = "in_use"
    OVER_BUDGET = "over_budget"
    EXISTS = "exists"
    INVALID = "invalid"
    """A name or a page token that makes no sense to the engine; ``field`` says which, as the RPC names it."""
    UNSUPPORTED = "unsupported"
    """Not configured: no snapshot root, for example."""
    FAILED = "failed"
    """A fault, for example a full disk."""


class AdminRefusal(msgspec.Struct, frozen=True, tag="refusal"):
    """Fit for the client: no path, no address, nothing of other tenants."""

    kind: AdminErrorKind
    reason: str
    field: str = ""


class CacheTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Counters from the engine's start; entries and blocks are of now, on the device."""

    entries: int = 0
    blocks: int = 0
    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_block_tokens: int = 0
    cached_partial_tokens: int = 0
    cached_tail_tokens: int = 0
    restored_tokens: int = 0
    inserted_blocks: int = 0
    evicted_blocks: dict[str, int] = {}
    """By cause: capacity, quota, admin, released."""
    expired_blocks: int = 0
    pinned_blocks: int = 0
    restored_blocks: int = 0
    time_saved_s: float = 0.0

    @property
    def computed_tokens(self) -> int:
        cached = self.cached_block_tokens + self.cached_partial_tokens + self.cached_tail_tokens
        return self.prompt_tokens - cached - self.restored_tokens


class NamespaceReport(msgspec.Struct, frozen=True):
    """One namespace."""

    namespace: str
    salt: str
    """For the front end, which knows whose it is; it goes no further."""
    totals: CacheTotals
    policy: str
    quota_blocks: int


class DivergenceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a lossy codec has cost: means over recent blocks, and the upper ends of their intervals."""

    measured_blocks: int
    cosine_distance: float
    cosine_distance_upper: float
    relative_l2: float
    relative_l2_upper: float
    is_over_budget: bool


class TierReport(msgspec.Struct, frozen=True, kw_only=True):
    """One tier; see ``kvcore.tiers.interface.TierStats``."""

    tier: str
    codec: str
    is_available: bool
    num_objects: int
    num_bytes: int
    max_bytes: int | None
    stored: int
    store_failures: int
    refused_stores: int
    hits: int
    misses: int
    fetched: int
    fetched_bytes: int
    stored_bytes: int
    evicted: int
    expired: int
    quarantined: int
    failures: dict[str, int]
    latency_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    crossover_tokens: int
    """Prefix length from which fetching beats computing; -1: never; -2: not measured yet."""
    last_fault: str | None
    divergence: DivergenceReport | None = None
    """None: nothing lossy has been stored."""


class PinReport(msgspec.Struct, frozen=True, kw_only=True):
    """Pins and their budgets, in blocks."""

    soft_pins: int = 0
    hard_pins: int = 0
    soft_blocks: int = 0
    hard_blocks: int = 0
    soft_budget_blocks: int = 0
    hard_budget_blocks: int = 0


class PrefetchReport(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks fetched ahead, for waiting requests and for sessions expected back."""

    waiting_fetched: int = 0
    waiting_used: int = 0
    waiting_late: int = 0
    waiting_wasted: int = 0
    sessions_fetched: int = 0
    sessions_used: int = 0
    sessions_late: int = 0
    sessions_wasted: int = 0
    restore_s: float = 0.0
    hidden_s: float = 0.0


class CacheReport(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """Everything ``GetStats`` shows."""

    totals: CacheTotals
    namespaces: list[NamespaceReport]
    tiers: list[TierReport]
    pins: PinReport
    prefetch: PrefetchReport
    num_blocks: int
    num_blocks_in_use: int
    num_blocks_cached: int
    num_blocks_free: int
    uptime_s: float
    policy: str


class PrefixEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A run of blocks without a branch, named by its end."""

    prefix_id: str
    parent_id: str
    namespace: str
    salt: str
    num_tokens: int
    own_tokens: int
    own_blocks: int
    hits: int
    age_s: float
    idle_s: float
    expires_in_s: float | None
    pin: PinType | None
    pin_expires_in_s: float | None
    in_use: bool
    has_last_logits: bool
    num_children: int
    tiers: dict[str, int]
    """Blocks that are also there, by tier."""
    value: float
    preview: list[int]
    """Last token ids of the run, for the viewer's own entries; else empty."""


class PrefixPage(msgspec.Struct, frozen=True, tag="page"):
    """One page of entries."""

    entries: list[PrefixEntry]
    next_page_token: str
    total: int


class PrefixFound(msgspec.Struct, frozen=True, kw_only=True, tag="found"):
    """How much of a prompt is cached, and where."""

    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    is_exact: bool
    tiers: dict[str, int]
    prefix_id: str


class Pinned(msgspec.Struct, frozen=True, kw_only=True, tag="pinned"):
    """A pin that holds from now on."""

    prefix_id: str
    num_tokens: int
    num_blocks: int
    newly_pinned_blocks: int


class Touched(msgspec.Struct, frozen=True, tag="touched"):
    """Blocks that an operation concerned."""

    prefix_id: str
    num_blocks: int


class Evicted(msgspec.Struct, frozen=True, tag="evicted"):
    """What was taken, and what was left because it is held."""

    evicted_blocks: int
    kept_blocks: int
    evicted_objects: int


class TrialReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy would have hit."""

    policy: str
    token_hit_rate: float
    request_hit_rate: float
    requests: int
    tokens: int
    sampled_share: float
    cost_share: float


class CanaryReport(msgspec.Struct, frozen=True, kw_only=True):
    """A policy that runs for real in a share of the namespaces."""

    policy: str
    share: float
    namespaces: int
    token_hit_rate: float
    live_token_hit_rate: float


class PolicyReport(msgspec.Struct, frozen=True, kw_only=True, tag="policy"):
    """The live policy, those that exist, and those on trial."""

    policy: str
    available: dict[str, str]
    trial: list[TrialReport]
    canary: CanaryReport | None


class SnapshotDone(msgspec.Struct, frozen=True, tag="snapshot"):
    """A snapshot is written, or read."""

    num_objects: int
    num_bytes: int
    skipped_objects: int


AdminResult = (
    CacheReport
    | PrefixPage
    | PrefixFound
    | Pinned
    | Touched
    | Evicted
    | PolicyReport
    | SnapshotDone
    | AdminRefusal
)
