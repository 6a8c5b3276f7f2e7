"""Exit codes of ``kvctl``, for scripts."""

from __future__ import annotations

import kvserve

__all__ = [
    "EXITS_HELP",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_NOT_SERVING",
    "EXIT_USAGE",
    "exit_code_of",
]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_SERVING = 3
EXIT_NOT_ALLOWED = 4
EXIT_TIMED_OUT = 5
EXIT_INTERRUPTED = 130

EXITS_HELP = """\
exit codes:
  0  done                      3  unreachable, not serving, or overloaded
  1  failed                    4  API key missing, wrong, or not sufficient
  2  wrong use or input        5  deadline passed
  130  interrupted"""


def exit_code_of(error: kvserve.Error) -> int:
    """Return the exit code for a failed call."""
    match error:
        case kvserve.InvalidArgument():
            return EXIT_USAGE
        case kvserve.Retryable():
            return EXIT_NOT_SERVING
        case kvserve.Unauthenticated() | kvserve.PermissionDenied():
            return EXIT_NOT_ALLOWED
        case kvserve.DeadlineExceeded():
            return EXIT_TIMED_OUT
        case _:
            return EXIT_FAILED
