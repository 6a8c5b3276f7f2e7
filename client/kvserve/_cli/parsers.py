"""The parser of all subcommands: as argparse's, and on demand with options between positional arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """With ``is_intermixed``, ``MODEL --option TEXT ...`` is understood.

    argparse gives a list of any length (``nargs="*"``) what stands beside the arguments before it, which
    may be nothing, and finds the rest superfluous. It has a way to parse such lines, but not for
    subcommands.
    """

    is_intermixed = False

    def parse_known_args(  # type: ignore[override]  # argparse's overloads say the same at greater length
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        if not self.is_intermixed:
            return super().parse_known_args(args, namespace)
        self.is_intermixed = False  # It parses in two passes, of which each comes here again.
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.is_intermixed = True
