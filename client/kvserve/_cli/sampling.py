"""Options about how to generate, shared by ``kvctl generate`` and ``kvctl chat``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from kvserve._cli.units import seconds
from kvserve._options import GenerateOptions

__all__ = ["add_sampling_options", "sampling_options"]

_OPTIONS: dict[str, tuple[Callable[[str], int | float | str], str, str]] = {
    "max_new_tokens": (int, "N", "at most so many tokens (default: 128)"),
    "temperature": (float, "T", "0 is greedy (default: 0)"),
    "top_k": (int, "K", "draw from the K likeliest tokens"),
    "top_p": (float, "P", "draw from the likeliest tokens that hold probability P"),
    "min_p": (float, "P", "leave out tokens less likely than P times the likeliest"),
    "repetition_penalty": (float, "X", "above 1: discourage tokens that occurred"),
    "seed": (int, "SEED", "same seed, same tokens"),
    "lifetime_s": (seconds, "TIME", "how long what this leaves in the cache may be reused: 90s, 10m, 2h"),
    "priority": (int, "N", "higher is served earlier, -100 to 100"),
    "model": (str, "NAME", "which of the served models"),
}
_CACHE_SWITCHES = {
    "read_prefix": ("--no-prefix-read", "reuse nothing that earlier calls left"),
    "write_prefix": ("--no-prefix-write", "leave nothing behind for later calls"),
    "kv_cache": ("--no-kv-cache", "recompute everything in every step: the reference, slow"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; those not given stay absent, so that the server's defaults hold."""
    group = parser.add_argument_group("generation")
    for name, (value_type, metavar, help_text) in _OPTIONS.items():
        flag = "--" + name.removesuffix("_s").replace("_", "-")
        group.add_argument(flag, dest=name, type=value_type, metavar=metavar, help=help_text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text, which is left out; may be repeated"
    )
    for name, (flag, help_text) in _CACHE_SWITCHES.items():
        group.add_argument(flag, dest=name, action="store_const", const=False, help=help_text)


def sampling_options(parsed: argparse.Namespace) -> GenerateOptions:
    """Return what was given, as arguments of ``generate``."""
    options = GenerateOptions()
    for name in (*_OPTIONS, *_CACHE_SWITCHES, "stop"):
        value = getattr(parsed, name)
        if value is not None:
            options[name] = value  # type: ignore[literal-required]
    return options
