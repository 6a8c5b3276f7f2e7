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

from server.engine.admin_answers import (
    AdminErrorKind,
    AdminRefusal,
    AdminResult,
    CacheReport,
    CacheTotals,
    CanaryReport,
    DivergenceReport,
    Evicted,
    NamespaceReport,
    Pinned,
    PinReport,
    PolicyReport,
    PrefetchReport,
    PrefixEntry,
    PrefixFound,
    PrefixPage,
    SnapshotDone,
    TierReport,
    Touched,
    TrialReport,
)
from server.engine.admin_ops import (
    AdminOp,
    ClearCache,
    DescribePolicy,
    EvictPrefixes,
    ListPrefixes,
    LookUpPrefix,
    PinPrefix,
    PinType,
    PrefixRef,
    ReadStats,
    ReleasePrefix,
    RestoreSnapshot,
    SaveSnapshot,
    SetLifetime,
    SetPolicy,
    UnpinPrefix,
)

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
