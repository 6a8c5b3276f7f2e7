"""How a command is told which prefix it is about."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import kvserve

if TYPE_CHECKING:
    from kvserve._cache_options import Prefix, PrefixOptions

__all__ = ["add_prefix_arguments", "given_prefix", "prefix_options", "wanted_prefix"]


def add_prefix_arguments(parser: argparse.ArgumentParser, *, has_ids: bool = True) -> None:
    """Add the ways to name a prefix."""
    group = parser.add_argument_group("prefix")
    group.add_argument("prompt", nargs="?", help='what it says; "-" reads it from standard input')
    group.add_argument(
        "--system", metavar="TEXT", help="a chat's opening; with a prompt: that is the user's first message"
    )
    group.add_argument("--token-ids", metavar="N,N,...", help="what it says, as token ids")
    if has_ids:
        group.add_argument("--id", metavar="ID", help="its id, or at least 8 leading characters of it")


def given_prefix(parsed: argparse.Namespace) -> Prefix | None:
    """Return the prefix, or None if there is none. Raises ValueError for more than one."""
    prefix_id, is_text = getattr(parsed, "id", None), parsed.prompt is not None or parsed.system is not None
    if sum((is_text, parsed.token_ids is not None, prefix_id is not None)) > 1:
        raise ValueError("name one prefix: a prompt, --token-ids or --id")
    if prefix_id is not None:
        return kvserve.PrefixId(prefix_id)
    if parsed.token_ids is not None:
        return [int(number) for number in parsed.token_ids.replace(",", " ").split()]
    prompt: str | None = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    if parsed.system is None:
        return prompt
    messages = [kvserve.ChatMessage("system", parsed.system)]
    if prompt is not None:
        messages.append(kvserve.ChatMessage("user", prompt))
    return messages


def wanted_prefix(parsed: argparse.Namespace) -> Prefix:
    """Return the prefix. Raises ValueError unless there is exactly one."""
    prefix = given_prefix(parsed)
    if prefix is None:
        raise ValueError("name a prefix: a prompt, --system, --token-ids or --id")
    return prefix


def prefix_options(parsed: argparse.Namespace) -> PrefixOptions:
    """Return what goes with the prefix. A system message alone is an opening, and not a whole prompt."""
    options: PrefixOptions = {"model": parsed.model}
    if parsed.system is not None and parsed.prompt is None:
        options["add_generation_prompt"] = False
    return options
