"""``kvctl generate``: one prompt, one answer, streamed."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import kvserve
from kvserve._cli.output import note, say, stats_line, write_json
from kvserve._cli.sampling import add_sampling_options, sampling_options

__all__ = ["add_parser"]


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        parents=[common],
        allow_abbrev=False,
        help="continue a prompt",
        description="Continue a prompt. The text is written as it arrives.",
    )
    parser.add_argument("prompt", help='the prompt; "-" reads it from standard input')
    parser.add_argument("--system", metavar="TEXT", help="put the prompt as a chat message after this one")
    parser.add_argument(
        "--n", type=int, metavar="N", help="samples; more than one are written when all ended"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: also of the N likeliest tokens"
    )
    add_sampling_options(parser)
    shape = parser.add_argument_group("output")
    shape.add_argument(
        "--stats", action="store_true", help="tokens, cached tokens and times, on standard error"
    )
    shape.add_argument("--json", action="store_true", help="write the whole answer as one line of JSON")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    prompt: str | None = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    options = sampling_options(parsed)
    if parsed.system is not None:
        options["messages"] = [
            {"role": "system", "content": parsed.system},
            {"role": "user", "content": prompt or ""},
        ]
        prompt = None
    if parsed.n is not None:
        options["n"] = parsed.n
    if parsed.logprobs is not None:
        options["logprobs"] = parsed.logprobs
    is_streamed = not parsed.json and (parsed.n or 1) == 1
    opened_at_s = time.perf_counter()
    with client.generate(prompt, **options) as stream:
        for event in stream:
            if is_streamed:
                say(event.text, end="")
    result = stream.result
    elapsed_s = time.perf_counter() - opened_at_s
    if parsed.json:
        write_json(result)
    elif is_streamed:
        say("")
    else:
        for sample in result.samples:
            say(f"[{sample.index}] {sample.text}")
    if parsed.stats:
        note(stats_line(result, first_token_s=stream.first_token_s, elapsed_s=elapsed_s))
    return 0
