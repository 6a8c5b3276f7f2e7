"""Models in bounded memory: loaded on first use, once for all who wait, unloaded least recently used first.

::

                 lease, load                                 unload, or room is needed
    UNLOADED ---------------> LOADING ---------> READY ------------------------------> UNLOADED
                                 |                 |  unload with requests: DRAINING, then UNLOADED,
                                 v                 |  or READY again if they do not end in time
                              FAILED               '-- leases keep it: a model in use is never unloaded

A model's bytes are reserved before it is read, so that two loads cannot both take the last room. Room is made
candidates first: if unloading everything idle would not be enough, nothing is unloaded. A model larger than
all the memory is refused at once; one that fits but for models in use waits a while for them.

A model that an operator unloaded stays so until an operator has loaded it. A failed load is not tried again
for every call: for a while calls get its error.

What must not be done with the lock held (close a model, tell who waits) is collected as calls to make, and
made as soon as the lock is let go of.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from kvcore.clock import Clock
from server.predict.catalogue import CatalogueEntry, ModelKey
from server.predict.errors import (
    ModelInUseError,
    ModelRefusedError,
    ModelTooLargeError,
    ModelUnloadedError,
    PredictError,
    PredictLostError,
    UnknownModelError,
)
from server.predict.messages import ModelPhase, ModelStatus, ReuseEvent
from server.predict.model import ModelLoader, PredictModel
from server.predict.slots import CacheCounters, MemoryLimits, Progress, Slot, again

__all__ = ["CacheCounters", "ModelCache", "ModelLease"]

log = logging.getLogger(__name__)

NUM_LOADERS = 2
ROOM_WAIT_S = 5.0
"""How long a model waits for others in use to become idle before it is refused."""
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
"""How long a failed load's error stands, doubling with each failure in a row."""

LeaseDone = Callable[["ModelLease | PredictError"], None]
StatusDone = Callable[[ModelStatus | PredictError], None]
ToDo = list[Callable[[], object]]
"""What is to be done without the lock."""

_CLOSED_REASON = "the server is shutting down"


class ModelLease:
    """A call's hold on a loaded model: it is not unloaded before it is released."""

    __slots__ = ("_cache", "load_s", "model", "slot")

    def __init__(self, cache: ModelCache, slot: Slot, model: PredictModel, load_s: float) -> None:
        self._cache = cache
        self.slot: Slot | None = slot
        """The cache's business; None once released."""
        self.model = model
        self.load_s = load_s
        """How long this lease waited for the load; 0 if the model was there."""

    @property
    def entry(self) -> CatalogueEntry:
        """Return what is held. Raises ``RuntimeError`` once released."""
        if self.slot is None:
            raise RuntimeError("the lease was released")
        return self.slot.entry

    def release(self) -> None:
        """Let go. Idempotent; any thread."""
        self._cache._release(self)


