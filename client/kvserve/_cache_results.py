"""What the calls about the cache return: frozen values, field for field what the contract says.

The report of ``stats`` is in ``_cache_reports``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "CacheEvent",
    "CacheEventKind",
    "CanaryInfo",
    "EvictResult",
    "LifetimeResult",
    "PinKind",
    "PinResult",
    "PolicyInfo",
    "PolicyReport",
    "PrefixId",
    "PrefixInfo",
    "PrefixLookup",
    "SnapshotProgress",
    "TierBlocks",
    "TrialResult",
    "WarmProgress",
]


@dataclass(frozen=True, slots=True, order=True)
class PrefixId:
    """Names a cached prefix: as a result gives it, or its first characters, at least 8 of them.

    Not a ``str``, so that an id is never taken for the text of a prompt.
    """

    value: str

    def __str__(self) -> str:
        return self.value


class PinKind(StrEnum):
    """How firmly a prefix is held."""

    SOFT = "soft"
    """Evicted only when nothing else can be."""
    HARD = "hard"
    """Never evicted before its time."""


# ---- looking ----


@dataclass(frozen=True, slots=True)
class TierBlocks:
    """How many blocks of a prefix a tier has."""

    tier: str
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixInfo:
    """A run of blocks without a branch, named by its end."""

    prefix_id: PrefixId
    namespace: str
    tenant: str
    num_tokens: int
    """Of the whole prefix."""
    own_tokens: int
    """Of the run that is this entry's own."""
    own_blocks: int
    own_bytes: int
    hits: int
    age_s: float
    idle_s: float
    expires_in_s: float | None
    """None: no end."""
    pin: PinKind | None
    pin_expires_in_s: float | None
    in_use: bool
    """Held by running requests."""
    has_last_logits: bool
    """A repeat of exactly this prompt needs no forward pass."""
    num_children: int
    tiers: tuple[TierBlocks, ...]
    """Where its blocks are, besides the device."""
    value: float
    """Expected seconds of computing saved per second that it stays."""
    preview: str | None
    """The last characters of the run; None for entries outside the caller's own namespace."""
    parent_id: PrefixId | None
    """None at the top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixLookup:
    """How much of a prompt is cached."""

    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    is_exact: bool
    """The last logits are kept: a repeat needs no forward pass."""
    tiers: tuple[TierBlocks, ...]
    """What would be brought back, beyond what the device has."""
    prefix_id: PrefixId | None
    """Where a pin would end: of a block with the prompt's end, or else of the last whole block, if any."""

    @property
    def cached_tokens(self) -> int:
        """Return what is on the device."""
        return self.cached_block_tokens + self.cached_partial_tokens


# ---- steering ----


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmProgress:
    """How far a prefix is; the last one is the result."""

    num_tokens: int
    computed_tokens: int
    cached_tokens: int
    done: bool
    prefix_id: PrefixId | None
    """None until it is known."""
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PinResult:
    """What a pin holds."""

    prefix_id: PrefixId
    num_blocks: int
    newly_pinned_blocks: int
    """Those that no other pin held before."""
    num_tokens: int
    """Less than the prompt's length if only its beginning is cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LifetimeResult:
    """What a new lifetime reached."""

    prefix_id: PrefixId
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictResult:
    """What was evicted."""

    evicted_blocks: int
    kept_blocks: int
    """Left because running requests or hard pins hold them."""
    evicted_objects: int
    """In tiers."""


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """A policy that the server knows."""

    name: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What a policy would have hit on sampled live traffic."""

    policy: str
    token_hit_rate: float
    request_hit_rate: float
    requests: int
    tokens: int
    sampled_share: float
    """Of the traffic that it has seen."""
    cost_share: float
    """Of the engine's time that it has taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryInfo:
    """A share of namespaces that runs another policy for real."""

    policy: str
    share: float
    namespaces: int
    token_hit_rate: float
    live_token_hit_rate: float
    """Of the namespaces that run the server's own policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyReport:
    """What decides on evictions, and what would if it were another policy."""

    policy: str
    available: tuple[PolicyInfo, ...]
    trial: tuple[TrialResult, ...]
    """The live policy's shadow is among them."""
    canary: CanaryInfo | None


# ---- watching ----


class CacheEventKind(StrEnum):
    """What happened to a run of blocks."""

    STORED = "stored"
    EVICTED = "evicted"
    EXPIRED = "expired"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    RESTORED = "restored"
    OFFLOADED = "offloaded"
    """Copied to a tier."""
    RESET = "reset"
    """The engine started again: all that was on the device is gone."""
    OTHER = "other"
    """A kind that this version of the client doesn't know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEvent:
    """One run of blocks to which one thing happened."""

    sequence: int
    """Rises by one with every event of the engine, whether this watcher gets it or not."""
    epoch: int
    """Names the engine's process; sequences start anew with it."""
    kind: CacheEventKind
    namespace: str = ""
    prefix_id: PrefixId | None = None
    """Of the deepest block concerned; None for RESET."""
    num_tokens: int = 0
    num_blocks: int = 0
    cause: str = ""
    """Of evictions: "capacity", "quota", "admin" or "released"."""
    tier: str = ""
    """Of restores and offloads."""
    num_lost: int = 0
    """Events that should have come before this one and did not: this watcher read too slowly."""
    time_s: float
    """Since the engine's start."""


# ---- snapshots ----


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotProgress:
    """How far a snapshot is; the last one is the result."""

    done_objects: int
    total_objects: int
    done_bytes: int
    skipped_objects: int
    """Left out: damaged, of another model, or without room."""
    done: bool
    elapsed_s: float
