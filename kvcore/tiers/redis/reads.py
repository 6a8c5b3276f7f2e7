"""A Redis tier's reading side: what it asks, what it fetches, and how it tries a Redis again that failed.

::

    engine's thread                      readers, whoever is free
      look   unknown keys, bounded --->    STRLEN, a pipeline: present or not
      begin  fetches, bounded      --->    GETRANGE, some at a time; check, decode

    Redis fails:  queued questions are dropped, queued fetches failed; one reader tries again after the
                  back-off: PING, and a large value there and back when no speed is known yet
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Sequence

from kvcore.keys import PrefixDigest
from kvcore.tiers.fetches import FetchBoard, PendingFetch
from kvcore.tiers.interface import FetchFailure, ObjectKey, Presence
from kvcore.tiers.redis.link import LinkFailed, Refusal
from kvcore.tiers.redis.shared import SLOW, RedisShared
from kvcore.tiers.redis.worker import Job, RedisWorker

__all__ = ["RedisReads"]

_BATCH_KEYS = 512
_MAX_ASKED = 8 * _BATCH_KEYS
_SLOW_IN_A_ROW = 3
"""Fetches that missed their requests' deadlines, one after another, that count as one fault of Redis."""


class RedisReads:
    """See the module's text."""

    def __init__(self, shared: RedisShared, board: FetchBoard) -> None:
        self._shared = shared
        self._board = board
        self._asked: dict[ObjectKey, float] = {}
        """When; without an answer yet."""
        self._to_ask: deque[ObjectKey] = deque()
        self._to_fetch: deque[PendingFetch] = deque()
        self._num_slow = 0

    # ------------------------------------------------------------------------ engine's thread, under the lock

    def look(self, key: ObjectKey) -> Presence:
        """Say whether an object is there, and ask Redis if it is not known."""
        shared = self._shared
        known = shared.known.is_present(key)
        if known is not None:
            return Presence.YES if known else Presence.NO
        now = shared.clock.now()
        patience_s = shared.options.lookup_patience_s
        asked_at = self._asked.get(key)
        if asked_at is not None:
            return Presence.COMING if now - asked_at < patience_s else Presence.NO
        oldest = next(iter(self._asked.values()), now)
        if now - oldest >= patience_s or len(self._asked) >= _MAX_ASKED:
            return Presence.NO  # it hangs: nobody else has to find that out
        self._asked[key] = now
        self._to_ask.append(key)
        shared.readable.notify()
        return Presence.COMING

    def begin(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        """Queue a fetch; False if too many wait."""
        if len(self._to_fetch) >= self._shared.options.max_queued_fetches:
            return False
        self._to_fetch.append(self._board.start(key, namespace=namespace, timeout_s=timeout_s))
        self._shared.readable.notify()
        return True

    def note_late(self, num_fetches: int) -> None:
        """Note fetches that missed their deadlines: several in a row are a fault of Redis."""
        self._num_slow += num_fetches
        if self._num_slow >= _SLOW_IN_A_ROW:
            self._num_slow = 0
            self._shared.health.failed(SLOW)

    # ----------------------------------------------------------------------------------------------- readers

    def next_job(self) -> Job | None:
        """Wait for work, under the lock; None: the tier is closed."""
        shared = self._shared
        while not shared.is_closed:
            if not shared.health.is_available:
                self._asked.clear()
                self._to_ask.clear()
                if self._to_fetch:
                    lost = list(self._to_fetch)
                    self._to_fetch.clear()
                    return functools.partial(self._fail, fetches=lost)
                if shared.health.may_try():
                    return self.try_again
                # None: the other reader is trying, and will wake this one.
                shared.readable.wait(shared.health.retry_in_s() or 1.0)
                continue
            if self._to_ask:
                keys = [self._to_ask.popleft() for _ in range(min(len(self._to_ask), _BATCH_KEYS))]
                return functools.partial(self._ask, keys=keys)
            fetches: list[PendingFetch] = []
            room = shared.options.batch_bytes
            while self._to_fetch and room > 0:
                fetch = self._to_fetch.popleft()
                if not fetch.is_over:
                    fetches.append(fetch)
                    room -= shared.format.payload_bytes(fetch.key.kind)
            if fetches:
                return functools.partial(self._read, fetches=fetches)
            shared.readable.wait()
        return None

    def try_again(self, worker: RedisWorker) -> None:
        """Measure Redis through the path that objects take; its health is the outcome."""
        shared, commands = self._shared, self._shared.commands
        with shared.lock:
            shared.known.doubt()  # before the answer: with it the tier is available, at once and to everybody
        try:
            latency_s = commands.ping(worker.call)
            with shared.lock:
                shared.counters.latency_s = latency_s
                shared.readable.notify_all()
                shared.writable.notify_all()
            if shared.counters.read_bytes_per_s > 0:
                return
            speed = commands.measure(worker.call, latency_s)
        except LinkFailed:
            return
        if isinstance(speed, Refusal):
            shared.write_health.failed(speed.fault)
            return
        with shared.lock:
            shared.counters.write_bytes_per_s = speed.write_bytes_per_s
            shared.counters.read_bytes_per_s = speed.read_bytes_per_s

    def _fail(self, _: RedisWorker, fetches: Sequence[PendingFetch]) -> None:
        for fetch in fetches:
            self._board.fail(fetch, FetchFailure.UNREACHABLE)

    def _ask(self, worker: RedisWorker, keys: Sequence[ObjectKey]) -> None:
        shared, counters = self._shared, self._shared.counters
        started = time.perf_counter()
        try:
            answers = shared.commands.lengths(worker.call, keys)
        except LinkFailed:
            with shared.lock:
                for key in keys:
                    self._asked.pop(key, None)
            return
        seconds = time.perf_counter() - started
        unfit: list[ObjectKey] = []
        with shared.lock:
            if len(keys) <= 64:
                counters.latency_s += 0.2 * (seconds - counters.latency_s)
            for key, answer in zip(keys, answers, strict=True):
                was_asked = self._asked.pop(key, None) is not None
                if not was_asked or shared.known.is_present(key) is not None:
                    continue  # answered meanwhile by something that knows better
                shared.known.note_answer(key, is_present=bool(answer))
                if answer:
                    counters.hits += 1
                else:
                    counters.misses += 1
                if answer is None:
                    unfit.append(key)
        self._delete_unfit(worker, unfit)

    def _read(self, worker: RedisWorker, fetches: Sequence[PendingFetch]) -> None:
        shared = self._shared
        started = time.perf_counter()
        with shared.lock:
            worker.fetches = fetches
        try:
            values = shared.commands.read(worker.call, [fetch.key for fetch in fetches])
        except LinkFailed as failed:
            failure = FetchFailure.TIMEOUT if failed.was_timeout else FetchFailure.UNREACHABLE
            for fetch in fetches:
                self._board.fail(fetch, failure)
            return
        finally:
            with shared.lock:
                worker.fetches = []
        unfit: list[ObjectKey] = []
        num_bytes = 0
        for fetch, value in zip(fetches, values, strict=True):
            size = len(value) if isinstance(value, bytes) else 0
            num_bytes += size
            if self._deliver(fetch, value, size) is FetchFailure.CORRUPT:
                unfit.append(fetch.key)
        seconds = time.perf_counter() - started
        with shared.lock:
            counters = shared.counters
            counters.read_bytes_per_s = shared.follow(counters.read_bytes_per_s, num_bytes, seconds)
        self._delete_unfit(worker, unfit)

    def _deliver(self, fetch: PendingFetch, value: object, size: int) -> FetchFailure | None:
        """End a fetch with what came for it; return what was wrong with that."""
        known = self._shared.known
        outcome = self._shared.commands.judge(value, fetch.key, fetch.namespace)
        if isinstance(outcome, FetchFailure):
            with self._shared.lock:
                self._num_slow = 0
                known.note_missing(fetch.key)
            self._board.fail(fetch, outcome, num_bytes=size)
            return outcome
        with self._shared.lock:
            self._num_slow = 0
            found = known.note_found(outcome.found, size)
        self._board.succeed(fetch, found, num_bytes=size, is_lossy=outcome.is_lossy)
        return None

    def _delete_unfit(self, worker: RedisWorker, keys: Sequence[ObjectKey]) -> None:
        """Delete what cannot be an object, so that the next store or reader is not held up by it."""
        if not keys:
            return
        with self._shared.lock:
            self._shared.counters.quarantined += len(keys)
        try:
            self._shared.commands.unlink(worker.call, keys)
        except LinkFailed:
            return  # noted in the health; the next reader finds them again
