"""``kvctl models``: list, describe, load, unload and name the server's models."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any

import kvserve
from kvserve._cli import models_reuse
from kvserve._cli.output import harmless, note, say, table, write_json
from kvserve._cli.steps import follow
from kvserve._cli.units import seconds, show_bytes, show_rate, show_seconds
from kvserve._models_requests import LoadOptions

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  kvctl models
  kvctl models load minilm
  kvctl models load news --source hf:owner/name@0123456789abcdef0123456789abcdef01234567 --task classify
  kvctl models alias sentiment canary 2 --share 10%%
  kvctl models reuse risk --keys 5
  kvctl models watch --json"""
_BAR_WIDTH = 20


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand and those below it."""
    parser = subparsers.add_parser(
        "models",
        parents=[common],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="list, load, unload and name models; see what their reuse risks",
        description="List, load, unload and name the server's models, and see what their reuse risks.",
        epilog=_EPILOG,
    )
    parser.add_argument("--json", action="store_true", help="write JSON; a line for each event or step")
    parser.set_defaults(run=_list)
    verbs = parser.add_subparsers(title="commands (default: list)", metavar="COMMAND")

    def add(name: str, run: Any, help_text: str, *, model: str | None = "the model's name") -> Any:
        verb: argparse.ArgumentParser = verbs.add_parser(
            name,
            parents=[common],
            allow_abbrev=False,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
        )
        verb.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,  # Or it would undo the one before the verb.
            help="write JSON; a line for each event or step",
        )
        if model is not None:
            verb.add_argument("name", help=model)
        verb.set_defaults(run=run)
        return verb

    add("list", _list, "describe all models, loaded or not", model=None)
    show = add("show", _show, "describe a predict model: task, labels, limits")
    load = add("load", _load, "load a model", model="the model's name; with --source one of your choice")
    load.add_argument(
        "--source",
        metavar="SOURCE",
        help="add this version first: a folder below the model root, hf:owner/name@commit or models:/name/N",
    )
    load.add_argument("--task", help="with --source: classify, classify_tokens, regress or embed")
    load.add_argument("--pooling", help="with --source: mean, cls or last")
    unload = add("unload", _unload, "unload a model: all its versions, or one")
    unload.add_argument(
        "--drain", type=seconds, metavar="TIME", help="let running requests finish first, so long"
    )
    alias = add("alias", _alias, "let an alias such as latest or canary name a version")
    alias.add_argument("alias", help="latest, canary or any other plain name")
    alias.add_argument("version", nargs="?", help="the version; none with --remove")
    alias.add_argument("--remove", action="store_true", help="take the alias away")
    alias.add_argument(
        "--share", type=_share, metavar="SHARE", help="share of calls without a version: 10%% or 0.1"
    )
    reuse = add("reuse", models_reuse.show_reuse, "show what reuse saves and what it risks")
    reuse.add_argument("--keys", type=int, metavar="N", help="also the N keys with the highest risk")
    watch = add(
        "watch", models_reuse.watch_reuse, "follow alarms and lifetimes of reuse, until Ctrl-C", model=None
    )
    watch.add_argument("name", nargs="?", help="only this model (default: all)")
    watch.add_argument("--count", type=int, metavar="N", help="end after so many events")
    clear = add("clear-reuse", models_reuse.clear_reuse, "forget what is kept for reuse")
    unnamed = {load: "latest; with --source the next number", unload: "all", clear: "all"}
    for verb in (show, load, unload, reuse, clear):
        text = f"of a predict model, or an alias (default: {unnamed.get(verb, 'latest')})"
        verb.add_argument("--version", metavar="VERSION", help=text)


def _share(text: str) -> float:
    """Read ``10%`` or ``0.1``: the type of an option."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text, re.ASCII)
    share = float(found[1]) / (100 if found[2] else 1) if found else 2.0
    if share > 1:
        raise argparse.ArgumentTypeError(f"must be a share such as 10% or 0.1; not {text!r}")
    return share


