"""The command ``kvserve``: ``kvserve serve [MODEL] [flags]``, ``kvserve --version``."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from server.config import SETTINGS, ConfigError, ServerConfig, resolve

__all__ = ["main"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_SERVE_DESCRIPTION = """\
Serve a decoder-only language model over gRPC, and beside it models that classify, embed and predict.

MODEL is "builtin" (a small model that is always there, for trying things out), a local folder, or the name of
a repository on the hub, for example Qwen/Qwen3-0.6B. Weights are read from safetensors only; remote code is
never run.
"""
_SERVE_EPILOG = """\
Every setting can also be given in the environment (KVSERVE_KV_MEMORY=4GiB) and in a YAML file (kv_memory:
4GiB); flags win over the environment, the environment over the file. Sizes: 4GiB, 500MB. Times: 30s, 10m, 2h.

examples:
  kvserve serve
  kvserve serve Qwen/Qwen3-0.6B --dtype bfloat16 --kv-memory 4GiB
  kvserve serve ./my-model --port 9000 --metrics-port 9090 --api-keys-file keys.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (2: it was called wrongly, 1: it could not do its work)."""
    parser = _parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown[0])}")
    given = vars(parsed)
    given.pop("command")
    config_file = given.pop("config", None)
    try:
        config = resolve(given, os.environ, config_file=config_file)
    except ConfigError as error:
        print(f"kvserve: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return _serve(config)


def _serve(config: ServerConfig) -> int:
    # Late: `--help` and a wrong flag need none of this.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from server.app import serve

        return serve(config)
    except KeyboardInterrupt:  # before there was a loop to take the signal
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvserve",
        description="A gRPC model server that computes a shared prefix once.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvserve {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model",
        description=_SERVE_DESCRIPTION,
        epilog=_SERVE_EPILOG,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    serve.add_argument("model", nargs="?", metavar="MODEL", help=SETTINGS["model"].help)
    serve.add_argument("--config", metavar="FILE", help="YAML file of settings")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in SETTINGS.values():
        if setting.name == "model":
            continue
        group = groups.get(setting.group)
        if group is None:
            group = groups[setting.group] = serve.add_argument_group(setting.group)
        text = setting.help.replace("%", "%%")  # argparse fills in figures of its own
        if setting.metavar:
            group.add_argument(setting.flag, dest=setting.name, metavar=setting.metavar, help=text)
        else:
            group.add_argument(setting.flag, dest=setting.name, action="store_const", const="true", help=text)
    return parser


def _hint(argument: str) -> str:
    flags = [setting.flag for setting in SETTINGS.values()]
    close = difflib.get_close_matches(argument.partition("=")[0], flags, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def _version() -> str:
    try:
        return version("kvserve-server")
    except PackageNotFoundError:
        return "0 (not installed)"


if __name__ == "__main__":
    sys.exit(main())
