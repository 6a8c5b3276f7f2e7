"""``kvctl cache warm``, ``pin``, ``evict`` and their like: change what is cached."""

from __future__ import annotations

import argparse
import re

import kvserve
from kvserve._cache_options import ClearOptions, EvictOptions, SaveOptions, WarmOptions
from kvserve._cli.confirm import confirm
from kvserve._cli.exits import EXIT_FAILED, exit_code_of
from kvserve._cli.output import complain, describe_error, note, say, table, write_json
from kvserve._cli.prefix_arguments import given_prefix, prefix_options, wanted_prefix
from kvserve._cli.steps import follow
from kvserve._cli.units import show_bytes, show_rate, show_seconds

__all__ = ["clear", "evict", "pin", "policy", "release", "restore", "save", "set_lifetime", "unpin", "warm"]


def warm(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Compute a prefix ahead."""
    if parsed.pin_lifetime is not None and parsed.pin is None:
        raise ValueError("--pin-lifetime needs --pin")
    options: WarmOptions = {
        **prefix_options(parsed),
        "lifetime_s": parsed.lifetime,
        "pin": parsed.pin,
        "pin_lifetime_s": parsed.pin_lifetime,
    }
    done = follow(client.cache.warm(wanted_prefix(parsed), **options), _warm_line, as_json=parsed.json)
    if not parsed.json:
        say(f"{_warm_line(done)}\nid {done.prefix_id or '-'}")
    return 0


def _warm_line(step: kvserve.WarmProgress) -> str:
    return (
        f"{step.num_tokens:,} tokens: {step.cached_tokens:,} cached before, {step.computed_tokens:,} computed"
        f" in {show_seconds(step.elapsed_s)}"
    )


def pin(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Pin a prefix."""
    held = client.cache.pin(wanted_prefix(parsed), parsed.kind, parsed.lifetime, **prefix_options(parsed))
    if parsed.json:
        write_json(held)
    else:
        until = "until unpinned" if parsed.lifetime is None else f"for {show_seconds(parsed.lifetime)}"
        say(
            f"{held.num_tokens:,} tokens, {held.num_blocks:,} blocks pinned {parsed.kind} {until}"
            f" ({held.newly_pinned_blocks:,} newly)\nid {held.prefix_id}"
        )
    return 0


def unpin(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """End a pin."""
    was_pinned = client.cache.unpin(wanted_prefix(parsed), **prefix_options(parsed))
    if parsed.json:
        write_json({"was_pinned": was_pinned})
    else:
        say("unpinned" if was_pinned else "was not pinned")
    return 0


def set_lifetime(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Change when a prefix expires."""
    reached = client.cache.set_lifetime(wanted_prefix(parsed), parsed.expire_in, **prefix_options(parsed))
    if parsed.json:
        write_json(reached)
    else:
        end = "has no end" if parsed.expire_in is None else f"ends in {show_seconds(parsed.expire_in)}"
        say(f"{reached.num_blocks:,} blocks: their lifetime {end}\nid {reached.prefix_id}")
    return 0


def release(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Say that a prefix is not needed any more."""
    num_blocks = client.cache.release(wanted_prefix(parsed), **prefix_options(parsed))
    if parsed.json:
        write_json({"num_blocks": num_blocks})
    else:
        say(f"{num_blocks:,} blocks go first when room is wanted")
    return 0


def evict(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Evict a part of the cache. Without a prefix it may be most of it: asks first."""
    prefix = given_prefix(parsed)
    if prefix is None and not parsed.namespace and parsed.min_idle is None:
        raise ValueError(
            "say what to evict: a prefix, --namespace or --min-idle; `kvctl cache clear` evicts all"
        )
    if prefix is None:
        where = "in all namespaces" if parsed.namespace is None else f"in namespace {parsed.namespace}"
        idle = "" if parsed.min_idle is None else f" that was idle for {show_seconds(parsed.min_idle)}"
        if not confirm(parsed, f"Evict everything {where}{idle}?"):
            return _left()
    options: EvictOptions = {
        **prefix_options(parsed),
        "namespace": parsed.namespace,
        "min_idle_s": parsed.min_idle,
        "in_use": parsed.in_use,
        "tiers": not parsed.keep_tiers,
    }
    return _report_evicted(parsed, client.cache.evict(prefix, **options))


def clear(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Evict everything; asks first."""
    if not confirm(parsed, f"Evict everything from the cache of {client.target}?"):
        return _left()
    options: ClearOptions = {"model": parsed.model, "in_use": parsed.in_use, "tiers": not parsed.keep_tiers}
    return _report_evicted(parsed, client.cache.clear(**options))


def _left() -> int:
    note("[nothing evicted]")
    return EXIT_FAILED


def _report_evicted(parsed: argparse.Namespace, gone: kvserve.EvictResult) -> int:
    if parsed.json:
        write_json(gone)
    else:
        say(
            f"{gone.evicted_blocks:,} blocks evicted, {gone.kept_blocks:,} kept because they are held,"
            f" {gone.evicted_objects:,} objects removed from tiers"
        )
    return 0


def policy(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Show the policy, after changing it if asked."""
    if parsed.set is None and parsed.trial is None and parsed.canary is None:
        report = client.cache.policy(model=parsed.model)
    else:
        trial = None if parsed.trial is None else [name for name in parsed.trial.split(",") if name]
        canary = None if parsed.canary is None else _canary(parsed.canary)
        report = client.cache.set_policy(parsed.set, trial=trial, canary=canary, model=parsed.model)
    if parsed.json:
        write_json(report)
        return 0
    say(f"policy {report.policy}")
    if report.canary is not None:
        canary_now = report.canary
        say(
            f"canary {canary_now.policy}: {canary_now.namespaces} namespaces ({show_rate(canary_now.share)}),"
            f" token hit rate {show_rate(canary_now.token_hit_rate)}"
            f" beside {show_rate(canary_now.live_token_hit_rate)}"
        )
    if report.trial:
        rows = (
            (
                result.policy,
                show_rate(result.token_hit_rate),
                show_rate(result.request_hit_rate),
                f"{result.requests:,}",
                show_rate(result.sampled_share),
                show_rate(result.cost_share),
            )
            for result in report.trial
        )
        header = ("TRIAL", ">TOKEN HITS", ">REQUEST HITS", ">REQUESTS", ">SAMPLED", ">COST")
        say("\n" + table(header, rows))
    say(
        "\n"
        + table(("AVAILABLE", "DESCRIPTION"), ((each.name, each.description) for each in report.available))
    )
    return 0


def _canary(text: str) -> tuple[str, float]:
    """Read what the server's own flag takes, too."""
    found = re.fullmatch(r"([^:=]+):(\d+(?:\.\d+)?)(%?)", text, re.ASCII)
    if found is None:
        raise ValueError(f"--canary must be a policy and a share, such as arc:10%; not {text!r}")
    return found[1], float(found[2]) / (100 if found[3] else 1)


def save(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Save a snapshot."""
    options: SaveOptions = {"model": parsed.model, "namespace": parsed.namespace, "replace": parsed.replace}
    try:
        return _follow_snapshot(parsed, client.cache.save_snapshot(parsed.name, **options), "saved")
    except kvserve.AlreadyExists as error:
        complain(f"{describe_error(error, target=None)}; --replace takes its place")
        return exit_code_of(error)


def restore(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Restore a snapshot."""
    return _follow_snapshot(
        parsed, client.cache.restore_snapshot(parsed.name, model=parsed.model), "restored"
    )


def _follow_snapshot(
    parsed: argparse.Namespace, work: kvserve.Progress[kvserve.SnapshotProgress], verb: str
) -> int:
    def describe(step: kvserve.SnapshotProgress) -> str:
        return (
            f"{step.done_objects:,} of {step.total_objects:,} objects {verb}, {show_bytes(step.done_bytes)},"
            f" {step.skipped_objects:,} left out, {show_seconds(step.elapsed_s)}"
        )

    done = follow(work, describe, as_json=parsed.json)
    if not parsed.json:
        say(describe(done))
    return 0
