"""What the front end asks of an engine's cache, and what the engine answers and tells by itself.

::

    front end                                              engine
       | -- AdminCall(key, op) ---------------------------> |   carried out between two steps
       | <------------------------- AdminProgress(key) ---- |   of long operations, now and then
       | <--- AdminReply(key, result, or AdminRefusal) ---- |   exactly one, unless the engine is lost
       | -- Watch(is_on) ---------------------------------> |   while anybody watches
       | <----------------------- CacheEvents(events) ----- |   at most one message per turn of the loop

A prefix is named by ``prefix_id``, the hexadecimal digest of the prefix up to and including its last block
(``kvcore.keys``), a namespace by the first 16 digits of its seed. Tokens of a namespace leave the engine
only for the viewer whose salt it has. Times are seconds.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = [
    "AdminCall",
    "AdminErrorKind",
    "AdminOp",
    "AdminProgress",
    "AdminRefusal",
    "AdminReply",
    "AdminResult",
    "CacheEventKind",
    "CacheEventNote",
    "CacheEvents",
    "CacheReport",
    "CacheTotals",
    "CanaryReport",
    "CancelAdmin",
    "ClearCache",
    "DescribePolicy",
    "DivergenceReport",
    "EvictPrefixes",
    "Evicted",
    "ListPrefixes",
    "LookUpPrefix",
    "NamespaceReport",
    "PinPrefix",
    "PinReport",
    "PinType",
    "Pinned",
    "PolicyReport",
    "PrefetchReport",
    "PrefixEntry",
    "PrefixFound",
    "PrefixPage",
    "PrefixRef",
    "ReadStats",
    "ReleasePrefix",
    "RestoreSnapshot",
    "SaveSnapshot",
    "SetLifetime",
    "SetPolicy",
    "SnapshotDone",
    "TierReport",
    "Touched",
    "TrialReport",
    "UnpinPrefix",
    "Watch",
]


class PinType(StrEnum):
    """How firmly a pin holds."""

    SOFT = "soft"
    """Evicted only when nothing else can be."""
    HARD = "hard"
    """Not evicted before its time."""


class PrefixRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prefix by id (or at least 8 leading digits of one), or by its tokens in the namespace of a salt."""

    prefix_id: str = ""
    token_ids: list[int] = []
    salt: str = ""


# -- operations ---------------------------------------------------------------------------------------


class ReadStats(msgspec.Struct, frozen=True, tag="stats"):
    """Answered with ``CacheReport``."""

    namespace: str = ""
    max_namespaces: int = 1000


class ListPrefixes(msgspec.Struct, frozen=True, tag="list", kw_only=True):
    """Answered with ``PrefixPage``: by value, the highest first."""

    page_size: int = 100
    page_token: str = ""
    namespace: str = ""
    min_age_s: float | None = None
    max_age_s: float | None = None
    min_hits: int = 0
    is_pinned: bool | None = None
    tier: str = ""
    viewer_salt: str = ""
    """Entries of this namespace come with a preview."""


class LookUpPrefix(msgspec.Struct, frozen=True, tag="lookup"):
    """Answered with ``PrefixFound``. Touches no recency."""

    prefix: PrefixRef


class PinPrefix(msgspec.Struct, frozen=True, tag="pin"):
    """Answered with ``Pinned``. A prefix that is pinned already gets the new type and lifetime."""

    prefix: PrefixRef
    pin: PinType
    lifetime_s: float | None = None


class UnpinPrefix(msgspec.Struct, frozen=True, tag="unpin"):
    """Answered with ``Touched``; 0 blocks if it was not pinned."""

    prefix: PrefixRef


class SetLifetime(msgspec.Struct, frozen=True, tag="lifetime"):
    """Answered with ``Touched``. None: no end."""

    prefix: PrefixRef
    lifetime_s: float | None


class ReleasePrefix(msgspec.Struct, frozen=True, tag="release"):
    """Answered with ``Touched``: the blocks that now go first."""

    prefix: PrefixRef


class EvictPrefixes(msgspec.Struct, frozen=True, tag="evict", kw_only=True):
    """Answered with ``Evicted``. The conditions given must all hold; at least one is given."""

    subtree: PrefixRef | None = None
    namespace: str = ""
    min_idle_s: float | None = None
    skip_in_use: bool = False
    """False: ``IN_USE``, and nothing changes, if a request or a hard pin holds any of it."""
    tiers: bool = True


class ClearCache(msgspec.Struct, frozen=True, tag="clear"):
    """Answered with ``Evicted``. Hard pins count as in use."""

    skip_in_use: bool = False
    tiers: bool = True


class DescribePolicy(msgspec.Struct, frozen=True, tag="get_policy"):
    """Answered with ``PolicyReport``."""


class SetPolicy(msgspec.Struct, frozen=True, tag="set_policy"):
    """Answered with ``PolicyReport``. None leaves things as they are."""

    policy: str | None = None
    trial: list[str] | None = None
    canary: tuple[str, float] | None = None
    """Policy and share of the namespaces; a share of 0 ends it."""


class SaveSnapshot(msgspec.Struct, frozen=True, tag="save"):
    """Answered with ``SnapshotDone``, after ``AdminProgress``."""

    name: str
    namespace: str = ""
    replace: bool = False


class RestoreSnapshot(msgspec.Struct, frozen=True, tag="restore"):
    """Answered with ``SnapshotDone``, after ``AdminProgress``."""

    name: str


AdminOp = (
    ReadStats
    | ListPrefixes
    | LookUpPrefix
    | PinPrefix
    | UnpinPrefix
    | SetLifetime
    | ReleasePrefix
    | EvictPrefixes
    | ClearCache
    | DescribePolicy
    | SetPolicy
    | SaveSnapshot
    | RestoreSnapshot
)


class AdminCall(msgspec.Struct, frozen=True, tag="admin"):
    """Carry out one operation. ``key`` is drawn by the front end and never reused."""

    key: int
    op: AdminOp


class CancelAdmin(msgspec.Struct, frozen=True, tag="cancel_admin"):
    """Nobody waits for this call any more: stop a long operation at the next object."""

    key: int


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Send ``CacheEvents`` from now on, or no more."""

    is_on: bool


# -- answers ------------------------------------------------------------------------------------------


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
    """Prefix length from which fetching beats computing; -1: never."""
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


class AdminReply(msgspec.Struct, frozen=True, tag="admin_reply"):
    """The end of an ``AdminCall``."""

    key: int
    result: AdminResult


class AdminProgress(msgspec.Struct, frozen=True, tag="admin_progress"):
    """How far a long operation is."""

    key: int
    done_objects: int
    total_objects: int
    done_bytes: int
    skipped_objects: int


# -- events -------------------------------------------------------------------------------------------


class CacheEventKind(StrEnum):
    """What happened to a run of blocks."""

    STORED = "stored"
    EVICTED = "evicted"
    EXPIRED = "expired"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    RESTORED = "restored"
    OFFLOADED = "offloaded"


class CacheEventNote(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """One thing that happened. ``sequence`` rises by one with each."""

    sequence: int
    kind: CacheEventKind
    namespace: str
    prefix_id: str
    num_tokens: int
    num_blocks: int
    time_s: float
    cause: str = ""
    tier: str = ""


class CacheEvents(msgspec.Struct, frozen=True, tag="cache_events"):
    """Events in order. A gap in the sequence was lost in the engine: too many in one turn."""

    epoch: int
    events: list[CacheEventNote]
