"""Asking before what can't be taken back."""

from __future__ import annotations

import argparse
import sys

__all__ = ["add_yes", "confirm"]


def add_yes(parser: argparse.ArgumentParser) -> None:
    """Add the option that answers in advance."""
    parser.add_argument(
        "--yes", action="store_true", help="don't ask; needed where there is no terminal to ask"
    )


def confirm(parsed: argparse.Namespace, question: str) -> bool:
    """Return the answer. Raises ValueError where nobody can be asked and ``--yes`` is not given."""
    if parsed.yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ValueError(f"{question} There is no terminal to ask: say --yes")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
