"""How a model gets into memory: in stages, so that what waits for the network holds up nobody else.

::

    begin --> find ------------------> [embedder] -------> room ---------> build ---------> READY
              fetcher threads: hub,    its own load,       loader thread   loader thread,
              MLflow; else a loader    without a thread                    one at a time
    any stage --> FAILED; what was found, held and reserved is given back

A model's bytes are reserved before it is read, so that two loads cannot both take the last room. Room is made
candidates first: if unloading everything idle would not be enough, nothing is unloaded. A model larger than
all the memory is refused at once; one that fits but for models in use waits a while for them, and for loads
that have reserved before it as long as they take.

One is built at a time: two would share the processor, and the disk.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import msgspec

from server.predict.catalogue import CatalogueEntry
from server.predict.errors import (
    ModelRefusedError,
    ModelTooLargeError,
    ModelUnloadedError,
    PredictError,
    PredictLostError,
    UnknownModelError,
)
from server.predict.messages import ModelPhase, ReuseEvent
from server.predict.model import FoundModel, LoadProgress, ModelLoader, PredictModel
from server.predict.shelf import ModelLease, Shelf, ToDo, carry_out
from server.predict.slots import Slot, again

__all__ = ["CLOSED_REASON", "Loading"]

log = logging.getLogger(__name__)

NUM_FETCHERS = 4
NUM_LOADERS = 4
"""Of these one builds; the others check files or wait for room."""
ROOM_WAIT_S = 5.0
"""How long a model waits for others in use to become idle before it is refused."""
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
"""How long a failed load's error stands, doubling with each failure in a row."""
FETCHED_KINDS = frozenset({"hub", "mlflow"})
"""Kinds of sources that may have to be fetched over the network."""
CLOSED_REASON = "the server is shutting down"

Stage = Callable[[Slot], None]


