"""Threads of a tier: reads first, writes in order, and an end that waits for nobody for long.

::

    submit_read  ---> reads  (bounded) ---> reader threads
    submit_write ---> writes           ---> one writer thread; lets waiting reads go first, for a moment

One writer, so that writes, renames and removals happen in the order in which they were handed over. The
threads are daemons: one that is stuck in a system call does not keep the process from exiting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Workers"]

log = logging.getLogger(__name__)

Job = Callable[[], None]

_YIELD_TO_READS_S = 0.05


class Workers:
    """Run a tier's jobs. A job handles its own faults; one that raises is a bug, logged, and ends nothing."""

    def __init__(self, name: str, *, num_readers: int = 2, max_queued_reads: int = 1024) -> None:
        self._max_queued_reads = max_queued_reads
        self._reads: deque[Job] = deque()
        self._writes: deque[Job] = deque()
        self._reading_since: dict[int, float] = {}
        self._is_closing = False
        self._lock = threading.Lock()
        self._has_reads = threading.Condition(self._lock)
        self._has_writes = threading.Condition(self._lock)
        self._reads_are_gone = threading.Condition(self._lock)
        self._threads = [
            threading.Thread(target=self._read, name=f"{name}-reader-{n}", daemon=True)
            for n in range(num_readers)
        ]
        self._threads.append(threading.Thread(target=self._write, name=f"{name}-writer", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit_read(self, job: Job) -> bool:
        """Queue a job for the readers; False if too many wait, or after the end."""
        with self._lock:
            if self._is_closing or len(self._reads) >= self._max_queued_reads:
                return False
            self._reads.append(job)
            self._has_reads.notify()
            return True

    def submit_write(self, job: Job) -> bool:
        """Queue a job for the writer, after all that it was given before; False after the end."""
        with self._lock:
            if self._is_closing:
                return False
            self._writes.append(job)
            self._has_writes.notify()
            return True

    def longest_read_s(self) -> float:
        """Return for how long the slowest read of the moment has been running; 0 when there is none."""
        with self._lock:
            if not self._reading_since:
                return 0.0
            return time.monotonic() - min(self._reading_since.values())

    def close(self, *, within_s: float = 2.0) -> bool:
        """Drop queued reads, finish queued writes, end the threads; say whether all of them ended in time."""
        until = time.monotonic() + within_s
        with self._lock:
            self._is_closing = True
            self._reads.clear()
            for condition in (self._has_reads, self._has_writes, self._reads_are_gone):
                condition.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            self._writes.clear()  # a writer that is stuck does not go on later
        return not any(thread.is_alive() for thread in self._threads)

    def _read(self) -> None:
        while True:
            with self._lock:
                while not self._reads:
                    if self._is_closing:
                        return
                    self._has_reads.wait()
                job = self._reads.popleft()
                if not self._reads:
                    self._reads_are_gone.notify_all()
            me = threading.get_ident()
            with self._lock:
                self._reading_since[me] = time.monotonic()
            self._run(job)
            with self._lock:
                del self._reading_since[me]

    def _write(self) -> None:
        while True:
            with self._lock:
                while not self._writes:
                    if self._is_closing:
                        return
                    self._has_writes.wait()
                if self._reads and not self._is_closing:
                    self._reads_are_gone.wait(_YIELD_TO_READS_S)
                if not self._writes:
                    continue
                job = self._writes.popleft()
            self._run(job)

    def _run(self, job: Job) -> None:
        try:
            job()
        except Exception:
            log.exception("a job of a cache tier failed")
