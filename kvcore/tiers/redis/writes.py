"""A Redis tier's writing side: stores and removals, in the order in which they were handed over.

::

    engine's thread                                   the writer
      reserve -> complete --> stores    (bytes bounded) ---> encode; SET .. PX, some at a time
         |                                                      refused: writing is left alone for a while
         +-> abandon
      remove ----------------> removals (keys bounded)  ---> UNLINK, some at a time; again until it is done

    Redis fails, or refuses writes:  stores that wait are given up; removals stay

A store that waits when its key is removed is dropped. Until a key's UNLINK is done, nobody finds it here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from kvcore.codec import CodecError
from kvcore.keys import PrefixDigest
from kvcore.tiers.divergences import DivergenceLog
from kvcore.tiers.interface import CacheObject, ObjectKey, StoreTicket
from kvcore.tiers.objects import ObjectError
from kvcore.tiers.redis.commands import Outgoing
from kvcore.tiers.redis.link import LinkFailed, Refusal
from kvcore.tiers.redis.shared import RedisShared
from kvcore.tiers.redis.worker import Job, RedisWorker

__all__ = ["RedisWrites"]

_BATCH_KEYS = 512
_MAX_DIVERGENCES = 10_000


@dataclass(slots=True, eq=False)
class _Store:
    stored: CacheObject
    num_bytes: int
    """Reserved for it."""
    expires_at: float | None


class RedisWrites:
    """See the module's text."""

    def __init__(self, shared: RedisShared) -> None:
        self.divergences = DivergenceLog(_MAX_DIVERGENCES)
        self._shared = shared
        self._tickets: dict[StoreTicket, tuple[ObjectKey, int]] = {}
        self._num_tickets = 0
        self._storing: set[ObjectKey] = set()
        self._queued_bytes = 0
        self._to_write: deque[_Store | ObjectKey] = deque()
        self._removing: set[ObjectKey] = set()
        self._writing: Sequence[_Store] = ()
        """Taken from the queue by the writer the last time."""

    # ------------------------------------------------------------------------ engine's thread, under the lock

    def is_storing(self, key: ObjectKey) -> bool:
        """Say whether an object is reserved or on its way to Redis."""
        return key in self._storing

    def is_removing(self, key: ObjectKey) -> bool:
        """Say whether an object is to be removed, and maybe still there."""
        return key in self._removing

    def reserve(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        """Reserve room in the queue; None: it is there or on its way, or cannot be taken now."""
        shared = self._shared
        is_there = shared.known.is_present(key) and not shared.known.is_expired(key)
        if key in self._storing or (is_there and key not in self._removing):
            return None
        if (
            not shared.is_usable
            or not shared.write_health.is_available
            or self._queued_bytes + num_bytes > shared.options.max_queued_bytes
        ):
            shared.counters.refused_stores += 1
            return None
        self._num_tickets += 1
        ticket = StoreTicket(self._num_tickets)
        self._tickets[ticket] = (key, num_bytes)
        self._storing.add(key)
        self._queued_bytes += num_bytes
        return ticket

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        """Queue a reserved object."""
        key, num_bytes = self._tickets.pop(ticket)
        assert stored.key == key, "another object than the one that was reserved"
        expires_at = None
        if stored.expires_in_s is not None:
            expires_at = self._shared.clock.now() + stored.expires_in_s
        self._to_write.append(_Store(stored, num_bytes, expires_at))
        if self._shared.is_closed:
            self._give_up_stores()
        self._shared.writable.notify()

    def abandon(self, ticket: StoreTicket) -> None:
        """Give a reservation back."""
        self._unreserve(*self._tickets.pop(ticket))

    def select_waiting(self, namespace: PrefixDigest | None) -> list[ObjectKey]:
        """Return the objects of one namespace, or all, that wait to be written."""
        return [
            item.stored.key
            for item in self._to_write
            if isinstance(item, _Store) and namespace in (None, item.stored.namespace)
        ]

    def select_below(self, digests: Collection[PrefixDigest]) -> list[CacheObject]:
        """Return the objects on their way to Redis that belong to these prefixes or go on from one."""
        queued = [item.stored for item in self._to_write if isinstance(item, _Store)]
        on_their_way = [*queued, *(store.stored for store in self._writing)]
        return [o for o in on_their_way if o.key.digest in digests or o.parent in digests]

    def remove(self, keys: Sequence[ObjectKey]) -> None:
        """Forget objects, drop their stores and queue their removal."""
        doomed = set(keys)
        kept: deque[_Store | ObjectKey] = deque()
        for item in self._to_write:
            if isinstance(item, _Store) and item.stored.key in doomed:
                self._unreserve(item.stored.key, item.num_bytes)
            else:
                kept.append(item)
        self._to_write = kept
        for key in keys:
            self._shared.known.forget(key)
            if key not in self._removing and len(self._removing) < self._shared.options.max_known:
                self._removing.add(key)
                self._to_write.append(key)
        self._shared.writable.notify()

    # ------------------------------------------------------------------------------------------------ writer

    def next_job(self) -> Job | None:
        """Wait for work, under the lock; None: the tier is closed and what can be written is."""
        shared = self._shared
        while True:
            if not (shared.health.is_available and shared.write_health.is_available):
                self._give_up_stores()
                if shared.is_closed:
                    return None
                if shared.health.is_available and shared.write_health.may_try():
                    return self._try_writing
                shared.writable.wait(0.25)
                continue
            removals: list[ObjectKey] = []
            stores: list[_Store] = []
            room = shared.options.batch_bytes
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
                return partial(self._unlink, keys=removals)
            if stores:
                return partial(self._write, stores=stores)
            if shared.is_closed:
                return None
            shared.writable.wait()

    def _try_writing(self, worker: RedisWorker) -> None:
        write_health = self._shared.write_health
        try:
            refusal = self._shared.commands.try_writing(worker.call)
        except LinkFailed as failed:
            write_health.failed(failed.fault)
            return
        if refusal is not None:
            write_health.failed(refusal.fault)
        else:
            write_health.succeeded()

    def _unlink(self, worker: RedisWorker, keys: Sequence[ObjectKey]) -> None:
        shared = self._shared
        try:
            refusal = shared.commands.unlink(worker.call, keys)
        except LinkFailed:
            is_done = False
        else:
            is_done = refusal is None
            if refusal is not None:
                shared.write_health.failed(refusal.fault)
        with shared.lock:
            if is_done or shared.is_closed:
                self._removing.difference_update(keys)
            else:
                self._to_write.extendleft(reversed(keys))  # first of all when Redis works again

    def _write(self, worker: RedisWorker, stores: Sequence[_Store]) -> None:
        shared, counters = self._shared, self._shared.counters
        started = time.perf_counter()
        sent: list[tuple[_Store, Outgoing]] = []
        with shared.lock:
            self._writing = stores
        for store in stores:
            outgoing = self._encode(store)
            if outgoing is not None:
                sent.append((store, outgoing))
        if not sent:
            return
        refusals: list[Refusal | None]
        try:
            refusals = shared.commands.write(worker.call, [outgoing for _, outgoing in sent])
        except LinkFailed as failed:
            with shared.lock:
                for store, _ in sent:
                    self._end_store(store, failed.fault)
            return
        seconds = time.perf_counter() - started
        refused = next((refusal for refusal in refusals if refusal is not None), None)
        if refused is not None:
            shared.write_health.failed(refused.fault)
        with shared.lock:
            num_bytes = 0
            for (store, outgoing), refusal in zip(sent, refusals, strict=True):
                self._end_store(store, refusal.fault if refusal is not None else None)
                if refusal is None:
                    size = outgoing.encoded.num_bytes
                    num_bytes += size
                    counters.stored += 1
                    if outgoing.key in self._removing:
                        continue  # removed meanwhile: its removal is behind it in the queue
                    shared.known.note_stored(
                        store.stored, size, ttl_s=outgoing.ttl_s, expires_at=store.expires_at
                    )
            counters.stored_bytes += num_bytes
            counters.write_bytes_per_s = shared.follow(counters.write_bytes_per_s, num_bytes, seconds)

    def _encode(self, store: _Store) -> Outgoing | None:
        """Return a store's bytes; None, and the store is over, if there is nothing to write."""
        shared = self._shared
        ttl_s = shared.options.default_ttl_s
        if store.expires_at is not None:
            ttl_s = min(ttl_s, store.expires_at - shared.clock.now())
        if ttl_s <= 0:
            with shared.lock:
                shared.counters.expired += 1
                self._unreserve(store.stored.key, store.num_bytes)
            return None
        try:
            outgoing = shared.commands.encode(store.stored, ttl_s)
        except (ObjectError, CodecError) as error:
            with shared.lock:
                self._end_store(store, str(error))
            return None
        self.divergences.note(outgoing.key, outgoing.encoded.divergence)
        return outgoing

    # ---------------------------------------------------------------------------- any thread, under the lock

    def _give_up_stores(self) -> None:
        """Drop the stores that wait; removals stay, for when Redis works again."""
        for item in self._to_write:
            if isinstance(item, _Store):
                self._unreserve(item.stored.key, item.num_bytes)
                self._shared.counters.store_failures += 1
        self._to_write = deque(item for item in self._to_write if isinstance(item, ObjectKey))

    def _end_store(self, store: _Store, fault: str | None) -> None:
        self._unreserve(store.stored.key, store.num_bytes)
        if fault is not None:
            self._shared.counters.store_failures += 1
            self._shared.counters.last_fault = fault

    def _unreserve(self, key: ObjectKey, num_bytes: int) -> None:
        self._storing.discard(key)
        self._queued_bytes -= num_bytes