class Loading:
    """Loads what slots of ``shelf`` name. See the module's text."""

    def __init__(
        self,
        shelf: Shelf,
        loader: ModelLoader,
        *,
        find_embedder: Callable[[str], CatalogueEntry],
        on_reuse_event: Callable[[ReuseEvent], None],
    ) -> None:
        """``find_embedder`` finds the model that a semantic cache names."""
        self._shelf = shelf
        self._loader = loader
        self._find_embedder = find_embedder
        self._on_reuse_event = on_reuse_event
        self._is_building = False
        self._fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="model-fetcher")
        self._loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="model-loader")

    def begin(self, slot: Slot) -> None:
        """Begin to load. With the lock held."""
        # First of all: without a thread it is not being loaded. The thread waits for the lock.
        self._pool_of(slot).submit(self._run, slot, self._find)
        slot.phase = ModelPhase.LOADING
        slot.fault = ""
        slot.error = None
        slot.is_queued = True

    def abandon(self, slot: Slot) -> ToDo:
        """Give up a load that no thread is at, and tell who waits for it. With the lock held."""
        if not slot.is_queued:
            return []
        slot.is_queued = False
        tell = [done for done, _since_s in slot.waiting] + [done for _progress, done in slot.listeners]
        slot.waiting.clear()
        slot.listeners.clear()
        return [*self._shelf.drop(slot), *(partial(done, PredictLostError(CLOSED_REASON)) for done in tell)]

    def close(self) -> None:
        """Wait for the loads that threads are at. The shelf is closed, so that they end soon."""
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._loaders.shutdown(wait=True, cancel_futures=True)

    # -- stages, each in a thread -------------------------------------------------------------------

    def _run(self, slot: Slot, stage: Stage) -> None:
        with self._shelf.lock:
            if not slot.is_queued:
                return  # nobody waits for it any more
            slot.is_queued = False
        error = _try(stage, slot)
        if error is not None:
            if slot.has_reserved:
                # Models are full of cycles: what was read of this one would stay, and its room be given away.
                gc.collect()
            self._fail(slot, error)

    def _find(self, slot: Slot) -> None:
        slot.started_s = self._shelf.clock.now()
        report = self._progress_of(slot)

        def on_progress(phase: str, num_done: int, num_total: int) -> None:
            if self._shelf.is_closed:  # a download may have minutes to go
                raise PredictLostError(CLOSED_REASON)
            report(phase, num_done, num_total)

        slot.found = found = self._loader.find(slot.entry.spec, on_progress=on_progress)
        if not self._shelf.limits.can_ever_hold(found.num_bytes or 0):
            raise ModelTooLargeError("the model is larger than the memory for models")
        if slot.entry.spec.semantic is not None:
            self._get_embedder(slot)
        elif slot.entry.source_kind in FETCHED_KINDS:
            with self._shelf.lock:
                self._go_on(slot, self._build)
        else:
            self._build(slot)

    def _get_embedder(self, slot: Slot) -> None:
        """Hold the embedder of a semantic cache, loaded if need be; no thread waits for that.

        An embedder has no embedder, so its load ends.
        """
        semantic = slot.entry.spec.semantic
        assert semantic is not None
        try:
            entry = self._find_embedder(semantic.embedder)
        except UnknownModelError as error:
            raise ModelRefusedError("the embedder of its semantic cache is not served here") from error
        if entry.spec.semantic is not None or entry.key == slot.entry.key:
            raise ModelRefusedError("the embedder of a semantic cache must not have one itself")

        def take(answer: ModelLease | PredictError) -> None:
            if isinstance(answer, PredictError):
                self._fail_waiting(slot, answer)
                return
            with self._shelf.lock:
                is_wanted = slot.is_queued
                if is_wanted:
                    slot.embedder = answer
            if is_wanted:
                self._wake(slot, self._build)
            else:
                answer.release()

        shelf = self._shelf
        with shelf.lock:
            self._check_open()
            embedder = shelf.slot(entry)
            if embedder.drains:
                embedder.after_drains.append(partial(self._wake, slot, self._get_embedder))
                slot.is_queued = True
                return
            if embedder.is_kept_unloaded:
                raise ModelUnloadedError("the embedder of the semantic cache was unloaded")
            if embedder.phase is ModelPhase.READY:
                slot.embedder = shelf.new_lease(embedder, 0.0)
                self._go_on(slot, self._build)
                return
            if embedder.phase is not ModelPhase.LOADING:
                self.begin(embedder)
            embedder.waiting.append((take, shelf.clock.now()))
            slot.is_queued = True

    def _build(self, slot: Slot) -> None:
        found = slot.found
        assert found is not None
        self._make_room(slot, found.num_bytes or 0)
        with self._turn():
            model = self._load_found(slot, found)
        try:
            if model.info.num_bytes > slot.num_bytes:
                self._make_room(slot, model.info.num_bytes)
        except BaseException:
            model.close()
            raise
        self._finish(slot, model)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until nothing else is built. Raises ``PredictLostError`` when the shelf is closed first."""
        with self._shelf.changed:
            while self._is_building and not self._shelf.is_closed:
                self._shelf.changed.wait()
            self._check_open()
            self._is_building = True
        try:
            yield
        finally:
            with self._shelf.changed:
                self._is_building = False
                self._shelf.changed.notify_all()

    def _load_found(self, slot: Slot, found: FoundModel) -> PredictModel:
        name, version = slot.names

        def on_reuse_event(event: ReuseEvent) -> None:
            self._on_reuse_event(msgspec.structs.replace(event, model=name, version=version))

        return found.load(
            on_progress=self._progress_of(slot),
            on_reuse_event=on_reuse_event,
            embedder=None if slot.embedder is None else slot.embedder.model,
        )

    def _make_room(self, slot: Slot, needed: int) -> None:
        """Reserve, and unload idle models for it. Raises ``ModelTooLargeError``."""
        shelf = self._shelf
        if not shelf.limits.can_ever_hold(needed):
            raise ModelTooLargeError("the model is larger than the memory for models")
        end_s: float | None = None
        with shelf.lock:
            # They end, and this one could not be built before. Who has reserved waits for no others: two that
            # turn out larger would wait for each other.
            ahead = [] if slot.has_reserved else [one for one in shelf.slots.values() if one.has_reserved]
            while (victims := shelf.limits.choose_victims(shelf.slots.values(), slot, needed)) is None:
                left_s: float | None = None
                if not any(one.has_reserved for one in ahead):
                    now_s = shelf.clock.now()
                    end_s = now_s + ROOM_WAIT_S if end_s is None else end_s
                    left_s = max(0.0, end_s - now_s)
                if shelf.is_closed or not shelf.changed.wait(left_s):
                    raise ModelTooLargeError(
                        "the memory for models is held by models in use", retry_after_s=ROOM_WAIT_S
                    )
            slot.num_bytes, slot.has_reserved = needed, True
            todo = [do for victim in victims for do in shelf.drop(victim)]
            shelf.counters.num_evictions += len(victims)
        for victim in victims:
            log.info("unloaded model %s version %s to make room", *victim.names)
        carry_out(todo)

    # -- between stages -----------------------------------------------------------------------------

    def _pool_of(self, slot: Slot) -> ThreadPoolExecutor:
        return self._fetchers if slot.entry.source_kind in FETCHED_KINDS else self._loaders

    def _go_on(self, slot: Slot, stage: Stage) -> None:
        """Let a loader thread do the next stage. With the lock held."""
        self._check_open()
        self._loaders.submit(self._run, slot, stage)
        slot.is_queued = True

    def _wake(self, slot: Slot, stage: Stage) -> None:
        """Let a load go on that waited for its embedder, unless it was given up. Without the lock."""
        try:
            with self._shelf.lock:
                if slot.is_queued:
                    self._go_on(slot, stage)
        except Exception:
            log.exception("there is no thread to load model %s version %s", *slot.names)
            self._fail_waiting(slot, _unforeseen())

    def _check_open(self) -> None:
        if self._shelf.is_closed:
            raise PredictLostError(CLOSED_REASON)

    def _progress_of(self, slot: Slot) -> LoadProgress:
        def on_progress(phase: str, num_done: int, num_total: int) -> None:
            with self._shelf.lock:
                listeners, status = list(slot.listeners), self._shelf.status(slot)
            for tell, _done in listeners:
                if tell is not None:
                    tell(status, phase, num_done, num_total)

        return on_progress

    # -- the end of a load --------------------------------------------------------------------------

    def _finish(self, slot: Slot, model: PredictModel) -> None:
        shelf = self._shelf
        with shelf.lock:
            now_s = shelf.clock.now()
            slot.model = model
            slot.info = model.info
            slot.num_bytes = model.info.num_bytes
            slot.phase, slot.has_reserved = ModelPhase.READY, False
            slot.load_s = now_s - slot.started_s
            slot.num_failures = 0
            slot.is_held = False
            # Who loads it means to use it: it must not be the first to go.
            slot.used_s = now_s
            shelf.counters.num_loads += 1
            shelf.counters.load_s += slot.load_s
            leases = [(done, shelf.new_lease(slot, now_s - since_s)) for done, since_s in slot.waiting]
            listeners, slot.waiting, slot.listeners = slot.listeners, [], []
            status = shelf.status(slot)
            shelf.changed.notify_all()
        log.info("loaded model %s version %s in %.2f s", *slot.names, slot.load_s)
        carry_out([partial(give, lease) for give, lease in leases])
        carry_out([partial(tell, status) for _progress, tell in listeners])

    def _fail_waiting(self, slot: Slot, error: PredictError) -> None:
        """Fail a load that waited for its embedder, unless it was given up meanwhile. Without the lock."""
        with self._shelf.lock:
            if not slot.is_queued:
                return
            slot.is_queued = False
        self._fail(slot, error)

    def _fail(self, slot: Slot, error: PredictError) -> None:
        shelf = self._shelf
        with shelf.lock:
            todo = shelf.drop(slot)
            slot.phase = ModelPhase.FAILED
            slot.num_failures += 1
            slot.fault = error.reason
            slot.error = error
            backoff_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(slot.num_failures - 1, 10))
            if error.retry_after_s is not None:  # it may work by then, and so callers are told
                backoff_s = min(backoff_s, error.retry_after_s)
            slot.retry_at = shelf.clock.now() + backoff_s
            shelf.counters.num_failed_loads += 1
            waiting, slot.waiting = slot.waiting, []
            listeners, slot.listeners = slot.listeners, []
        log.warning("model %s version %s cannot be loaded: %s", *slot.names, error.reason)
        carry_out(todo)
        carry_out([partial(done, again(error)) for done, _since_s in waiting])
        carry_out([partial(tell, again(error)) for _progress, tell in listeners])


def _try(stage: Stage, slot: Slot) -> PredictError | None:
    """Do a stage; return why it failed, without the exception's frames, which have all that was read."""
    try:
        stage(slot)
    except PredictError as error:
        return again(error)
    except Exception:
        log.exception("model %s version %s cannot be loaded", *slot.names)
        return _unforeseen()
    return None


def _unforeseen() -> ModelRefusedError:
    return ModelRefusedError("the model could not be loaded; the server's log says why")
