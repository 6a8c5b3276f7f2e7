"""From a sample and a view to one frame of ``kvctl cache top``. The only place that draws with rich."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import kvserve
from kvserve._cli.cache_looking import show_pin, show_tiers
from kvserve._cli.output import harmless
from kvserve._cli.top_view import Sample, View, recent_rates
from kvserve._cli.units import show_bytes, show_rate, show_seconds

__all__ = ["render"]

_OVERHEAD_LINES = 8
"""Lines of a frame that are no rows: four above the table, blanks, its header, the keys."""
_MIN_PREVIEW = 12
_KEYS = "q quit   s sort   p pause   f filter"


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table. Where not all fit, those with the highest ``rank`` are left out."""

    name: str
    width: int
    rank: int
    cell: Callable[[kvserve.PrefixInfo], str]
    is_number: bool = True


_COLUMNS = (
    _Column("ID", 12, 0, lambda info: info.prefix_id.value[:12], is_number=False),
    _Column("NAMESPACE", 12, 4, lambda info: info.tenant or info.namespace, is_number=False),
    _Column("TOKENS", 8, 1, lambda info: f"{info.num_tokens:,}"),
    _Column("BLOCKS", 7, 9, lambda info: f"{info.own_blocks:,}"),
    _Column("BYTES", 9, 5, lambda info: show_bytes(info.own_bytes)),
    _Column("HITS", 7, 2, lambda info: f"{info.hits:,}"),
    _Column("IDLE", 7, 3, lambda info: "in use" if info.in_use else show_seconds(info.idle_s)),
    _Column("AGE", 7, 8, lambda info: show_seconds(info.age_s)),
    _Column("TTL", 7, 7, lambda info: show_seconds(info.expires_in_s)),
    _Column("PIN", 11, 10, show_pin, is_number=False),
    _Column("TIERS", 16, 11, lambda info: show_tiers(info.tiers), is_number=False),
    _Column("VALUE", 8, 1, lambda info: f"{info.value:.3g}"),
)


def render(
    sample: Sample, before: Sample | None, view: View, *, width: int, height: int, fault: str = ""
) -> RenderableType:
    """Draw a frame of at most ``height`` lines, unless the view names a number of rows.

    ``before`` is the previous sample, for the hit rates since then; ``fault`` says why there is no newer one.
    """
    report = sample.report
    num_tiers = 1 if report.tiers else 0
    rows = view.rows(sample, max(height - _OVERHEAD_LINES - num_tiers, 1))
    parts: list[RenderableType] = [
        _title(report, view, fault),
        _hit_rates(sample, before),
        _memory(report, width),
    ]
    if report.tiers:
        parts.append(_tiers(report.tiers))
    parts += [Text(""), _table(rows, view, width), Text(""), _footer(view)]
    return Group(*parts)


def _line(*pieces: str | tuple[str, str]) -> Text:
    return Text.assemble(*pieces, no_wrap=True, overflow="ellipsis")


def _title(report: kvserve.CacheReport, view: View, fault: str) -> Text:
    line = _line(
        ("cache of ", "dim"),
        (harmless(report.model), "bold"),
        ("   policy ", "dim"),
        harmless(report.policy),
        ("   up ", "dim"),
        show_seconds(report.uptime_s),
        ("   prefixes ", "dim"),
        f"{report.total.entries:,}",
    )
    if view.filter_text:
        line.append(f"   only {harmless(view.filter_text)}", "cyan")
    if view.is_paused:
        line.append("   paused", "yellow")
    if fault:
        line.append(f"   {harmless(fault)}", "red")
    return line


def _hit_rates(sample: Sample, before: Sample | None) -> Text:
    total, recent = sample.report.total, recent_rates(before, sample)
    return _line(
        ("hits     ", "dim"),
        "tokens ",
        (show_rate(total.token_hit_rate), "green"),
        f" (now {show_rate(recent.tokens)})   requests ",
        (show_rate(total.request_hit_rate), "green"),
        f" (now {show_rate(recent.requests)})   saved {show_seconds(total.time_saved_s)}",
    )


def _memory(report: kvserve.CacheReport, width: int) -> Text:
    num_blocks = max(report.num_blocks, 1)
    bar = max(min(width - 70, 60), 10)
    in_use = round(bar * report.num_blocks_in_use / num_blocks)
    held = round(bar * (report.num_blocks_in_use + report.num_blocks_cached) / num_blocks)
    return _line(
        ("memory   ", "dim"),
        ("█" * in_use, "red"),
        ("▓" * (held - in_use), "blue"),
        ("░" * (bar - held), "dim"),
        f" {report.num_blocks_in_use:,} in use, {report.num_blocks_cached:,} cached,"
        f" {report.num_blocks_free:,} free of {report.num_blocks:,} blocks"
        f" ({show_bytes(report.num_blocks * report.bytes_per_block)})",
    )


def _tiers(tiers: tuple[kvserve.TierStats, ...]) -> Text:
    line = _line(("tiers    ", "dim"))
    for position, tier in enumerate(tiers):
        line.append("   " if position else "")
        line.append(harmless(tier.tier), "bold")
        line.append(f" {show_bytes(tier.bytes)}, {tier.hits:,} hits of {tier.hits + tier.misses:,}")
        if not tier.is_available:
            line.append(f" left alone {harmless(tier.last_fault)}".rstrip(), "red")
    return line


def _table(rows: list[kvserve.PrefixInfo], view: View, width: int) -> Table:
    columns, preview_width = _fitting(width)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="reverse", expand=False)
    for column in columns:
        name = f"{column.name}▼" if column.name == view.sort else column.name
        table.add_column(
            name,
            justify="right" if column.is_number else "left",
            width=column.width,
            no_wrap=True,
            overflow="ellipsis",
        )
    if preview_width:
        table.add_column("PREVIEW", width=preview_width, no_wrap=True, overflow="ellipsis")
    for info in rows:
        cells = [Text(harmless(column.cell(info))) for column in columns]
        if preview_width:
            cells.append(Text(harmless(info.preview or ""), style="dim"))
        table.add_row(*cells, style="bold" if info.in_use else "")
    return table


def _fitting(width: int) -> tuple[list[_Column], int]:
    """Return the columns that fit, and what is left for the preview; 0: no preview."""
    chosen: list[_Column] = []
    left = width
    for column in sorted(_COLUMNS, key=lambda column: column.rank):
        if column.width + 1 > left:
            break
        chosen.append(column)
        left -= column.width + 1
    return [column for column in _COLUMNS if column in chosen], left if left >= _MIN_PREVIEW else 0


def _footer(view: View) -> Text:
    if view.typed is not None:
        return _line(("namespace or tenant: ", "cyan"), view.typed, ("▏  Enter: filter   Esc: back", "dim"))
    return _line((_KEYS, "dim"), (f"   by {view.sort.lower()}", "dim"))