def _list(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    models = client.models.list()
    if parsed.json:
        memory = {"predict_bytes": models.predict_bytes, "predict_memory": models.predict_memory}
        write_json({"models": models, **memory})
        return 0
    say(_status_table(models))
    if models.predict_bytes or models.predict_memory:
        limit = f" of {show_bytes(models.predict_memory)}" if models.predict_memory else ""
        note(f"[predict models take {show_bytes(models.predict_bytes)}{limit}]")
    return 0


def _status_table(models: tuple[kvserve.ModelStatus, ...]) -> str:
    return table(
        (
            "NAME",
            "STATE",
            "KIND",
            "VERSION",
            "TASK",
            ">PARAMETERS",
            ">BYTES",
            ">SHARE",
            ">RUNNING",
            ">REQUESTS",
            ">IDLE",
            "ALIASES",
            "SOURCE",
            "FAULT",
        ),
        (
            (
                model.name,
                model.state.value,
                model.kind,
                model.version or "-",
                model.task or "-",
                f"{model.num_parameters:,}" if model.num_parameters else "-",
                show_bytes(model.kv_bytes or model.num_bytes),
                show_rate(model.traffic_share) if model.traffic_share else "-",
                f"{model.running_requests:,}",
                f"{model.num_requests:,}" if model.num_requests else "-",
                show_seconds(model.idle_s),
                ", ".join(model.aliases) or "-",
                model.source_kind or "-",
                model.fault,
            )
            for model in models
        ),
    )


def _show(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    info = client.predict_model(parsed.name, version=parsed.version)
    if parsed.json:
        write_json(info)
        return 0
    names = [field.name for field in fields(info)]
    width = max(map(len, names))
    for name in names:
        value = getattr(info, name)
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, tuple):
            shown = ", ".join(value)
        elif name == "num_bytes":
            shown = show_bytes(value)
        else:
            shown = f"{value:,}" if isinstance(value, int) else value or "-"
        say(f"{name.replace('_', ' '):<{width}}  {shown or '-'}")
    return 0


def _load(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    options: LoadOptions = {
        "version": parsed.version,
        "source": parsed.source,
        "task": parsed.task,
        "pooling": parsed.pooling,
    }
    # It may take as long as it takes: somebody watches it, or has said for how long.
    options["timeout_s"] = getattr(parsed, "timeout", None)
    done = follow(client.models.load(parsed.name, **options), _load_line, as_json=parsed.json)
    if not parsed.json:
        say(f"{_name_of(done.status)} is {done.status.state} after {show_seconds(done.elapsed_s)}")
    return 0


def _load_line(step: kvserve.LoadProgress) -> str:
    """Return how far a load is, with a bar where it is known how far it has to go."""
    line = f"{_name_of(step.status)}: {harmless(step.phase) or step.status.state}"
    if step.total_bytes:
        share = min(1.0, step.done_bytes / step.total_bytes)
        bar = "#" * int(share * _BAR_WIDTH)
        line += (
            f" [{bar:.<{_BAR_WIDTH}}] {share * 100:3.0f}%"
            f" {show_bytes(step.done_bytes)} of {show_bytes(step.total_bytes)}"
        )
    elif step.done_bytes:
        line += f" {show_bytes(step.done_bytes)}"
    return f"{line}, {show_seconds(step.elapsed_s)}"


def _name_of(status: kvserve.ModelStatus) -> str:
    return harmless(f"{status.name} {status.version}")


def _unload(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    status = client.models.unload(parsed.name, drain_s=parsed.drain, version=parsed.version)
    if parsed.json:
        write_json(status)
    else:
        say(f"{_name_of(status) if parsed.version else status.name} is {status.state}")
    return 0


def _alias(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    # An empty version takes the alias away: an unset variable of a script must not.
    if parsed.version == "" or (parsed.version is None) != parsed.remove:
        raise ValueError("give the version that the alias is to name, or --remove")
    versions = client.models.set_alias(parsed.name, parsed.alias, parsed.version, traffic_share=parsed.share)
    if parsed.json:
        write_json({"versions": versions})
    else:
        say(_status_table(versions))
    return 0
