"""The command itself: from arguments to an exit code.

Each subcommand is a module with ``add_parser(subparsers, common)``, which sets ``run``: a function from the
parsed arguments and an open client to an exit code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import kvserve
from kvserve._cli import cache, chat, generate, inspect, models, predict
from kvserve._cli.exits import EXIT_INTERRUPTED, EXIT_USAGE, EXITS_HELP, exit_code_of
from kvserve._cli.output import complain, describe_error
from kvserve._cli.parsers import CommandParser
from kvserve._cli.units import seconds
from kvserve._config import DEFAULT_TARGET

__all__ = ["main"]

_DESCRIPTION = "Talk to a kvserve server: generate, chat, predict; see and steer its models and its cache."
_EPILOG = f"""\
examples:
  kvctl generate "Once upon a time" --max-new-tokens 64 --stats
  kvctl chat --system "You explain Python's standard library." --stats
  kvctl predict sentiment "What a day."
  kvctl cache top
  kvctl --target models.internal:50051 health

environment:
  KVSERVE_TARGET     where the server is, instead of {DEFAULT_TARGET}
  KVSERVE_API_KEY    the API key; better here than in --api-key, which other users of the machine can see

{EXITS_HELP}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``kvctl`` with these arguments, by default the process's own; return its exit code."""
    parsed = _make_parser().parse_args(arguments)
    try:
        with _connect(parsed) as client:
            code: int = parsed.run(parsed, client)
            sys.stdout.flush()
            return code
    except kvserve.Error as error:
        complain(describe_error(error, target=getattr(parsed, "target", None)))
        return exit_code_of(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Who read our output has gone (``kvctl ... | head``). Keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError) as error:  # A file that can't be read, an option that can't work.
        if isinstance(error, OSError) and error.filename is not None:
            complain(f"{error.filename}: {error.strerror}")
        else:
            complain(str(error))
        return EXIT_USAGE


def _connect(parsed: argparse.Namespace) -> kvserve.Client:
    """Open the client that the global options describe."""
    given = vars(parsed)
    options = kvserve.ClientOptions()
    if "api_key" in given:
        options["api_key"] = parsed.api_key
    if "timeout" in given:
        options["timeout_s"] = parsed.timeout
    if "ca_file" in given:
        options["tls"] = kvserve.Tls(ca_file=parsed.ca_file)
    elif "tls" in given:
        options["tls"] = kvserve.Tls()
    return kvserve.Client(given.get("target"), **options)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvctl",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvctl {kvserve.__version__}")
    _add_common(parser)
    # The same options again, for after the subcommand. Suppressed defaults keep one from undoing the other.
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_common(common)
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for command in (generate, chat, predict, inspect, cache, models):
        command.add_parser(subparsers, common)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("connection")
    unset = argparse.SUPPRESS
    group.add_argument("--target", metavar="HOST:PORT", default=unset, help="where the server is")
    group.add_argument("--api-key", metavar="KEY", default=unset, help="prefer KVSERVE_API_KEY")
    group.add_argument(
        "--timeout", type=seconds, metavar="TIME", default=unset, help="deadline of each call (default: 300s)"
    )
    group.add_argument("--tls", action="store_true", default=unset, help="encrypt the connection")
    group.add_argument(
        "--ca-file", metavar="FILE", default=unset, help="trust this authority's certificates; implies --tls"
    )
