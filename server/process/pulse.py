"""Whether a process that says nothing is at work all the same, as far as the kernel shows it.

A thread that holds the interpreter for long (importing a large library does) silences the heartbeat, but
takes processor time or waits for the disk. A process that was stopped or is in a deadlock does neither.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["Pulse"]


class Pulse:
    """Feels one process now and then. A system call or three each time."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self._last: tuple[int, ...] = ()

    def has_worked(self) -> bool:
        """Say whether it took processor time, read a page from disk or waits for one, since the last call.

        True where nobody can tell.
        """
        try:
            # After the name, which may hold anything: state, ppid, ...; numbered from 3 in proc(5).
            fields = self._stat.read_bytes().rpartition(b")")[2].split()
            state, major_faults, user, system = fields[0], *map(int, (fields[9], fields[11], fields[12]))
        except (OSError, ValueError, IndexError):
            return True
        before, self._last = self._last, (major_faults, user, system)
        return state == b"D" or before != self._last
