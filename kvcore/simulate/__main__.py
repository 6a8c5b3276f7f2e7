"""The command line of the simulator. Exit codes: 0, or 2 for wrong flags and unreadable traces."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvcore.policies import ALIASES, POLICIES
from kvcore.simulate.optimal import OPTIMAL, OptimalPolicy
from kvcore.simulate.replay import Half, SimulationResult, simulate
from kvcore.simulate.traces import TraceError, read_trace

DEFAULT_CAPACITY_TOKENS = 3_000_000
MAX_CAPACITY_TOKENS = 1 << 50


def descriptions() -> dict[str, str]:
    """Return every name that ``--policy`` takes, with a line about it."""
    aliases = {alias: f"the same as {name}" for alias, name in ALIASES.items()}
    return {**POLICIES, **aliases, OPTIMAL: OptimalPolicy.description}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m kvcore.simulate", description=__doc__)
    parser.add_argument("trace", nargs="?", type=Path, help="a trace of lines, a session file, or a folder")
    parser.add_argument("--policy", action="append", help="names, comma separated; 'list' tells them")
    parser.add_argument("--capacity-tokens", action="append", help="sizes of the cache, comma separated")
    parser.add_argument("--half", choices=[half.value for half in Half], default=Half.BOTH.value)
    parser.add_argument("--ttl-s", type=positive, help="lifetime of an entry from its insertion")
    parser.add_argument("--block-tokens", type=count, help="what one id stands for (lines: 512)")
    parser.add_argument("--json", action="store_true", help="a JSON object, or a list of several")
    flags = parser.parse_args(arguments)
    policies = split(flags.policy or ["lru"])
    if policies == ["list"]:
        told = descriptions()
        show(json.dumps(told, indent=2) if flags.json else table(list(told.items())))
        return 0
    unknown = [name for name in policies if name not in descriptions()]
    if unknown:
        parser.error(f"no policy is called {unknown[0]!r}; there are: {', '.join(descriptions())}")
    if flags.trace is None:
        parser.error("which trace? give a file or a folder")
    try:
        sizes = [count(text) for text in split(flags.capacity_tokens or [str(DEFAULT_CAPACITY_TOKENS)])]
        trace = read_trace(flags.trace, block_tokens=flags.block_tokens)
        gc.disable()  # ghosts that go leave no cycles behind: walking the trace again and again finds nothing
        results = [
            simulate(
                trace,
                name,
                capacity_tokens=size,
                timer=time.perf_counter,
                half=Half(flags.half),
                lifetime_s=flags.ttl_s,
            )
            for size in sizes
            for name in policies
        ]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --capacity-tokens: {error}")
    except (TraceError, ValueError) as error:
        parser.error(str(error))
    if flags.json:
        shown = [rounded(result) for result in results]
        show(json.dumps(shown[0] if len(shown) == 1 else shown))
    else:
        header = ("capacity", "policy", "token hits %", "request hits %", "evicted", "events/s")
        show(table([header, *map(row, results)]))
    return 0


def show(text: str) -> None:
    """Write to standard output."""
    sys.stdout.write(text + "\n")


def split(texts: Sequence[str]) -> list[str]:
    """Return the parts of texts with commas."""
    return [part.strip() for text in texts for part in text.split(",")]


def count(text: str) -> int:
    """Parse a number of tokens; 3e6 and 3_000_000 are fine."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1 <= number <= MAX_CAPACITY_TOKENS or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens (a whole number from 1)")
    return int(number)


def positive(text: str) -> float:
    """Parse a number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def rounded(result: SimulationResult) -> dict[str, object]:
    """Return a result as JSON has it."""
    shown = asdict(result)
    for name in ("token_hit_rate", "request_hit_rate"):
        shown[name] = round(shown[name], 3)
    shown["events_per_s"] = round(result.events_per_s)
    return shown


def row(result: SimulationResult) -> tuple[str, ...]:
    """Return a result as a line of the table."""
    return (
        f"{result.capacity_tokens:,}",
        result.policy,
        f"{result.token_hit_rate:.2f}",
        f"{result.request_hit_rate:.2f}",
        f"{result.num_evicted:,}",
        f"{result.events_per_s:,.0f}",
    )


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Align the columns of rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
