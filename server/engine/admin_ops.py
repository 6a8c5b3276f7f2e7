"""Operations on an engine's cache, as the front end asks for them: validated there, one struct each."""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = [
    "AdminOp",
    "ClearCache",
    "DescribePolicy",
    "EvictPrefixes",
    "ListPrefixes",
    "LookUpPrefix",
    "PinPrefix",
    "PinType",
    "PrefixRef",
    "ReadStats",
    "ReleasePrefix",
    "RestoreSnapshot",
    "SaveSnapshot",
    "SetLifetime",
    "SetPolicy",
    "UnpinPrefix",
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
