"""``kvctl models reuse``, ``watch`` and ``clear-reuse``: what reuse under drift saves and risks."""

from __future__ import annotations

import argparse
import time
from itertools import islice

import kvserve
from kvserve._cli.output import harmless, note, say, table, write_json
from kvserve._cli.units import show_bytes, show_rate, show_seconds
from kvserve._options import TimeoutOptions

__all__ = ["clear_reuse", "show_reuse", "watch_reuse"]


def show_reuse(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Write what each policy is, did and risks."""
    report = client.models.reuse(parsed.name, version=parsed.version, max_keys=parsed.keys)
    if parsed.json:
        write_json(report)
        return 0
    if not report.policies:
        note(f"{report.model} {report.version} is not loaded; there is nothing to report")
    for policy in report.policies:
        say(f"policy {policy.name} of {report.model} {report.version}, {report.kind}")
        lines = _policy_lines(policy)
        width = max(map(len, lines))
        for name, text in lines.items():
            say(f"  {name:<{width}}  {text}")
        if policy.keys:
            say(_key_table(policy.keys))
    return 0


def _policy_lines(policy: kvserve.ReusePolicy) -> dict[str, str]:
    risk = policy.risk
    lines = {
        "traffic": show_rate(policy.traffic_share),
        "hit rate": f"{show_rate(policy.hit_rate)} of {policy.num_lookups:,} lookups; a hit takes"
        f" {policy.hit_s * 1000:.2f} ms, a miss {policy.miss_s * 1000:.2f} ms",
        "misses": f"{policy.num_absent:,} absent, {policy.num_expired:,} expired,"
        f" {policy.num_stopped:,} stopped, {policy.num_uncertified:,} uncertified",
        "entries": f"{policy.num_entries:,} of {policy.max_entries:,}, {show_bytes(policy.num_bytes)},"
        f" {policy.num_evicted:,} evicted",
        "lifetime": _lifetime(policy),
        "changed": _interval(risk.changed, policy.max_changed, as_rate=True),
        "cosine distance": _interval(risk.cosine_distance, policy.max_cosine_distance),
        "l2": _interval(risk.l2, policy.max_l2),
        "verdict": _verdict(risk),
        "alarms": f"{policy.num_alarms:,}; {policy.num_stopped_keys:,} keys stopped",
    }
    if policy.num_key_features:
        width = f", in bins of {policy.bin_width:g}" if policy.bin_width else ""
        lines["key"] = f"the first {policy.num_key_features} features{width}"
    if policy.threshold:
        lines["threshold"] = (
            "above 1: only exact repeats are reused yet"
            if policy.threshold > 1
            else f"{policy.threshold:.4f}"
        )
    if policy.max_error is not None:
        lines["certificate"] = f"error at most {policy.max_error:g}"
    return lines


def _lifetime(policy: kvserve.ReusePolicy) -> str:
    if policy.stopped:
        return "STOPPED: nothing is reused until comparisons show that it may be"
    if policy.lifetime_s is None:
        return "no end"
    bounds = f"{show_seconds(policy.min_lifetime_s)} to {show_seconds(policy.max_lifetime_s)}"
    return f"{show_seconds(policy.lifetime_s)}, adapts from {bounds}"


def _interval(interval: kvserve.RiskInterval, limit: float | None, *, as_rate: bool = False) -> str:
    def shown(value: float) -> str:
        return show_rate(value) if as_rate else f"{value:.3g}"

    budget = "no limit" if limit is None else f"limit {shown(limit)}"
    if not interval.weight:
        return f"nothing compared yet; {budget}"
    return f"{shown(interval.estimate)} ({shown(interval.lower)} to {shown(interval.upper)}); {budget}"


def _verdict(risk: kvserve.ReuseRisk) -> str:
    verdict = "over budget" if risk.over_budget else "proven safe" if risk.proven_safe else "not decided"
    return f"{verdict}, from {risk.num_compared:,} comparisons"


def _key_table(keys: tuple[kvserve.ReuseKey, ...]) -> str:
    return table(
        ("  KEY", ">CHANGED", ">UPPER", ">COMPARED", ">LIFETIME", ">HITS", "STATE"),
        (
            (
                key.key,
                show_rate(key.risk.changed.estimate),
                show_rate(key.risk.changed.upper),
                f"{key.risk.num_compared:,}",
                show_seconds(key.lifetime_s),
                f"{key.num_hits:,}",
                "stopped" if key.stopped else "over budget" if key.risk.over_budget else "",
            )
            for key in keys
        ),
    )


def watch_reuse(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Write a line for each event, for as long as --timeout says."""
    options: TimeoutOptions = {}
    if "timeout" in parsed:
        options["timeout_s"] = parsed.timeout
    began_s = time.monotonic()
    try:
        with client.models.watch_reuse(parsed.name, **options) as events:
            told = events if parsed.json else filter(_is_told, events)
            for event in islice(told, parsed.count):
                if parsed.json:
                    write_json(event)
                else:
                    say(_event_line(event))
    except kvserve.Error:
        # Whatever the call ends with when its time is over: that is the end that was asked for.
        if "timeout" not in parsed or time.monotonic() - began_s < parsed.timeout:
            raise
    return 0


def _is_told(event: kvserve.ReuseEvent) -> bool:
    """Write what is no event of the models beside the answer; tell whether it is one."""
    if event.kind is kvserve.ReuseEventKind.STARTED:
        note("[watching]")
    elif event.kind is kvserve.ReuseEventKind.LOST:
        note(f"[{event.num_lost:,} events lost: they came too fast]")
    else:
        return True
    return False


def _event_line(event: kvserve.ReuseEvent) -> str:
    about = f"key {event.key}" if event.key else "all keys"
    line = f"{event.kind.value:<9}  {event.model} {event.version} {event.policy}  {about}"
    if event.interval is not None:
        line += (
            f"  {event.measure} {event.interval.estimate:.3g}"
            f" ({event.interval.lower:.3g} to {event.interval.upper:.3g}), limit {event.limit:.3g}"
        )
    if event.kind is kvserve.ReuseEventKind.LIFETIME:
        line += f"  lifetime {show_seconds(event.lifetime_s)}"
    return harmless(line)


def clear_reuse(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Forget what is kept, and say how much that was."""
    num_entries = client.models.clear_reuse(parsed.name, version=parsed.version)
    if parsed.json:
        write_json({"num_entries": num_entries})
    else:
        say(f"{num_entries:,} entries forgotten")
    return 0
