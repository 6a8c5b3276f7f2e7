"""``kvctl cache``: see and steer the server's cache. The verbs' options; what they do is next door."""

from __future__ import annotations

import argparse
from typing import Any

import kvserve
from kvserve._cli import cache_looking, cache_steering, top
from kvserve._cli.confirm import add_yes
from kvserve._cli.prefix_arguments import add_prefix_arguments
from kvserve._cli.units import seconds

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  kvctl cache top
  kvctl cache list --min-age 10m --tier disk
  kvctl cache warm --system "You are a helpful assistant." --pin hard --pin-lifetime 2h
  kvctl cache evict --id 3fa9c1d2e4b50718 --in-use skip
  kvctl cache clear --yes

A prefix is a prompt's text, --system TEXT, --token-ids or the --id that a listing shows.
Times are 90s, 10m or 2h."""


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand and those below it."""
    parser = subparsers.add_parser(
        "cache",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="see and steer the cache",
        description="See and steer the server's cache. Where there are API keys: with the scope admin.",
        epilog=_EPILOG,
    )
    _Verbs(parser.add_subparsers(title="commands", metavar="COMMAND", required=True), common).add_all()


class _Verbs:
    """Adds the verbs: each has the connection's options, a model, and JSON."""

    def __init__(self, subparsers: Any, common: argparse.ArgumentParser) -> None:
        self._subparsers = subparsers
        self._common = common

    def add_all(self) -> None:
        self._add_looking()
        self._add_prefix_steering()
        self._add_whole_steering()

    def _add(self, name: str, run: Any, help_text: str, *, has_json: bool = True) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name,
            parents=[self._common],
            allow_abbrev=False,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
        )
        parser.add_argument("--model", metavar="NAME", default="", help="which of the served models")
        if has_json:
            parser.add_argument(
                "--json", action="store_true", help="write JSON; a line for each event or step of a long call"
            )
        parser.set_defaults(run=run)
        return parser

    def _add_looking(self) -> None:
        stats = self._add("stats", cache_looking.show_stats, "show hit rates, memory, tiers and namespaces")
        _add_namespace(stats)
        listing = self._add(
            "list", cache_looking.list_prefixes, "list cached prefixes, the most valuable first"
        )
        _add_namespace(listing)
        listing.add_argument("--min-age", type=seconds, metavar="TIME", help="at least so old")
        listing.add_argument("--max-age", type=seconds, metavar="TIME", help="at most so old")
        listing.add_argument("--min-hits", type=int, metavar="N", help="reused at least so often")
        pinned = listing.add_mutually_exclusive_group()
        pinned.add_argument(
            "--pinned", dest="pinned", action="store_const", const=True, help="only pinned ones"
        )
        pinned.add_argument(
            "--not-pinned", dest="pinned", action="store_const", const=False, help="only others"
        )
        tiers = ("device", "host", "disk", "redis")
        listing.add_argument("--tier", choices=tiers, help="only those that have blocks there")
        listing.add_argument(
            "--limit", type=int, metavar="N", default=50, help="at most so many; 0: all (default: 50)"
        )
        lookup = self._add("lookup", cache_looking.look_up, "say how much of a prompt is cached, and where")
        add_prefix_arguments(lookup)
        watch = self._add("watch", cache_looking.watch, "follow what happens to the cache, until Ctrl-C")
        _add_namespace(watch)
        kinds = [kind.value for kind in kvserve.CacheEventKind if kind is not kvserve.CacheEventKind.OTHER]
        watch.add_argument(
            "--kind", action="append", choices=kinds, default=[], help="only this kind; may be repeated"
        )
        watch.add_argument("--count", type=int, metavar="N", help="end after so many events")
        top.add_arguments(
            self._add("top", top.run, "show the cache live, as htop shows processes", has_json=False)
        )

    def _add_prefix_steering(self) -> None:
        warm = self._add(
            "warm", cache_steering.warm, "compute a prefix ahead of the requests that will need it"
        )
        add_prefix_arguments(warm, has_ids=False)
        warm.add_argument("--lifetime", type=seconds, metavar="TIME", help="how long it may be reused")
        warm.add_argument("--pin", choices=("soft", "hard"), help="pin it once it is there")
        warm.add_argument("--pin-lifetime", type=seconds, metavar="TIME", help="how long the pin holds")
        pin = self._add("pin", cache_steering.pin, "keep a cached prefix from being evicted")
        add_prefix_arguments(pin)
        pin.add_argument(
            "--kind",
            choices=("soft", "hard"),
            default="soft",
            help="soft: evicted last; hard: never (default: soft)",
        )
        pin.add_argument(
            "--lifetime", type=seconds, metavar="TIME", help="how long (default: until it is unpinned)"
        )
        add_prefix_arguments(self._add("unpin", cache_steering.unpin, "end a pin"))
        lifetime = self._add("lifetime", cache_steering.set_lifetime, "let a prefix expire, or not")
        add_prefix_arguments(lifetime)
        choice = lifetime.add_mutually_exclusive_group(required=True)
        choice.add_argument("--expire-in", type=seconds, metavar="TIME", help="from now")
        choice.add_argument("--no-end", action="store_true", help="it does not expire")
        release = self._add("release", cache_steering.release, "say that a prefix is not needed any more")
        add_prefix_arguments(release)

    def _add_whole_steering(self) -> None:
        evict = self._add(
            "evict", cache_steering.evict, "evict a prefix and what continues it, or what is idle"
        )
        add_prefix_arguments(evict)
        _add_namespace(evict)
        evict.add_argument(
            "--min-idle", type=seconds, metavar="TIME", help="only what was not used for so long"
        )
        clear = self._add("clear", cache_steering.clear, "evict everything")
        for parser in (evict, clear):
            parser.add_argument(
                "--in-use",
                choices=("fail", "skip"),
                default="fail",
                help="if a running request or a hard pin holds any of it: change nothing, or leave that",
            )
            parser.add_argument(
                "--keep-tiers", action="store_true", help="leave what is on host, disk and Redis"
            )
            add_yes(parser)
        policy = self._add("policy", cache_steering.policy, "show or change what decides on evictions")
        policy.add_argument("--set", metavar="NAME", help="change the policy")
        policy.add_argument(
            "--trial", metavar="NAME,...", help='run these in its shadow, and no others; "" ends all trials'
        )
        policy.add_argument(
            "--canary",
            metavar="NAME:SHARE",
            help="give this share of namespaces another: arc:10%%; arc:0 ends it",
        )
        save = self._add("save", cache_steering.save, "write cached prefixes to a snapshot on the server")
        save.add_argument("name", help="a plain name")
        _add_namespace(save)
        save.add_argument("--replace", action="store_true", help="replace a snapshot of this name")
        self._add("restore", cache_steering.restore, "read a snapshot back").add_argument(
            "name", help="its name"
        )


def _add_namespace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--namespace", metavar="ID", help="only this namespace, by id or by its tenant's name (default: all)"
    )
