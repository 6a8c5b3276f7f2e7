"""``kvctl models``: list, load and unload the server's models."""

from __future__ import annotations

import argparse
from typing import Any

import kvserve
from kvserve._cli.output import say, table, write_json
from kvserve._cli.steps import follow
from kvserve._cli.units import seconds, show_bytes, show_seconds

__all__ = ["add_parser"]


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand and those below it."""
    parser = subparsers.add_parser(
        "models",
        allow_abbrev=False,
        help="list, load and unload models",
        description="List, load and unload the models that the server was started with.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
        verb: argparse.ArgumentParser = verbs.add_parser(
            name,
            parents=[common],
            allow_abbrev=False,
            help=help_text,
            description=f"{help_text.capitalize()}.",
        )
        verb.add_argument(
            "--json", action="store_true", help="write JSON; a line for each step of a long call"
        )
        verb.set_defaults(run=run)
        return verb

    add("list", _list, "describe all models, loaded or not")
    add("load", _load, "load a model").add_argument("name", help="the model's name")
    unload = add("unload", _unload, "unload a model")
    unload.add_argument("name", help="the model's name")
    unload.add_argument(
        "--drain", type=seconds, metavar="TIME", help="let running requests finish first, so long"
    )


def _list(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    models = client.models.list()
    if parsed.json:
        write_json({"models": models})
        return 0
    say(
        table(
            ("NAME", "STATE", "KIND", ">PARAMETERS", ">KV", ">RUNNING", "FAULT"),
            (
                (
                    model.name,
                    model.state.value,
                    model.kind,
                    f"{model.num_parameters:,}",
                    show_bytes(model.kv_bytes),
                    str(model.running_requests),
                    model.fault,
                )
                for model in models
            ),
        )
    )
    return 0


def _load(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    done = follow(
        client.models.load(parsed.name),
        lambda step: f"{step.status.name}: {step.status.state}, {show_seconds(step.elapsed_s)}",
        as_json=parsed.json,
    )
    if not parsed.json:
        say(f"{done.status.name} is {done.status.state} after {show_seconds(done.elapsed_s)}")
    return 0


def _unload(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    status = client.models.unload(parsed.name, drain_s=parsed.drain)
    if parsed.json:
        write_json(status)
    else:
        say(f"{status.name} is {status.state}")
    return 0
