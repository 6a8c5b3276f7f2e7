"""``kvctl cache stats``, ``list``, ``lookup`` and ``watch``: look, and change nothing."""

from __future__ import annotations

import argparse
import time
from itertools import islice

import kvserve
from kvserve._cli.output import harmless, note, say, table, write_json
from kvserve._cli.prefix_arguments import prefix_options, wanted_prefix
from kvserve._cli.units import show_bytes, show_rate, show_seconds
from kvserve._options import CallOptions

__all__ = ["list_prefixes", "look_up", "show_crossover", "show_pin", "show_stats", "show_tiers", "watch"]

_MAX_PAGE = 1000
_DEFAULT_PAGE = 100
_ID_CHARACTERS = 16
_PREFIX_HEADER = [
    "ID",
    "NAMESPACE",
    ">TOKENS",
    ">BLOCKS",
    ">BYTES",
    ">HITS",
    ">IDLE",
    ">AGE",
    ">TTL",
    "PIN",
    "TIERS",
    ">VALUE",
    "PREVIEW",
]


def show_stats(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Write the report."""
    report = client.cache.stats(parsed.namespace, model=parsed.model)
    if parsed.json:
        write_json(report)
        return 0
    total = report.total
    evicted = ", ".join(f"{cause} {blocks:,}" for cause, blocks in sorted(total.evicted_blocks.items()))
    lines = {
        "model": f"{report.model}, policy {report.policy}, counters cover {show_seconds(report.uptime_s)}",
        "hit rate": f"{show_rate(total.token_hit_rate)} of {total.prompt_tokens:,} prompt tokens,"
        f" {show_rate(total.request_hit_rate)} of {total.requests:,} requests",
        "reused tokens": f"{total.cached_block_tokens:,} in blocks, {total.cached_partial_tokens:,} partial,"
        f" {total.cached_tail_tokens:,} tail, {total.restored_tokens:,} restored",
        "time saved": show_seconds(total.time_saved_s),
        "blocks": f"{report.num_blocks:,}: {report.num_blocks_in_use:,} in use,"
        f" {report.num_blocks_cached:,} cached, {report.num_blocks_free:,} free",
        "cached": f"{total.entries:,} prefixes, {total.blocks:,} blocks, {show_bytes(total.bytes)}",
        "evicted blocks": f"{evicted or 'none'}; expired {total.expired_blocks:,}",
        "pinned blocks": f"soft {report.pins.soft_blocks:,} of {report.pins.soft_budget_blocks:,},"
        f" hard {report.pins.hard_blocks:,} of {report.pins.hard_budget_blocks:,}",
        **_restore_lines(report),
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        say(f"{name:<{width}}  {text}")
    if report.tiers:
        say("\n" + _tier_table(report.tiers))
        traffic = [(tier.tier, text) for tier in report.tiers if (text := _traffic(tier))]
        if traffic:
            say("\n" + table(("TIER", "TRAFFIC"), traffic))
    if report.namespaces:
        say("\n" + _namespace_table(report.namespaces))
    return 0


def _restore_lines(report: kvserve.CacheReport) -> dict[str, str]:
    """Return what restores and prefetch came to, as far as there were any."""
    lines, prefetch = {}, report.prefetch
    if report.total.restored_blocks or prefetch.restore_s:
        text = f"{report.total.restored_blocks:,} blocks"
        if prefetch.restore_s:
            hidden = show_rate(prefetch.hidden_s / prefetch.restore_s)
            text += f"; {show_seconds(prefetch.restore_s)} for waiting requests, {hidden} of it hidden"
        lines["restores"] = text
    for name, counts in (("waiting", prefetch.waiting), ("sessions", prefetch.sessions)):
        if counts.fetched_blocks:
            lines[f"prefetch, {name}"] = (
                f"{counts.fetched_blocks:,} blocks: {counts.used_blocks:,} used,"
                f" {counts.late_blocks:,} late, {counts.wasted_blocks:,} wasted"
            )
    return lines


def _traffic(tier: kvserve.TierStats) -> str:
    """Return what went in, out and wrong; what never happened is left out."""
    counts = {
        f"stored ({show_bytes(tier.stored_bytes)})": tier.stored,
        f"fetched ({show_bytes(tier.fetched_bytes)})": tier.fetched,
        "evicted": tier.evicted,
        "expired": tier.expired,
        "stores refused": tier.refused_stores,
        "stores failed": tier.store_failures,
        "quarantined": tier.quarantined,
        **{f"fetches failed: {kind}": count for kind, count in sorted(tier.failures.items())},
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _tier_table(tiers: tuple[kvserve.TierStats, ...]) -> str:
    return table(
        (
            "TIER",
            "STATE",
            ">OBJECTS",
            ">BYTES",
            ">HITS",
            ">MISSES",
            ">READ/S",
            ">WORTH IT FROM",
            "CODEC",
            "LAST FAULT",
        ),
        (
            (
                tier.tier,
                "available" if tier.is_available else "left alone",
                f"{tier.objects:,}",
                show_bytes(tier.bytes),
                f"{tier.hits:,}",
                f"{tier.misses:,}",
                show_bytes(tier.read_bytes_per_s),
                show_crossover(tier.crossover_tokens),
                _codec(tier),
                tier.last_fault,
            )
            for tier in tiers
        ),
    )


def _codec(tier: kvserve.TierStats) -> str:
    if tier.divergence is None:
        return tier.codec
    over = ", over budget" if tier.divergence.is_over_budget else ""
    return f"{tier.codec} (off by {tier.divergence.relative_l2 * 100:.2g}%{over})"


def _namespace_table(namespaces: tuple[kvserve.NamespaceStats, ...]) -> str:
    return table(
        ("NAMESPACE", "TENANT", ">BLOCKS", ">QUOTA", ">REQUESTS", ">TOKEN HITS", "POLICY"),
        (
            (
                space.namespace,
                space.tenant,
                f"{space.stats.blocks:,}",
                f"{space.quota_blocks:,}" if space.quota_blocks else "-",
                f"{space.stats.requests:,}",
                show_rate(space.stats.token_hit_rate),
                space.policy,
            )
            for space in namespaces
        ),
    )


def list_prefixes(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Write a line for each prefix."""
    if parsed.limit < 0:
        raise ValueError("--limit must be at least 0")
    listed = client.cache.prefixes(
        model=parsed.model,
        namespace=parsed.namespace,
        min_age_s=parsed.min_age,
        max_age_s=parsed.max_age,
        min_hits=parsed.min_hits,
        pinned=parsed.pinned,
        tier=parsed.tier,
        # One more than is shown, to know whether there are more.
        page_size=min(parsed.limit + 1, _MAX_PAGE) if parsed.limit else _DEFAULT_PAGE,
    )
    found = list(islice(listed, parsed.limit + 1 if parsed.limit else None))
    shown = found[: parsed.limit or None]
    if parsed.json:
        write_json({"prefixes": shown, "is_complete": len(shown) == len(found)})
        return 0
    say(
        table(
            _PREFIX_HEADER,
            map(_prefix_row, shown),
        )
    )
    if len(shown) < len(found):
        note(f"[{len(shown)} shown, there are more: --limit N]")
    return 0


def _prefix_row(info: kvserve.PrefixInfo) -> tuple[str, ...]:
    return (
        info.prefix_id.value[:_ID_CHARACTERS],
        info.tenant or info.namespace,
        f"{info.num_tokens:,}",
        f"{info.own_blocks:,}",
        show_bytes(info.own_bytes),
        f"{info.hits:,}",
        "in use" if info.in_use else show_seconds(info.idle_s),
        show_seconds(info.age_s),
        show_seconds(info.expires_in_s),
        show_pin(info),
        show_tiers(info.tiers),
        f"{info.value:.3g}",
        "" if info.preview is None else repr(info.preview),
    )


def show_pin(info: kvserve.PrefixInfo) -> str:
    """Return the kind of a pin and its rest of life."""
    if info.pin is None:
        return "-"
    return str(info.pin) + (
        "" if info.pin_expires_in_s is None else f" {show_seconds(info.pin_expires_in_s)}"
    )


def show_tiers(tiers: tuple[kvserve.TierBlocks, ...]) -> str:
    """Return where blocks are besides the device."""
    return " ".join(f"{tier.tier}:{tier.blocks}" for tier in tiers) or "-"


def show_crossover(tokens: int) -> str:
    """Return from which length on a tier is worth it."""
    return {0: "always", -1: "never", -2: "-"}.get(tokens, f"{tokens:,} tokens")


def look_up(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Write how much of a prompt is cached."""
    found = client.cache.lookup(wanted_prefix(parsed), **prefix_options(parsed))
    if parsed.json:
        write_json(found)
        return 0
    say(
        f"{found.cached_tokens:,} of {found.prompt_tokens:,} tokens on the device"
        f" ({found.cached_block_tokens:,} in blocks, {found.cached_partial_tokens:,} partial)"
        + (", nothing to compute" if found.is_exact else "")
    )
    if found.tiers:
        say(f"more in tiers, in blocks: {show_tiers(found.tiers)}")
    if found.prefix_id is not None:
        say(f"id {found.prefix_id}")
    return 0


def watch(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Write a line for each event, for as long as --timeout says."""
    options: CallOptions = {"model": parsed.model}
    if "timeout" in parsed:
        options["timeout_s"] = parsed.timeout
    began_s = time.monotonic()
    try:
        with client.cache.watch(parsed.namespace, parsed.kind, **options) as events:
            for event in islice(events, parsed.count):
                _write_event(event, as_json=parsed.json)
    except kvserve.Error:
        # Whatever the call ends with when its time is over: that is the end that was asked for.
        if "timeout" not in parsed or time.monotonic() - began_s < parsed.timeout:
            raise
    return 0


def _write_event(event: kvserve.CacheEvent, *, as_json: bool) -> None:
    if as_json:
        write_json(event)
        return
    if event.num_lost:
        note(f"[{event.num_lost:,} events lost: read too slowly]")
    say(_event_line(event))


def _event_line(event: kvserve.CacheEvent) -> str:
    if event.kind is kvserve.CacheEventKind.RESET:
        return f"{event.sequence:>8}  reset     the engine started again: the device's cache is empty"
    about = " ".join(text for text in (event.cause, event.tier) if text)
    what = f"{event.num_tokens:,} tokens, {event.num_blocks:,} blocks"
    line = f"{event.prefix_id or '-'}  {what:<26}  {event.namespace}  {about}"
    return f"{event.sequence:>8}  {event.kind.value:<9}  {harmless(line)}"
