"""The command ``loadgen``: play a workload against a server and say how it went."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

import kvserve
from loadgen.arrivals import Arrivals, ClosedLoop, OpenLoop
from loadgen.records import Record
from loadgen.report import summary_lines
from loadgen.runner import run_load
from loadgen.summary import Summary, summarize
from loadgen.workloads import Conversation, exact_repeats, sessions, shared_prefix, unique_prompts

__all__ = ["RunReport", "main"]

WORKLOADS = ("shared-prefix", "unique", "repeat", "sessions")


class RunReport(msgspec.Struct, frozen=True):
    """What ``--json`` writes."""

    options: dict[str, str | int | float | None]
    summary: Summary
    records: list[Record]


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(prog="loadgen", description="Load for a kvserve server.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="play a workload",
        description="Play a workload of token ids against a server; decoding is greedy and ignores EOS.",
    )
    run.add_argument(
        "--target", default=None, metavar="HOST:PORT", help="default: KVSERVE_TARGET, then localhost:50051"
    )
    run.add_argument("--workload", choices=WORKLOADS, default="shared-prefix")
    run.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    run.add_argument("--vocab-size", type=int, default=None, help="default: what the server says")
    arrivals = run.add_argument_group("arrivals").add_mutually_exclusive_group()
    arrivals.add_argument("--concurrency", type=int, default=8, help="closed loop: conversations at a time")
    arrivals.add_argument("--rate", type=float, default=None, help="open loop: Poisson arrivals per second")
    sizes = run.add_argument_group("sizes")
    sizes.add_argument("--groups", type=int, default=4, help="shared-prefix: groups")
    sizes.add_argument(
        "--requests",
        type=int,
        default=8,
        help="requests per group; for other workloads, prompts or conversations",
    )
    sizes.add_argument("--shared", type=int, default=512, help="shared-prefix, sessions: tokens in common")
    sizes.add_argument("--own", type=int, default=32, help="tokens of a request (or turn) of its own")
    sizes.add_argument("--new", type=int, default=64, help="tokens to generate")
    sizes.add_argument("--repeats", type=int, default=4, help="repeat: how often each prompt comes again")
    sizes.add_argument("--turns", type=int, default=4, help="sessions: turns of a conversation")
    sizes.add_argument("--think", type=float, default=0.0, help="sessions: seconds between turns")
    run.add_argument("--connections", type=int, default=1, help="connections to spread the calls over")
    run.add_argument("--timeout", type=float, default=None, help="seconds until a call is given up")
    run.add_argument("--json", type=Path, default=None, metavar="FILE", help="write everything there")
    return parser


def make_workload(options: argparse.Namespace, vocab_size: int) -> list[Conversation]:
    """Return the conversations that the options describe."""
    if options.workload == "shared-prefix":
        return shared_prefix(
            num_groups=options.groups,
            requests_per_group=options.requests,
            shared_tokens=options.shared,
            own_tokens=options.own,
            new_tokens=options.new,
            vocab_size=vocab_size,
            seed=options.seed,
        )
    if options.workload == "unique":
        return unique_prompts(
            num_requests=options.requests,
            prompt_tokens=options.own,
            new_tokens=options.new,
            vocab_size=vocab_size,
            seed=options.seed,
        )
    if options.workload == "repeat":
        return exact_repeats(
            num_prompts=options.requests,
            repeats=options.repeats,
            prompt_lengths=(options.own,),
            new_tokens=options.new,
            vocab_size=vocab_size,
            seed=options.seed,
        )
    return sessions(
        num_sessions=options.requests,
        num_turns=options.turns,
        system_tokens=options.shared,
        turn_tokens=options.own,
        new_tokens=options.new,
        vocab_size=vocab_size,
        think_s=options.think,
        seed=options.seed,
    )


async def run(options: argparse.Namespace) -> RunReport:
    """Play what the options say."""
    vocab_size = options.vocab_size
    if vocab_size is None:
        async with kvserve.AsyncClient(options.target) as client:
            await client.wait_ready()
            vocab_size = (await client.model_info()).vocab_size
    arrivals: Arrivals
    if options.rate is None:
        arrivals = ClosedLoop(options.concurrency)
    else:
        arrivals = OpenLoop(options.rate, options.seed)
    records = await run_load(
        options.target,
        make_workload(options, vocab_size),
        arrivals,
        num_connections=options.connections,
        timeout_s=options.timeout,
    )
    shown = {name: value for name, value in vars(options).items() if name not in ("command", "json")}
    return RunReport(shown, summarize(records), records)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if every request ended well, 1 if some failed, 2 if there was no server."""
    options = make_parser().parse_args(arguments)
    try:
        report = asyncio.run(run(options))
    except kvserve.Error as error:
        print(f"loadgen: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"loadgen: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for line in summary_lines(report.summary):
        print(line)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return 1 if report.summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
