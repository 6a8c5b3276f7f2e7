"""What fetching returning sessions ahead hides and wastes, on recorded agent sessions.

::

    python -m loadgen.experiments.session_prefetch FOLDER_OF_SESSIONS [options of kvcore.prefetch_replay]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["main", "measure_prefetch"]

_TIMEOUT_S = 1800.0


def measure_prefetch(folder: str, *options: str) -> list[dict[str, float | str]]:
    """Replay the sessions of a folder in a process of its own; return a row for each half and seed."""
    command = [sys.executable, "-m", "kvcore.prefetch_replay", folder, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, one row for each half of the sessions and seed."""
    folder, *options = sys.argv[1:] if arguments is None else arguments
    print("| sessions | seed | requests | restore s without | with | hidden | fetched | late | wasted |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in measure_prefetch(folder, *options):
        print(
            f"| {row['half']} | {row['seed']} | {row['num_requests']} | {row['restore_s_without']:.1f} "
            f"| {row['restore_s_with']:.1f} | {row['hidden']:.0%} | {row['fetched']} | {row['late']} "
            f"| {row['wasted']} ({row['waste']:.0%}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