class ModelCache:
    """See the module's text. Any thread may call any method; callbacks come without a lock held."""

    def __init__(
        self,
        loader: ModelLoader,
        *,
        memory_bytes: int | None,
        max_models: int | None,
        clock: Clock,
        find_embedder: Callable[[str], CatalogueEntry],
        on_reuse_event: Callable[[ReuseEvent], None],
    ) -> None:
        """``find_embedder`` finds the model that a semantic cache names. ``None``: no limit."""
        self._loader = loader
        self._limits = MemoryLimits(memory_bytes, max_models)
        self._clock = clock
        self._find_embedder = find_embedder
        self._on_reuse_event = on_reuse_event
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._slots: dict[ModelKey, Slot] = {}
        self._pool = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="model-loader")
        self._is_closed = False
        self.counters = CacheCounters()

    @property
    def num_bytes(self) -> int:
        """Return what loaded models take and loading ones have reserved."""
        with self._lock:
            return self._taken_bytes()

    def lease(self, entry: CatalogueEntry, done: LeaseDone) -> None:
        """Hold a model: call ``done`` at once if it is loaded or cannot be, else from a loader thread."""
        with self._lock:
            answer = self._lease_now(self._slot(entry), done)
        if answer is not None:
            done(answer)

    def load(self, entry: CatalogueEntry, on_progress: Progress | None, done: StatusDone) -> None:
        """Load a model as an operator asks: also one that was unloaded, or has just failed."""
        with self._lock:
            slot = self._slot(entry)
            error: PredictError | None = None
            if self._is_closed:
                error = PredictLostError(_CLOSED_REASON)
            elif slot.phase is ModelPhase.DRAINING:
                error = ModelInUseError("the model is being unloaded")
            elif slot.phase is not ModelPhase.READY:
                if slot.phase is not ModelPhase.LOADING:
                    self._begin(slot)
                slot.listeners.append((on_progress, done))
                return
            answer = error or self._status(slot)
        done(answer)

    def unload(self, entry: CatalogueEntry, drain_s: float | None, done: StatusDone) -> None:
        """Unload a model and keep it so. ``drain_s``: let requests that run finish first; None: refuse then.

        What does not finish in time is not cut off: the model stays, and ``ModelInUseError`` is the answer.
        """
        todo: ToDo = []
        with self._lock:
            slot = self._slot(entry)
            answer: ModelStatus | PredictError | None = None
            if slot.phase is ModelPhase.LOADING:
                answer = ModelInUseError("the model is being loaded")
            elif slot.phase is ModelPhase.DRAINING:
                slot.drained.append(done)
            elif slot.num_leases and not drain_s:
                answer = ModelInUseError("requests run on the model")
            elif slot.num_leases:
                slot.phase = ModelPhase.DRAINING
                slot.drained.append(done)
                slot.num_drains += 1
                slot.drain_timer = threading.Timer(
                    drain_s or 0.0, self._stop_draining, (slot, slot.num_drains)
                )
                slot.drain_timer.daemon = True
                slot.drain_timer.start()
            else:
                slot.is_held = True
                todo = self._drop(slot)
                answer = self._status(slot)
        _carry_out(todo)
        if answer is not None:
            done(answer)

    def status(self, entry: CatalogueEntry) -> ModelStatus:
        """Return how a version stands; aliases are the catalogue's to add (``Catalogue.named``)."""
        with self._lock:
            return self._status(self._slot(entry))

    def loaded(self) -> list[ModelStatus]:
        """Return how the versions stand that are loaded now."""
        loaded = (ModelPhase.READY, ModelPhase.DRAINING)
        with self._lock:
            return [self._status(slot) for slot in self._slots.values() if slot.phase in loaded]

    def loaded_model(self, entry: CatalogueEntry) -> PredictModel | None:
        """Return the model if it is loaded; it may be closed any time: for looking at reports alone."""
        with self._lock:
            slot = self._slots.get(entry.key)
            return None if slot is None else slot.model

    def forget(self, entry: CatalogueEntry) -> None:
        """Remember nothing more of a version that is out of the catalogue, unless it is loaded again."""
        with self._lock:
            slot = self._slots.get(entry.key)
            if slot is not None and slot.phase is ModelPhase.FAILED and slot.entry == entry:
                del self._slots[entry.key]

    def close(self) -> None:
        """Refuse new leases, wait for loads that run, and close every model. Leases must have ended.

        Loads that have not begun, and drains, are given up, and those who wait for them are told.
        """
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()
            todo: ToDo = []
            for slot in self._slots.values():
                if slot.drain_timer is not None:
                    slot.drain_timer.cancel()
                todo += self._abandon(slot)
        _carry_out(todo)
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            todo = [do for slot in self._slots.values() for do in self._drop(slot)]
        _carry_out(todo)

    # -- with the lock held -------------------------------------------------------------------------

    def _slot(self, entry: CatalogueEntry) -> Slot:
        slot = self._slots.get(entry.key)
        is_idle = slot is not None and slot.phase in (ModelPhase.UNLOADED, ModelPhase.FAILED)
        # The catalogue may have withdrawn a version and have another under its number.
        if slot is None or (is_idle and slot.entry != entry):
            slot = self._slots[entry.key] = Slot(entry)
        return slot

    def _lease_now(self, slot: Slot, done: LeaseDone) -> ModelLease | PredictError | None:
        """Return a lease or why there is none; None: ``done`` waits for the load."""
        if self._is_closed:
            return PredictLostError(_CLOSED_REASON)
        if slot.phase is ModelPhase.READY:
            return self._new_lease(slot, 0.0)
        if slot.phase is ModelPhase.DRAINING or slot.is_kept_unloaded:
            return ModelUnloadedError("the model was unloaded; it must be loaded again first")
        if slot.phase is ModelPhase.FAILED and slot.error is not None:
            left_s = slot.retry_at - self._clock.now()
            if left_s > 0:
                return again(slot.error, retry_after_s=left_s)
        if slot.phase is not ModelPhase.LOADING:
            self._begin(slot)
        slot.waiting.append((done, self._clock.now()))
        return None

    def _new_lease(self, slot: Slot, load_s: float) -> ModelLease:
        assert slot.model is not None
        slot.num_leases += 1
        slot.num_requests += 1
        slot.used_s = self._clock.now()
        return ModelLease(self, slot, slot.model, load_s)

    def _begin(self, slot: Slot) -> None:
        # First of all: without a thread it is not being loaded. The thread waits for the lock.
        self._pool.submit(self._load_queued, slot)
        self._mark_loading(slot)
        slot.is_queued = True

    def _mark_loading(self, slot: Slot) -> None:
        slot.phase = ModelPhase.LOADING
        slot.fault = ""
        slot.error = None

    def _abandon(self, slot: Slot) -> ToDo:
        """Give up what waits for a load that has not begun, or for a drain."""
        tell: list[Callable[[ModelStatus | PredictError], None]] = [*slot.drained]
        slot.drained.clear()
        if slot.is_queued:
            slot.is_queued, slot.phase = False, ModelPhase.UNLOADED
            tell += [done for done, _since_s in slot.waiting]
            tell += [done for _progress, done in slot.listeners]
            slot.waiting.clear()
            slot.listeners.clear()
        return [partial(done, PredictLostError(_CLOSED_REASON)) for done in tell]

    def _drop(self, slot: Slot) -> ToDo:
        """Take the model out of its slot, and with it its hold on another one."""
        model, slot.model = slot.model, None
        slot.phase = ModelPhase.UNLOADED
        slot.fault = ""
        slot.num_bytes = 0
        todo: ToDo = [] if model is None else [model.close]
        embedder, slot.embedder = slot.embedder, None
        if embedder is not None and embedder.slot is not None:
            held, embedder.slot = embedder.slot, None
            todo += self._let_go(held)
        self._changed.notify_all()
        return todo

    def _let_go(self, slot: Slot) -> ToDo:
        """Take back a lease; the last one of a model that is drained ends it."""
        slot.num_leases -= 1
        slot.used_s = self._clock.now()
        if slot.num_leases:
            return []
        self._changed.notify_all()
        if slot.phase is not ModelPhase.DRAINING:
            return []
        done, slot.drained = slot.drained, []
        if slot.drain_timer is not None:
            slot.drain_timer.cancel()
        slot.is_held = True
        todo = self._drop(slot)
        status = self._status(slot)
        return [*todo, *(partial(tell, status) for tell in done)]

    def _taken_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self._slots.values())

    def _status(self, slot: Slot) -> ModelStatus:
        spec = slot.entry.spec
        return ModelStatus(
            name=spec.name,
            version=spec.version,
            phase=slot.phase,
            source_kind=slot.entry.source_kind,
            info=slot.info,
            load_s=slot.load_s,
            num_running=slot.num_leases,
            num_requests=slot.num_requests,
            idle_s=None if slot.used_s is None else max(0.0, self._clock.now() - slot.used_s),
            held=slot.is_kept_unloaded,
            fault=slot.fault,
        )

    # -- leases that end ----------------------------------------------------------------------------

    def _release(self, lease: ModelLease) -> None:
        with self._lock:
            slot, lease.slot = lease.slot, None
            todo = [] if slot is None else self._let_go(slot)
        _carry_out(todo)

    def _stop_draining(self, slot: Slot, number: int) -> None:
        """Keep the model after all: its requests did not end in time."""
        with self._lock:
            if slot.phase is not ModelPhase.DRAINING or slot.num_drains != number:
                return  # it ended when the timer was on its way
            done, slot.drained = slot.drained, []
            slot.phase = ModelPhase.READY
            self._changed.notify_all()
        _carry_out([partial(tell, ModelInUseError("requests still run on the model")) for tell in done])

    # -- loading, in a loader thread ----------------------------------------------------------------

    def _load_queued(self, slot: Slot) -> None:
        with self._lock:
            if not slot.is_queued:
                return  # another loader thread could not wait for it, or nobody does any more
            slot.is_queued = False
        self._load(slot)

    def _load(self, slot: Slot) -> None:
        started_s = self._clock.now()
        try:
            self._fill(slot)
        except PredictError as error:
            self._fail(slot, error)
        except Exception:
            log.exception("model %s version %s cannot be loaded", *slot.names)
            self._fail(slot, ModelRefusedError("the model could not be loaded; the server's log says why"))
        else:
            self._finish(slot, started_s)

    def _fill(self, slot: Slot) -> None:
        spec = slot.entry.spec

        def on_progress(phase: str, num_done: int, num_total: int) -> None:
            with self._lock:
                listeners, status = list(slot.listeners), self._status(slot)
            for tell, _done in listeners:
                if tell is not None:
                    tell(status, phase, num_done, num_total)

        def on_reuse_event(event: ReuseEvent) -> None:
            self._on_reuse_event(msgspec.structs.replace(event, model=spec.name, version=spec.version))

        self._make_room(slot, self._loader.size(spec, on_progress=on_progress))
        if spec.semantic is not None:
            slot.embedder = self._lease_embedder(slot.entry, spec.semantic.embedder)
        model = self._loader.load(
            spec,
            on_progress=on_progress,
            on_reuse_event=on_reuse_event,
            embedder=None if slot.embedder is None else slot.embedder.model,
        )
        try:
            if model.info.num_bytes > slot.num_bytes:
                self._make_room(slot, model.info.num_bytes)
        except BaseException:
            model.close()
            raise
        with self._lock:
            slot.model = model
            slot.info = model.info
            slot.num_bytes = model.info.num_bytes
            self._changed.notify_all()

    def _lease_embedder(self, entry: CatalogueEntry, name: str) -> ModelLease:
        """Load the embedder here and now unless a thread is at it: it must not wait for one like itself.

        That it is in the queue is not enough: all the threads may be here. An embedder has no embedder, so a
        load of one that has begun ends.
        """
        try:
            embedder = self._find_embedder(name)
        except UnknownModelError as error:
            raise ModelRefusedError("the embedder of its semantic cache is not served here") from error
        if embedder.spec.semantic is not None or embedder.key == entry.key:
            raise ModelRefusedError("the embedder of a semantic cache must not have one itself")
        answers: queue.SimpleQueue[ModelLease | PredictError] = queue.SimpleQueue()
        with self._lock:
            slot = self._slot(embedder)
            while slot.phase is ModelPhase.DRAINING and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                raise PredictLostError(_CLOSED_REASON)
            if slot.phase is ModelPhase.READY:
                return self._new_lease(slot, 0.0)
            if slot.is_kept_unloaded:
                raise ModelUnloadedError("the embedder of the semantic cache was unloaded")
            slot.waiting.append((answers.put, self._clock.now()))
            is_begun = slot.phase is ModelPhase.LOADING and not slot.is_queued
            if not is_begun:
                slot.is_queued = False
                self._mark_loading(slot)
        if not is_begun:
            self._load(slot)
        answer = answers.get()
        if isinstance(answer, PredictError):
            raise answer
        return answer

    def _make_room(self, slot: Slot, num_bytes: int | None) -> None:
        """Reserve, and unload idle models for it. Raises ``ModelTooLargeError``."""
        needed = num_bytes or 0
        if not self._limits.can_ever_hold(needed):
            raise ModelTooLargeError("the model is larger than the memory for models")
        end_s = self._clock.now() + ROOM_WAIT_S
        with self._lock:
            while True:
                slot.num_bytes, slot.has_reserved = 0, False
                victims = self._limits.choose_victims(self._slots.values(), slot, needed)
                if victims is not None:
                    break
                left_s = end_s - self._clock.now()
                if self._is_closed or left_s <= 0 or not self._changed.wait(left_s):
                    raise ModelTooLargeError(
                        "the memory for models is held by models in use", retry_after_s=ROOM_WAIT_S
                    )
            slot.num_bytes, slot.has_reserved = needed, True
            todo = [do for victim in victims for do in self._drop(victim)]
            self.counters.num_evictions += len(victims)
        for victim in victims:
            log.info("unloaded model %s version %s to make room", *victim.names)
        _carry_out(todo)

    def _finish(self, slot: Slot, started_s: float) -> None:
        with self._lock:
            now_s = self._clock.now()
            slot.phase, slot.has_reserved = ModelPhase.READY, False
            slot.load_s = now_s - started_s
            slot.num_failures = 0
            slot.is_held = False
            # Who loads it means to use it: it must not be the first to go.
            slot.used_s = now_s
            self.counters.num_loads += 1
            self.counters.load_s += slot.load_s
            leases = [(done, self._new_lease(slot, now_s - since_s)) for done, since_s in slot.waiting]
            listeners, slot.waiting, slot.listeners = slot.listeners, [], []
            status = self._status(slot)
            self._changed.notify_all()
        log.info("loaded model %s version %s in %.2f s", *slot.names, slot.load_s)
        _carry_out([partial(give, lease) for give, lease in leases])
        _carry_out([partial(tell, status) for _progress, tell in listeners])

    def _fail(self, slot: Slot, error: PredictError) -> None:
        with self._lock:
            embedder, slot.embedder = slot.embedder, None
            slot.phase, slot.has_reserved = ModelPhase.FAILED, False
            slot.num_bytes = 0
            slot.num_failures += 1
            slot.fault = error.reason
            slot.error = error
            backoff_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(slot.num_failures - 1, 10))
            if error.retry_after_s is not None:  # it may work by then, and so callers are told
                backoff_s = min(backoff_s, error.retry_after_s)
            slot.retry_at = self._clock.now() + backoff_s
            self.counters.num_failed_loads += 1
            waiting, slot.waiting = slot.waiting, []
            listeners, slot.listeners = slot.listeners, []
            self._changed.notify_all()
        log.warning("model %s version %s cannot be loaded: %s", *slot.names, error.reason)
        if embedder is not None:
            embedder.release()
        _carry_out([partial(done, again(error)) for done, _since_s in waiting])
        _carry_out([partial(tell, again(error)) for _progress, tell in listeners])


def _carry_out(todo: Iterable[Callable[[], object]]) -> None:
    """Make the calls, all of them. Never with the lock held."""
    for do in todo:
        try:
            do()
        except Exception:
            log.exception("a model was not closed, or nobody told of it, as it should be")
