"""Following work that takes its time, on whatever standard error is."""

from __future__ import annotations

import sys
from collections.abc import Callable

from kvserve._cache_streams import Step
from kvserve._cli.output import write_json
from kvserve._follow_sync import Progress

__all__ = ["follow"]


def follow(work: Progress[Step], describe: Callable[[Step], str], *, as_json: bool) -> Step:
    """Run to the end and return the result.

    With ``as_json`` every step is a line of JSON on standard output; else, if standard error is a terminal,
    it shows the newest step on one line, which is gone afterwards.
    """
    is_shown = not as_json and sys.stderr.isatty()
    with work as steps:
        try:
            for step in steps:
                if as_json:
                    write_json(step)
                elif is_shown:
                    sys.stderr.write(f"\r\x1b[K{describe(step)}")
                    sys.stderr.flush()
        finally:
            if is_shown:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
    return work.result
