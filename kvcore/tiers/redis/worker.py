"""One thread of a Redis tier: its connection, its jobs, and what it is used for right now.

::

    loop    next_job (waits under the lock) -> job(worker) -> on_ready -> ... -> None: the tier is closed
    call    busy -> replies | LinkFailed -> idle           noted in Redis's health, unless nobody waits for it
                     ^
    abort            cuts the connection under a call, from any thread
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from kvcore.tiers.fetches import PendingFetch
from kvcore.tiers.redis.link import Command, LinkFailed, RedisLink
from kvcore.tiers.redis.shared import SLOW, RedisShared

__all__ = ["Job", "RedisWorker"]

log = logging.getLogger(__name__)


class RedisWorker:
    """See the module's text. ``call`` belongs to its thread (before ``start``: to the one that made it)."""

    def __init__(self, shared: RedisShared, link: RedisLink) -> None:
        self.fetches: Sequence[PendingFetch] = []
        """What the running call is for, as far as it is fetches; under the lock."""
        self._shared = shared
        self._link = link
        self._busy_since: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_unwanted(self) -> bool:
        """Say whether nobody waits any more for anything that is on its way."""
        return bool(self.fetches) and all(fetch.is_over for fetch in self.fetches)

    @property
    def is_alive(self) -> bool:
        """Say whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def is_busy_since_before(self, moment: float) -> bool:
        """Say whether a call has been running since before a moment of the clock."""
        return self._busy_since is not None and self._busy_since < moment

    def start(self, next_job: Callable[[], Job | None], on_ready: Callable[[], None]) -> None:
        """Run jobs in a thread until ``next_job``, called under the lock, says None."""
        self._thread = threading.Thread(
            target=self._run, args=(next_job, on_ready), name="redis", daemon=True
        )
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def abort(self) -> None:
        """Cut the connection under a call that is on its way. Not under the lock."""
        self._link.abort()

    def call(self, commands: Sequence[Command]) -> Sequence[object]:
        """Run a batch, noted in Redis's health; a connection that was found closed is dialled again."""
        shared = self._shared
        with shared.lock:
            self._busy_since = shared.clock.now()
        try:
            try:
                replies = self._link.call(commands)
            except LinkFailed as failed:
                if not failed.was_stale:
                    raise
                replies = self._link.call(commands)
            shared.health.succeeded()
            return replies
        except LinkFailed as failed:
            if not failed.was_aborted:
                shared.health.failed(failed.fault)
            elif not self.is_unwanted and not shared.is_closed:
                shared.health.failed(SLOW)  # overdue
            raise
        finally:
            with shared.lock:
                self._busy_since = None

    def _run(self, next_job: Callable[[], Job | None], on_ready: Callable[[], None]) -> None:
        while True:
            with self._shared.lock:
                job = next_job()
            if job is None:
                break
            try:
                job(self)
            except Exception:
                # A bug. The thread goes on: a dead one would leave requests waiting for their timeouts.
                log.exception("a job of the Redis tier failed")
                self._shared.health.failed("a bug in the tier: see the log")
            on_ready()
        self._link.close()


Job = Callable[[RedisWorker], None]
