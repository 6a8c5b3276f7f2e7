"""What ``kvctl cache top`` knows: samples of the cache, and what the user wants to see of them. No terminal.

::

    server --take_sample--> Sample --+
                                     +--> top_frame.render --> a frame
    keys ----------View.press--> View +
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import kvserve

__all__ = ["SORTS", "HitRates", "Sample", "View", "matches", "recent_rates", "take_sample"]

_FETCHED = 200
"""Entries that are fetched at the least: what another order than the server's is made of."""
_SEARCHED = 2000
"""Entries that are looked through for those of a filter that more than one namespace matches."""
_POLL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server said at one time."""

    report: kvserve.CacheReport
    prefixes: tuple[kvserve.PrefixInfo, ...]
    at_s: float


@dataclass(frozen=True, slots=True)
class HitRates:
    """Over some time; None where nothing was asked in it."""

    tokens: float | None
    requests: float | None


SORTS: dict[str, Callable[[kvserve.PrefixInfo], float]] = {
    "VALUE": lambda info: -info.value,
    "TOKENS": lambda info: -info.num_tokens,
    "BYTES": lambda info: -info.own_bytes,
    "HITS": lambda info: -info.hits,
    "IDLE": lambda info: info.idle_s,
    "AGE": lambda info: -info.age_s,
}
"""Orders by the column that shows them."""


@dataclass(slots=True)
class View:
    """What the user chose."""

    num_rows: int | None = None
    """None: as many as fit."""
    sort: str = "VALUE"
    filter_text: str = ""
    """Part of a namespace's id or of its tenant's name."""
    typed: str | None = None
    """The filter that is being typed; None: keys are commands."""
    is_paused: bool = False
    has_quit: bool = False

    def press(self, key: str) -> None:
        """Do what a key says."""
        if self.typed is not None:
            self._type(key)
        elif key in ("q", "Q"):
            self.has_quit = True
        elif key in ("p", "P"):
            self.is_paused = not self.is_paused
        elif key in ("s", "S"):
            names = list(SORTS)
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
        elif key in ("f", "F"):
            self.typed = ""

    def _type(self, key: str) -> None:
        typed = self.typed or ""
        if key in ("\r", "\n"):
            self.filter_text, self.typed = typed, None
        elif key == "\x1b":
            self.typed = None
        elif key in ("\x7f", "\b"):
            self.typed = typed[:-1]
        elif key.isprintable():
            self.typed = typed + key

    def rows(self, sample: Sample, fitting: int) -> list[kvserve.PrefixInfo]:
        """Return what to show, in order; at most ``fitting`` entries unless a number was chosen."""
        shown = [info for info in sample.prefixes if matches(self.filter_text, info.namespace, info.tenant)]
        return sorted(shown, key=SORTS[self.sort])[: self.num_rows or fitting]


def matches(filter_text: str, namespace: str, tenant: str) -> bool:
    """Tell whether a namespace is one of those that the filter means."""
    wanted = filter_text.lower()
    return wanted in namespace.lower() or wanted in tenant.lower()


def take_sample(
    client: kvserve.Client,
    *,
    model: str,
    filter_text: str = "",
    num_rows: int = 0,
    timeout_s: float | None = _POLL_TIMEOUT_S,
) -> Sample:
    """Ask the server. Raises ``kvserve.Error``."""
    report = client.cache.stats(model=model, timeout_s=timeout_s)
    wanted = max(_FETCHED, num_rows)
    chosen = [
        space.namespace for space in report.namespaces if matches(filter_text, space.namespace, space.tenant)
    ]
    only = chosen[0] if filter_text and len(chosen) == 1 else None
    listed = client.cache.prefixes(model=model, namespace=only, page_size=_FETCHED, timeout_s=timeout_s)
    if filter_text:
        listed = (
            info for info in islice(listed, _SEARCHED) if matches(filter_text, info.namespace, info.tenant)
        )
    return Sample(report, tuple(islice(listed, wanted)), time.monotonic())


def recent_rates(before: Sample | None, now: Sample) -> HitRates:
    """Return the hit rates between two samples; none if the counters started anew between them."""
    if before is None or now.report.uptime_s < before.report.uptime_s:
        return HitRates(None, None)
    old, new = before.report.total, now.report.total
    asked_tokens, asked_requests = new.prompt_tokens - old.prompt_tokens, new.requests - old.requests
    return HitRates(
        tokens=(new.reused_tokens - old.reused_tokens) / asked_tokens if asked_tokens > 0 else None,
        requests=(new.hits - old.hits) / asked_requests if asked_requests > 0 else None,
    )
