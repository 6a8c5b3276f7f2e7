"""``kvctl cache top``: the most valuable prefixes, hit rates and memory, live. Needs rich."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import kvserve
from kvserve._cli.exits import EXIT_USAGE
from kvserve._cli.output import complain
from kvserve._cli.top_view import Sample, View, take_sample
from kvserve._cli.units import seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_arguments", "run"]

_WIDTH_OF_A_PIPE = 160
_HEIGHT_OF_A_PIPE = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--interval", type=seconds, metavar="TIME", default=2.0, help="time between two looks (default: 2s)"
    )
    parser.add_argument("--once", action="store_true", help="write one frame and end")
    parser.add_argument("--rows", type=int, metavar="N", help="so many prefixes (default: as many as fit)")
    parser.add_argument(
        "--namespace", metavar="TEXT", default="", help="only namespaces or tenants with this text"
    )


def run(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    """Draw until the user has seen enough."""
    try:
        from rich.console import Console
    except ImportError:
        complain("this table needs rich: pip install 'kvserve[top]'")
        return EXIT_USAGE
    if parsed.interval <= 0:
        raise ValueError("--interval must be above 0")
    if parsed.rows is not None and parsed.rows < 1:
        raise ValueError("--rows must be at least 1")
    view = View(num_rows=parsed.rows, filter_text=parsed.namespace)

    def take(filter_text: str) -> Sample:
        timeout = {"timeout_s": parsed.timeout} if "timeout" in parsed else {}
        return take_sample(
            client, model=parsed.model, filter_text=filter_text, num_rows=parsed.rows or 0, **timeout
        )

    first = take(view.filter_text)  # A server that can't be reached is an error, and not an empty table.
    console = Console(highlight=False)
    if not console.is_terminal:
        width = int(os.environ.get("COLUMNS", _WIDTH_OF_A_PIPE))
        console = Console(highlight=False, width=width, height=_HEIGHT_OF_A_PIPE)
    if parsed.once:
        _write(console, first, None, view)
    elif console.is_terminal:
        _draw_live(console, first, take, view, parsed.interval)
    else:
        _write_frames(console, first, take, view, parsed.interval)
    return 0


def _write(console: Console, sample: Sample, before: Sample | None, view: View, *, fault: str = "") -> None:
    from kvserve._cli.top_frame import render

    console.print(render(sample, before, view, width=console.width, height=console.height, fault=fault))
    sys.stdout.flush()


def _write_frames(
    console: Console, first: Sample, take: Callable[[str], Sample], view: View, interval_s: float
) -> None:
    """Write a frame for every sample, one below the other: standard output is no terminal."""
    before: Sample | None = None
    sample, fault = first, ""
    while True:
        _write(console, sample, before, view, fault=fault)
        time.sleep(interval_s)
        try:
            before, sample, fault = sample, take(view.filter_text), ""
        except kvserve.Error as error:
            fault = f"no answer: {error.message}"


def _draw_live(
    console: Console, first: Sample, take: Callable[[str], Sample], view: View, interval_s: float
) -> None:
    """Draw on a screen of its own until the user leaves; keys work if standard input is a terminal too."""
    from rich.live import Live

    from kvserve._cli.top_frame import render
    from kvserve._cli.top_terminal import Keys, Poller, raising_on_termination

    with (
        raising_on_termination(),
        Keys() as keys,
        Poller(first, take, filter_text=view.filter_text, interval_s=interval_s, on_news=keys.wake) as poller,
        Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False) as live,
    ):
        while not view.has_quit:
            sample, before, fault = poller.newest()
            frame = render(sample, before, view, width=console.width, height=console.height, fault=fault)
            live.update(frame, refresh=True)
            pressed = keys.wait()
            if pressed is None:
                return
            for key in pressed:
                view.press(key)
            poller.want(filter_text=view.filter_text, is_paused=view.is_paused)
