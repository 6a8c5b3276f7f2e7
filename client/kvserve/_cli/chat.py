"""``kvctl chat``: a conversation. Ctrl-C stops the current answer, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any

import kvserve
from kvserve._cli.output import complain, describe_error, note, say, stats_line
from kvserve._cli.sampling import add_sampling_options, sampling_options
from kvserve._options import GenerateOptions

__all__ = ["add_parser"]

_COMMANDS = "Ctrl-C stops an answer, Ctrl-D leaves, /reset starts over."


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "chat",
        parents=[common],
        allow_abbrev=False,
        help="hold a conversation",
        description=f"Hold a conversation; each turn reuses the turns before it from the cache. {_COMMANDS}",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--stats", action="store_true", help="cached tokens and times after each answer")
    add_sampling_options(parser)
    parser.set_defaults(run=_run)


class _Conversation:
    """The messages so far. A turn that fails leaves no trace; one that was stopped keeps what was said."""

    def __init__(self, client: kvserve.Client, options: GenerateOptions, system: str | None) -> None:
        self._client = client
        self._options = options
        self._opening = [] if system is None else [kvserve.ChatMessage("system", system)]
        self.messages = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def ask(self, question: str) -> str | None:
        """Write the answer as it arrives. Return its statistics, or None if it was stopped."""
        asked = [*self.messages, kvserve.ChatMessage("user", question)]
        options = self._options.copy()
        options["messages"] = asked
        opened_at_s = time.perf_counter()
        stream = self._client.generate(**options)
        try:
            with stream:
                for event in stream:
                    say(event.text, end="")
        except KeyboardInterrupt:
            pass  # Leaving the block cancelled the call.
        finally:
            say("")
        self.messages = [*asked, kvserve.ChatMessage("assistant", stream.text)]
        if not stream.is_finished:
            return None
        elapsed_s = time.perf_counter() - opened_at_s
        return stats_line(stream.result, first_token_s=stream.first_token_s, elapsed_s=elapsed_s)


def _run(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  Line editing and history for input().
        note(_COMMANDS)
    conversation = _Conversation(client, sampling_options(parsed), parsed.system)
    while True:
        try:
            question = input("> " if is_interactive else "").strip()
        except EOFError:
            if is_interactive:
                say("")
            return 0
        except KeyboardInterrupt:
            say("")
            continue
        if not question:
            continue
        if question == "/reset":
            conversation.reset()
            continue
        try:
            stats = conversation.ask(question)
        except kvserve.Error as error:
            if not is_interactive:
                raise
            complain(describe_error(error, target=client.target))
            continue
        if parsed.stats:
            note(stats or "[stopped]")
