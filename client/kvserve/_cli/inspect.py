"""``kvctl tokenize``, ``info`` and ``health``: look without generating."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

import kvserve
from kvserve._cli.exits import EXIT_NOT_SERVING
from kvserve._cli.output import note, say, write_json

__all__ = ["add_parser"]


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the three subcommands."""
    tokenize = subparsers.add_parser(
        "tokenize",
        parents=[common],
        allow_abbrev=False,
        help="turn text into token ids",
        description="Turn text into token ids, one line, as the server would for a prompt.",
    )
    tokenize.add_argument("text", help='the text; "-" reads it from standard input')
    tokenize.add_argument("--model", metavar="NAME", default="", help="which of the served models")
    tokenize.add_argument(
        "--pieces", action="store_true", help="a line for each token: its id and the text it stands for"
    )
    tokenize.set_defaults(run=_tokenize)

    info = subparsers.add_parser(
        "info",
        parents=[common],
        allow_abbrev=False,
        help="describe the served model",
        description="Describe a served model: family, size, limits, KV blocks.",
    )
    info.add_argument("--model", metavar="NAME", default="", help="which of the served models")
    info.add_argument("--json", action="store_true", help="one line of JSON")
    info.set_defaults(run=_info)

    health = subparsers.add_parser(
        "health",
        parents=[common],
        allow_abbrev=False,
        help="tell whether the server serves",
        description="Tell whether the server serves: exit code 0 if so, 3 if not.",
    )
    health.add_argument(
        "--wait", type=float, metavar="SECONDS", help="wait so long for a server that is not ready yet"
    )
    health.set_defaults(run=_health)


def _tokenize(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    text = sys.stdin.read() if parsed.text == "-" else parsed.text
    tokens = client.tokenize(text, model=parsed.model)
    if parsed.pieces:
        for token_id in tokens.token_ids:
            piece = client.detokenize([token_id], model=parsed.model, skip_special_tokens=False)
            say(f"{token_id}\t{piece!r}")
    else:
        say(" ".join(map(str, tokens.token_ids)))
    note(f"[{len(tokens.token_ids)} tokens, the model takes {tokens.max_model_length}]")
    return 0


def _info(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    info = client.model_info(model=parsed.model)
    if parsed.json:
        write_json(info)
        return 0
    names = [field.name for field in fields(info)]
    width = max(map(len, names))
    for name in names:
        value = getattr(info, name)
        shown = f"{value:,}" if name in ("num_parameters", "num_blocks", "bytes_per_block") else value
        if isinstance(value, tuple):
            shown = ", ".join(map(str, value))
        say(f"{name.replace('_', ' '):<{width}}  {shown}")
    return 0


def _health(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    if parsed.wait is not None:
        client.wait_ready(timeout_s=parsed.wait)
    status = client.check_health()
    say(status.value)
    return 0 if status is kvserve.HealthStatus.SERVING else EXIT_NOT_SERVING
