"""Keyword arguments of the calls about the cache, written once for both clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kvserve._cache_results import PinKind, PrefixId
from kvserve._options import CallOptions, Messages

__all__ = [
    "ClearOptions",
    "EvictOptions",
    "InUse",
    "PinName",
    "Prefix",
    "PrefixFilter",
    "PrefixOptions",
    "SaveOptions",
    "WarmOptions",
]

Prefix = str | Sequence[int] | Messages | PrefixId
"""What names a prefix: text, token ids, a conversation, or the id that a result carries.

All but ids are looked up in the caller's own namespace.
"""

PinName = PinKind | Literal["soft", "hard"]

InUse = Literal["fail", "skip"]
"""What to do about blocks that running requests or hard pins hold: refuse all of it
(``FailedPrecondition``, and nothing changes), or leave those and take the rest."""


class PrefixOptions(CallOptions, total=False):
    """What every call that takes a prefix takes."""

    add_generation_prompt: bool | None
    """Whether a conversation ends with the opening of the assistant's turn. Default: True. False for a
    conversation that goes on with another message, such as a shared system prompt."""


class PrefixFilter(CallOptions, total=False):
    """Keyword arguments of ``prefixes``. None and absent: any."""

    namespace: str | None
    """An id, as results carry it."""
    min_age_s: float | None
    max_age_s: float | None
    min_hits: int | None
    pinned: bool | None
    tier: Literal["device", "host", "disk", "redis"] | None
    """Entries that have blocks there."""
    page_size: int | None
    """Entries that travel together, [1, 1000]. Default: 100."""


class WarmOptions(PrefixOptions, total=False):
    """Keyword arguments of ``warm``."""

    lifetime_s: float | None
    """How long it may be reused. Default: the server's."""
    pin: PinName | None
    """Pin it once it is there. Default: no."""
    pin_lifetime_s: float | None
    """How long the pin holds. Default: until it is unpinned."""


class ClearOptions(CallOptions, total=False):
    """Keyword arguments of ``clear``."""

    in_use: InUse
    """Default: "fail"."""
    tiers: bool
    """Also where it was brought to: host, disk, and Redis as far as it is known. Default: True."""


class EvictOptions(ClearOptions, PrefixOptions, total=False):
    """Keyword arguments of ``evict``. What is given must all hold."""

    namespace: str | None
    """An id, as results carry it."""
    min_idle_s: float | None
    """Only what was not used for at least so long."""


class SaveOptions(CallOptions, total=False):
    """Keyword arguments of ``save_snapshot``."""

    namespace: str | None
    """An id, as results carry it. Default: all."""
    replace: bool
    """Whether a snapshot of this name may be replaced. Default: False, which raises ``AlreadyExists``."""
