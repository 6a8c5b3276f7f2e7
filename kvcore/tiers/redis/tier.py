"""Redis as a tier: objects that several servers share, behind a network that may be slow, full or gone.

::

    engine's thread               queues (bounded)     threads, each with a connection of its own
      lookup -> presence table .. unknown keys  --->   readers: STRLEN, a pipeline
      fetch  -------------------> fetches       --->            GETRANGE, some at a time; check, decode
      complete -----------------> stores        --->   writer:  encode; SET .. PX, some at a time
      remove, clear ------------> removals      --->            UNLINK, in order with the stores

While Redis is failing (``Health``), ``lookup`` says NO and ``fetch`` False at once, queued work is given up,
and a reader tries again after the back-off, so no request ever pays for the try. A write that Redis refuses
(out of memory, read-only) stops the stores alone.

Nothing in Redis is trusted (``commands``). What is not an object at all is deleted.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvcore.clock import Clock, MonotonicClock
from kvcore.codec import Codec, CodecError, Divergence, NoCodec
from kvcore.keys import PrefixDigest
from kvcore.tiers.fetches import FetchBoard, PendingFetch
from kvcore.tiers.health import Health
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    FetchFailure,
    ObjectFormat,
    ObjectKey,
    ObjectKind,
    Presence,
    StoreTicket,
    TierStats,
)
from kvcore.tiers.objects import ObjectError
from kvcore.tiers.redis.commands import Outgoing, RedisCommands
from kvcore.tiers.redis.link import Command, LinkFailed, RedisLink, Refusal
from kvcore.tiers.redis.presence import PresenceTable

__all__ = ["RedisOptions", "RedisTier"]

log = logging.getLogger(__name__)

_BATCH_KEYS = 512
_MAX_ASKED = 8 * _BATCH_KEYS
_SLOW_IN_A_ROW = 3
"""Fetches that missed their requests' deadlines, one after another, that count as one fault of Redis."""
_SLOW = "Redis did not answer in time"
_CLOSE_WITHIN_S = 1.5
_MAX_DIVERGENCES = 10_000
"""Kept until they are taken; the oldest go first."""


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """Limits of a Redis tier; the defaults suit a Redis in the same data centre."""

    connect_timeout_s: float = 0.25
    command_timeout_s: float = 1.0
    """Without any byte from Redis; twice that for a whole batch."""
    lookup_patience_s: float = 0.04
    """A lookup that has no answer by then says NO: what a request waits at most for a Redis that hangs."""
    default_ttl_s: float = 86_400.0
    """Of objects without a lifetime of their own; no object stays longer."""
    present_s: float = 60.0
    """How long a YES is believed."""
    absent_s: float = 1.5
    """How long a NO is believed: another server may be storing it."""
    max_known: int = 100_000
    max_queued_bytes: int = 256 << 20
    """Of objects reserved or waiting to be written."""
    max_queued_fetches: int = 8_192
    batch_bytes: int = 1 << 19
    """About what one round trip moves: larger ones delay the first object, smaller ones the last."""
    num_readers: int = 2


@dataclass(slots=True, eq=False)
class _Store:
    stored: CacheObject
    num_bytes: int
    """Reserved for it."""
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class _Known:
    """What this server has put there, or found."""

    namespace: PrefixDigest
    parent: PrefixDigest
    depth: int
    num_bytes: int
    expires_at: float | None


@dataclass(slots=True, eq=False)
class _Worker:
    """A thread's connection, and what it is used for right now."""

    link: RedisLink
    busy_since: float | None = None
    fetches: Sequence[PendingFetch] = field(default_factory=list)

    @property
    def is_unwanted(self) -> bool:
        """Say whether nobody waits any more for anything that is on its way."""
        return bool(self.fetches) and all(fetch.is_over for fetch in self.fetches)


