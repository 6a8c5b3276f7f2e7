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
    """Replay a folder's sessions in a process of its own; return a row for each half, device and seed."""
    command = [sys.executable, "-m", "kvcore.prefetch_replay", folder, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table: one row for each half of the sessions, device and seed, and one for all of a half."""
    folder, *options = sys.argv[1:] if arguments is None else arguments
    rows = measure_prefetch(folder, *options)
    print("| half | device | seed | restore s without | with | hidden | fetched | in time | late | wasted |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        _print_row(f"{row['half']} | {float(row['device_share']):.0%} | {row['seed']}", [row])
    for half in dict.fromkeys(row["half"] for row in rows):
        _print_row(f"{half} | all | all", [row for row in rows if row["half"] == half])
    return 0


def _print_row(name: str, rows: Sequence[dict[str, float | str]]) -> None:
    def total(key: str) -> float:
        return sum(float(row[key]) for row in rows)

    without, ahead, wasted = total("restore_s_without"), total("restore_s_with"), total("wasted")
    finished = total("in_time") + total("late") + wasted
    print(
        f"| {name} | {without:.1f} | {ahead:.1f} | {1.0 - ahead / without if without else 0.0:+.1%} "
        f"| {total('fetched'):.0f} | {total('in_time'):.0f} | {total('late'):.0f} "
        f"| {wasted:.0f} ({wasted / finished if finished else 0.0:.0%}) |"
    )


if __name__ == "__main__":
    sys.exit(main())