class RedisTier:
    """See the module's text and ``kvcore.tiers.interface.Tier``."""

    def __init__(
        self,
        url: str,
        object_format: ObjectFormat,
        codec: Codec | None = None,
        *,
        options: RedisOptions | None = None,
        clock: Clock | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        """Dial and measure once, for a second or two at most; a Redis that is not there is tried again later.

        Raises:
            TierStartError: the URL cannot work, whatever Redis does.
        """
        self._format = object_format
        self._options = options = options or RedisOptions()
        self._clock = clock = clock or MonotonicClock()
        self._on_ready = on_ready or (lambda: None)
        self._commands = RedisCommands(object_format, codec or NoCodec())
        self._health = Health(clock)
        self._write_health = Health(clock, first_backoff_s=1.0)
        self._lock = threading.Lock()
        self._readable = threading.Condition(self._lock)
        self._writable = threading.Condition(self._lock)
        self._is_closed = False
        self._counters = TierStats()
        # What is known and asked.
        self._presence = PresenceTable(
            clock, present_s=options.present_s, absent_s=options.absent_s, max_entries=options.max_known
        )
        self._asked: dict[ObjectKey, float] = {}
        self._to_ask: deque[ObjectKey] = deque()
        # Fetches.
        self._board = FetchBoard("redis", clock=clock)
        self._to_fetch: deque[PendingFetch] = deque()
        self._num_slow = 0
        # Stores and removals, and what this server has put or found there.
        self._tickets: dict[StoreTicket, tuple[ObjectKey, int]] = {}
        self._num_tickets = 0
        self._storing: set[ObjectKey] = set()
        self._queued_bytes = 0
        self._to_write: deque[_Store | ObjectKey] = deque()
        self._removing: set[ObjectKey] = set()
        self._known: OrderedDict[ObjectKey, _Known] = OrderedDict()
        self._known_bytes = 0
        self._divergences: deque[tuple[ObjectKey, Divergence]] = deque(maxlen=_MAX_DIVERGENCES)

        make_link = functools.partial(
            RedisLink,
            url,
            connect_timeout_s=options.connect_timeout_s,
            command_timeout_s=options.command_timeout_s,
        )
        self._writer = _Worker(make_link())
        self._readers = [_Worker(make_link()) for _ in range(options.num_readers)]
        self._try_again(self._writer)
        loops = [(self._next_read, worker) for worker in self._readers]
        self._threads = [
            threading.Thread(target=self._run, args=loop, name="redis", daemon=True)
            for loop in [(self._next_write, self._writer), *loops]
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        return f"RedisTier({self._health.state.value})"

    @property
    def name(self) -> str:
        return "redis"

    @property
    def is_persistent(self) -> bool:
        return True

    # ------------------------------------------------------------------------------------ engine's thread

    def lookup(self, key: ObjectKey) -> Presence:
        with self._lock:
            if not self._is_usable:
                return Presence.NO
            if key in self._storing:
                return Presence.COMING
            if key in self._removing or self._is_expired(key):
                return Presence.NO
            known = self._presence.get(key)
            if known is not None:
                return Presence.YES if known else Presence.NO
            now = self._clock.now()
            patience_s = self._options.lookup_patience_s
            asked_at = self._asked.get(key)
            if asked_at is not None:
                return Presence.COMING if now - asked_at < patience_s else Presence.NO
            oldest = next(iter(self._asked.values()), now)
            if now - oldest >= patience_s or len(self._asked) >= _MAX_ASKED:
                return Presence.NO  # it hangs: nobody else has to find that out
            self._asked[key] = now
            self._to_ask.append(key)
            self._readable.notify()
            return Presence.COMING

    def prepare(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        with self._lock:
            is_there = self._presence.get(key) and not self._is_expired(key)
            if key in self._storing or (is_there and key not in self._removing):
                return None
            if (
                not self._is_usable
                or not self._write_health.is_available
                or self._queued_bytes + num_bytes > self._options.max_queued_bytes
            ):
                self._counters.refused_stores += 1
                return None
            self._num_tickets += 1
            ticket = StoreTicket(self._num_tickets)
            self._tickets[ticket] = (key, num_bytes)
            self._storing.add(key)
            self._queued_bytes += num_bytes
            return ticket

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        with self._lock:
            key, num_bytes = self._tickets.pop(ticket)
            assert stored.key == key, "another object than the one that was reserved"
            expires_at = None
            if stored.expires_in_s is not None:
                expires_at = self._clock.now() + stored.expires_in_s
            self._to_write.append(_Store(stored, num_bytes, expires_at))
            if self._is_closed:
                self._give_up_stores()
            self._writable.notify()

    def abandon(self, ticket: StoreTicket) -> None:
        with self._lock:
            self._unreserve(*self._tickets.pop(ticket))

    def fetch(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        with self._lock:
            if (
                not self._is_usable
                or key in self._storing
                or key in self._removing
                or self._presence.get(key) is False
                or self._is_expired(key)
                or len(self._to_fetch) >= self._options.max_queued_fetches
            ):
                return False
            self._to_fetch.append(self._board.start(key, namespace=namespace, timeout_s=timeout_s))
            self._readable.notify()
            return True

    def cancel(self, keys: Iterable[ObjectKey]) -> None:
        self._board.cancel(keys)
        self._abort(lambda worker: worker.is_unwanted)

    def poll(self) -> list[Fetched]:
        num_late = self._board.expire()
        if num_late:
            with self._lock:
                self._num_slow += num_late
                if self._num_slow >= _SLOW_IN_A_ROW:
                    self._num_slow = 0
                    self._health.failed(_SLOW)
            self._abort(lambda worker: worker.is_unwanted)
        # The connection's timeout begins anew with every byte: this bounds the whole batch.
        overdue = self._clock.now() - 2 * self._options.command_timeout_s - self._options.connect_timeout_s
        self._abort(lambda worker: worker.busy_since is not None and worker.busy_since < overdue)
        return self._board.take()

    def remove(self, keys: Iterable[ObjectKey]) -> None:
        with self._lock:
            self._remove(list(keys))

    def remove_prefixes(self, digests: Iterable[PrefixDigest]) -> int:
        """Remove these prefixes, whoever stored them, and what this server knows to continue them."""
        wanted = set(digests)
        doomed = [ObjectKey(digest, kind) for digest in wanted for kind in ObjectKind]
        with self._lock:
            num_known = sum(key in self._known for key in doomed)
            for key, known in sorted(self._known.items(), key=lambda item: item[1].depth):
                if known.parent in wanted and key.digest not in wanted:
                    wanted.add(key.digest)
                    doomed += [ObjectKey(key.digest, kind) for kind in ObjectKind]
                    num_known += 1
            self._remove(doomed)
        return num_known

    def clear(self, namespace: PrefixDigest | None = None) -> int:
        """Forget what this server has stored or fetched; what others alone know stays until its TTL."""
        with self._lock:
            doomed = [key for key, known in self._known.items() if namespace in (None, known.namespace)]
            doomed += [
                item.stored.key
                for item in self._to_write
                if isinstance(item, _Store) and namespace in (None, item.stored.namespace)
            ]
            doomed = list(dict.fromkeys(doomed))
            self._remove(doomed)
            return len(doomed)

    def keys(self) -> Iterable[ObjectKey]:
        with self._lock:
            return list(self._known)

    def take_divergences(self) -> list[tuple[ObjectKey, Divergence]]:
        """Return what a lossy codec did to the objects written since the last call."""
        with self._lock:
            taken = list(self._divergences)
            self._divergences.clear()
            return taken

    def stats(self) -> TierStats:
        with self._lock:
            health = self._health if not self._health.is_available else self._write_health
            is_faulty = not health.is_available
            return dataclasses.replace(
                self._counters,
                num_objects=len(self._known),
                num_bytes=self._known_bytes,
                is_available=self._health.is_available,
                fetched=self._board.fetched,
                fetched_bytes=self._board.fetched_bytes,
                failures=dict(self._board.failures),
                last_fault=health.last_fault if is_faulty else self._counters.last_fault,
            )

    def close(self) -> None:
        """Write what was handed over, within ``_CLOSE_WITHIN_S``; then cut connections, end threads."""
        until = time.monotonic() + _CLOSE_WITHIN_S
        with self._lock:
            self._is_closed = True
            self._readable.notify_all()
            self._writable.notify_all()
        self._board.cancel_all()
        for worker in self._readers:
            worker.link.abort()
        self._threads[0].join(max(0.0, until - time.monotonic()))
        self._writer.link.abort()
        for thread in self._threads:
            thread.join(self._options.connect_timeout_s + 0.5)

    # --------------------------------------------------------------------------- under the lock, any thread

    @property
    def _is_usable(self) -> bool:
        return self._health.is_available and not self._is_closed

    def _is_expired(self, key: ObjectKey) -> bool:
        """Say whether a lifetime has ended by this process's clock, which nobody sets."""
        known = self._known.get(key)
        return known is not None and known.expires_at is not None and known.expires_at <= self._clock.now()

    def _unreserve(self, key: ObjectKey, num_bytes: int) -> None:
        self._storing.discard(key)
        self._queued_bytes -= num_bytes

    def _give_up_stores(self) -> None:
        """Drop the stores that wait; removals stay, for when Redis works again."""
        for item in self._to_write:
            if isinstance(item, _Store):
                self._unreserve(item.stored.key, item.num_bytes)
                self._counters.store_failures += 1
        self._to_write = deque(item for item in self._to_write if isinstance(item, ObjectKey))

    def _learn(self, key: ObjectKey, known: _Known) -> None:
        self._unlearn(key)
        self._known[key] = known
        self._known_bytes += known.num_bytes
        while len(self._known) > self._options.max_known:
            self._unlearn(next(iter(self._known)))

    def _unlearn(self, key: ObjectKey) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._known_bytes -= known.num_bytes

    def _remove(self, keys: list[ObjectKey]) -> None:
        doomed = set(keys)
        kept: deque[_Store | ObjectKey] = deque()
        for item in self._to_write:
            if isinstance(item, _Store) and item.stored.key in doomed:
                self._unreserve(item.stored.key, item.num_bytes)
            else:
                kept.append(item)
        self._to_write = kept
        for key in keys:
            self._presence.forget(key)
            self._unlearn(key)
            if key not in self._removing and len(self._removing) < self._options.max_known:
                self._removing.add(key)
                self._to_write.append(key)
        self._writable.notify()

    # --------------------------------------------------------------------------------------------- threads

    def _abort(self, is_doomed: Callable[[_Worker], bool]) -> None:
        with self._lock:
            doomed = [worker.link for worker in (self._writer, *self._readers) if is_doomed(worker)]
        for link in doomed:
            link.abort()

    def _call(self, worker: _Worker, commands: Sequence[Command]) -> Sequence[object]:
        """Run a batch, noted in Redis's health; a connection that was found closed is dialled again."""
        with self._lock:
            worker.busy_since = self._clock.now()
        try:
            try:
                replies = worker.link.call(commands)
            except LinkFailed as failed:
                if not failed.was_stale:
                    raise
                replies = worker.link.call(commands)
            self._health.succeeded()
            return replies
        except LinkFailed as failed:
            if not failed.was_aborted:
                self._health.failed(failed.fault)
            elif not worker.is_unwanted and not self._is_closed:
                self._health.failed(_SLOW)  # overdue
            raise
        finally:
            with self._lock:
                worker.busy_since = None

    def _run(self, next_job: Callable[[], Job | None], worker: _Worker) -> None:
        """Run a thread's jobs until the tier is closed."""
        while True:
            with self._lock:
                job = next_job()
            if job is None:
                break
            try:
                job(worker)
            except Exception:
                # A bug. The thread goes on: a dead one would leave requests waiting for their timeouts.
                log.exception("a job of the Redis tier failed")
                self._health.failed("a bug in the tier: see the log")
            self._on_ready()
        worker.link.close()

    def _next_read(self) -> Job | None:
        """Wait for work, under the lock."""
        while not self._is_closed:
            if not self._health.is_available:
                self._asked.clear()
                self._to_ask.clear()
                if self._to_fetch:
                    lost = list(self._to_fetch)
                    self._to_fetch.clear()
                    return functools.partial(self._fail, fetches=lost)
                if self._health.may_try():
                    return self._try_again
                # None: the other reader is trying, and will wake this one.
                self._readable.wait(self._health.retry_in_s() or 1.0)
                continue
            if self._to_ask:
                keys = [self._to_ask.popleft() for _ in range(min(len(self._to_ask), _BATCH_KEYS))]
                return functools.partial(self._ask, keys=keys)
            fetches: list[PendingFetch] = []
            room = self._options.batch_bytes
            while self._to_fetch and room > 0:
                fetch = self._to_fetch.popleft()
                if not fetch.is_over:
                    fetches.append(fetch)
                    room -= self._format.payload_bytes(fetch.key.kind)
            if fetches:
                return functools.partial(self._read, fetches=fetches)
            self._readable.wait()
        return None

    def _next_write(self) -> Job | None:
        """Wait for work, under the lock; None: the tier is closed and what can be written is."""
        while True:
            if not (self._health.is_available and self._write_health.is_available):
                self._give_up_stores()
                if self._is_closed:
                    return None
                if self._health.is_available and self._write_health.may_try():
                    return self._try_writing
                self._writable.wait(0.25)
                continue
            removals: list[ObjectKey] = []
            stores: list[_Store] = []
            room = self._options.batch_bytes
            while self._to_write and room > 0:
                item = self._to_write[0]
                if isinstance(item, ObjectKey):
                    if stores or len(removals) >= _BATCH_KEYS:
                        break
                    removals.append(item)
                elif removals:
                    break
                else:
                    stores.append(item)
                    room -= item.num_bytes
                self._to_write.popleft()
            if removals:
                return functools.partial(self._unlink, keys=removals)
            if stores:
                return functools.partial(self._write, stores=stores)
            if self._is_closed:
                return None
            self._writable.wait()

    def _fail(self, _: _Worker, fetches: Sequence[PendingFetch]) -> None:
        for fetch in fetches:
            self._board.fail(fetch, FetchFailure.UNREACHABLE)

    def _ask(self, worker: _Worker, keys: Sequence[ObjectKey]) -> None:
        call = functools.partial(self._call, worker)
        started = time.perf_counter()
        try:
            answers = self._commands.lengths(call, keys)
        except LinkFailed:
            with self._lock:
                for key in keys:
                    self._asked.pop(key, None)
            return
        seconds = time.perf_counter() - started
        unfit: list[ObjectKey] = []
        with self._lock:
            if len(keys) <= 64:
                self._counters.latency_s += 0.2 * (seconds - self._counters.latency_s)
            for key, answer in zip(keys, answers, strict=True):
                was_asked = self._asked.pop(key, None) is not None
                if not was_asked or self._presence.get(key) is not None:
                    continue  # answered meanwhile by something that knows better
                self._presence.put(key, is_present=bool(answer))
                if answer:
                    self._counters.hits += 1
                else:
                    self._counters.misses += 1
                if answer is None:
                    unfit.append(key)
        self._delete_unfit(worker, unfit)

    def _read(self, worker: _Worker, fetches: Sequence[PendingFetch]) -> None:
        call = functools.partial(self._call, worker)
        started = time.perf_counter()
        with self._lock:
            worker.fetches = fetches
        try:
            values = self._commands.read(call, [fetch.key for fetch in fetches])
        except LinkFailed as failed:
            failure = FetchFailure.TIMEOUT if failed.was_timeout else FetchFailure.UNREACHABLE
            for fetch in fetches:
                self._board.fail(fetch, failure)
            return
        finally:
            with self._lock:
                worker.fetches = []
        unfit: list[ObjectKey] = []
        num_bytes = 0
        for fetch, value in zip(fetches, values, strict=True):
            outcome = self._commands.judge(value, fetch.key, fetch.namespace)
            size = len(value) if isinstance(value, bytes) else 0
            num_bytes += size
            with self._lock:
                self._num_slow = 0
                if isinstance(outcome, FetchFailure):
                    self._presence.put(fetch.key, is_present=False)
                    self._unlearn(fetch.key)
                else:
                    found = self._note_found(outcome.found, size)
            if isinstance(outcome, FetchFailure):
                self._board.fail(fetch, outcome, num_bytes=size)
                if outcome is FetchFailure.CORRUPT:
                    unfit.append(fetch.key)
            else:
                self._board.succeed(fetch, found, num_bytes=size, is_lossy=outcome.is_lossy)
        seconds = time.perf_counter() - started
        with self._lock:
            counters = self._counters
            counters.read_bytes_per_s = self._follow(counters.read_bytes_per_s, num_bytes, seconds)
        self._delete_unfit(worker, unfit)

    def _note_found(self, found: CacheObject, num_bytes: int) -> CacheObject:
        """Remember an object that came, under the lock; return it with what is left of its lifetime."""
        now = self._clock.now()
        left_s = found.expires_in_s
        before = self._known.get(found.key)
        if left_s is not None and before is not None and before.expires_at is not None:
            left_s = min(left_s, before.expires_at - now)
        self._presence.put(found.key, is_present=True, at_most_s=left_s)
        expires_at = None if left_s is None else now + left_s
        self._learn(found.key, _Known(found.namespace, found.parent, found.depth, num_bytes, expires_at))
        return dataclasses.replace(found, expires_in_s=left_s)

    def _delete_unfit(self, worker: _Worker, keys: Sequence[ObjectKey]) -> None:
        """Delete what cannot be an object, so that the next store or reader is not held up by it."""
        if not keys:
            return
        with self._lock:
            self._counters.quarantined += len(keys)
        try:
            self._commands.unlink(functools.partial(self._call, worker), keys)
        except LinkFailed:
            return  # noted in the health; the next reader finds them again

    def _try_again(self, worker: _Worker) -> None:
        """Measure Redis through the path that objects take; its health is the outcome."""
        call = functools.partial(self._call, worker)
        try:
            latency_s = self._commands.ping(call)
            with self._lock:
                self._presence.clear()  # it may have lost everything
                self._counters.latency_s = latency_s
                self._readable.notify_all()
                self._writable.notify_all()
            if self._counters.read_bytes_per_s > 0:
                return
            speed = self._commands.measure(call, latency_s)
        except LinkFailed:
            return
        if isinstance(speed, Refusal):
            self._write_health.failed(speed.fault)
            return
        with self._lock:
            self._counters.write_bytes_per_s = speed.write_bytes_per_s
            self._counters.read_bytes_per_s = speed.read_bytes_per_s

    def _try_writing(self, worker: _Worker) -> None:
        try:
            refusal = self._commands.try_writing(functools.partial(self._call, worker))
        except LinkFailed as failed:
            self._write_health.failed(failed.fault)
            return
        if refusal is not None:
            self._write_health.failed(refusal.fault)
        else:
            self._write_health.succeeded()

    def _unlink(self, worker: _Worker, keys: Sequence[ObjectKey]) -> None:
        try:
            refusal = self._commands.unlink(functools.partial(self._call, worker), keys)
        except LinkFailed:
            is_done = False
        else:
            is_done = refusal is None
            if refusal is not None:
                self._write_health.failed(refusal.fault)
        with self._lock:
            if is_done or self._is_closed:
                self._removing.difference_update(keys)
            else:
                self._to_write.extendleft(reversed(keys))  # first of all when Redis works again

    def _write(self, worker: _Worker, stores: Sequence[_Store]) -> None:
        started = time.perf_counter()
        sent: list[tuple[_Store, Outgoing]] = []
        for store in stores:
            outgoing = self._encode(store)
            if outgoing is not None:
                sent.append((store, outgoing))
        if not sent:
            return
        refusals: list[Refusal | None]
        try:
            refusals = self._commands.write(
                functools.partial(self._call, worker), [outgoing for _, outgoing in sent]
            )
        except LinkFailed as failed:
            with self._lock:
                for store, _ in sent:
                    self._end_store(store, failed.fault)
            return
        seconds = time.perf_counter() - started
        refused = next((refusal for refusal in refusals if refusal is not None), None)
        if refused is not None:
            self._write_health.failed(refused.fault)
        with self._lock:
            num_bytes = 0
            for (store, outgoing), refusal in zip(sent, refusals, strict=True):
                self._end_store(store, refusal.fault if refusal is not None else None)
                if refusal is None:
                    num_bytes += outgoing.encoded.num_bytes
                    self._counters.stored += 1
                    self._presence.put(outgoing.key, is_present=True, at_most_s=outgoing.ttl_s)
                    known = _Known(
                        store.stored.namespace,
                        store.stored.parent,
                        store.stored.depth,
                        outgoing.encoded.num_bytes,
                        store.expires_at,
                    )
                    self._learn(outgoing.key, known)
            counters = self._counters
            counters.stored_bytes += num_bytes
            counters.write_bytes_per_s = self._follow(counters.write_bytes_per_s, num_bytes, seconds)

    def _encode(self, store: _Store) -> Outgoing | None:
        """Return a store's bytes; None, and the store is over, if there is nothing to write."""
        ttl_s = self._options.default_ttl_s
        if store.expires_at is not None:
            ttl_s = min(ttl_s, store.expires_at - self._clock.now())
        if ttl_s <= 0:
            with self._lock:
                self._counters.expired += 1
                self._unreserve(store.stored.key, store.num_bytes)
            return None
        try:
            outgoing = self._commands.encode(store.stored, ttl_s)
        except (ObjectError, CodecError) as error:
            with self._lock:
                self._end_store(store, str(error))
            return None
        if outgoing.encoded.divergence is not None:
            with self._lock:
                self._divergences.append((outgoing.key, outgoing.encoded.divergence))
        return outgoing

    def _end_store(self, store: _Store, fault: str | None) -> None:
        self._unreserve(store.stored.key, store.num_bytes)
        if fault is not None:
            self._counters.store_failures += 1
            self._counters.last_fault = fault

    def _follow(self, rate: float, num_bytes: int, seconds: float) -> float:
        """Return a rate after one more batch; small batches tell nothing about it."""
        if num_bytes < self._options.batch_bytes // 4:
            return rate
        new = num_bytes / max(seconds - self._counters.latency_s, 1e-6)
        return new if rate == 0 else rate + 0.2 * (new - rate)


Job = Callable[[_Worker], None]
