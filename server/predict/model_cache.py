"""Models in bounded memory: loaded on first use, once for all who wait, unloaded least recently used first.

::

                 lease, load                                 unload, or room is needed
    UNLOADED ---------------> LOADING ---------> READY ------------------------------> UNLOADED
                                 |                 |  unload with requests: DRAINING, then UNLOADED,
                                 v                 |  or READY again if they do not end in time
                              FAILED               '-- leases keep it: a model in use is never unloaded

Versions that are unloaded together are so at one moment, or none of them is: while one is still used the
others wait for it, loaded, and nothing new begins on any.

A model that an operator unloaded stays so until an operator has loaded it. A failed load is not tried again
for every call: for a while calls get its error.

``server.predict.shelf`` has what changes under the lock, ``server.predict.loading`` how a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from kvcore.clock import Clock
from server.predict.catalogue import CatalogueEntry
from server.predict.errors import ModelInUseError, ModelUnloadedError, PredictError, PredictLostError
from server.predict.loading import CLOSED_REASON, Loading
from server.predict.messages import ModelPhase, ModelStatus, ReuseEvent
from server.predict.model import ModelLoader, PredictModel
from server.predict.shelf import ModelLease, Shelf, ToDo, carry_out
from server.predict.slots import CacheCounters, Drain, MemoryLimits, Progress, Slot, UnloadDone, again

__all__ = ["CacheCounters", "ModelCache", "ModelLease"]

LeaseDone = Callable[[ModelLease | PredictError], None]
StatusDone = Callable[[ModelStatus | PredictError], None]


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
        self._shelf = Shelf(MemoryLimits(memory_bytes, max_models), clock)
        self._loading = Loading(
            self._shelf, loader, find_embedder=find_embedder, on_reuse_event=on_reuse_event
        )

    @property
    def counters(self) -> CacheCounters:
        """Return what has happened since the start."""
        return self._shelf.counters

    @property
    def num_bytes(self) -> int:
        """Return what loaded models take and loading ones have reserved."""
        with self._shelf.lock:
            return self._shelf.taken_bytes()

    def lease(self, entry: CatalogueEntry, done: LeaseDone) -> None:
        """Hold a model: call ``done`` at once if it is loaded or cannot be, else from a loader thread."""
        with self._shelf.lock:
            answer = self._lease_now(self._shelf.slot(entry), done)
        if answer is not None:
            done(answer)

    def load(self, entry: CatalogueEntry, on_progress: Progress | None, done: StatusDone) -> None:
        """Load a model as an operator asks: also one that was unloaded, or has just failed.

        ``on_progress`` is called at once, too: other loads may have to end before this one begins.
        """
        error: PredictError | None = None
        with self._shelf.lock:
            slot = self._shelf.slot(entry)
            if self._shelf.is_closed:
                error = PredictLostError(CLOSED_REASON)
            elif slot.drains:
                error = ModelInUseError("the model is being unloaded")
            elif slot.phase is not ModelPhase.READY:
                if slot.phase is not ModelPhase.LOADING:
                    self._loading.begin(slot)
                slot.listeners.append((on_progress, done))
            status = self._shelf.status(slot)
        if error is not None or status.phase is ModelPhase.READY:
            done(error or status)
        elif on_progress is not None:
            on_progress(status, "", 0, 0)

    def unload(self, entries: Sequence[CatalogueEntry], drain_s: float | None, done: UnloadDone) -> None:
        """Unload versions of a model, all or none, and keep them so.

        ``drain_s``: let requests that run finish first; None: refuse then. What does not finish in time is
        not cut off: everything stays, and ``ModelInUseError`` names the versions in use.
        """
        todo: ToDo = []
        error: PredictError | None = None
        with self._shelf.lock:
            drain = Drain([self._shelf.slot(entry) for entry in entries], done)
            loading = [slot for slot in drain.slots if slot.phase is ModelPhase.LOADING]
            if self._shelf.is_closed:
                error = PredictLostError(CLOSED_REASON)
            elif loading:
                error = ModelInUseError(f"{drain.name(loading)} {_is_or_are(loading)} being loaded")
            elif not drain.busy():
                todo = self._shelf.finish(drain)
            elif not drain_s:
                error = self._shelf.in_use(drain, "run")
            else:
                self._shelf.begin_drain(drain, drain_s)
        carry_out(todo)
        if error is not None:
            done(error)

    def status(self, entry: CatalogueEntry) -> ModelStatus:
        """Return how a version stands; aliases are the catalogue's to add (``Catalogue.named``)."""
        with self._shelf.lock:
            return self._shelf.status(self._shelf.slot(entry))

    def loaded(self) -> list[ModelStatus]:
        """Return how the versions stand that are loaded now."""
        loaded = (ModelPhase.READY, ModelPhase.DRAINING)
        with self._shelf.lock:
            slots = self._shelf.slots.values()
            return [self._shelf.status(slot) for slot in slots if slot.phase in loaded]

    def loaded_model(self, entry: CatalogueEntry) -> PredictModel | None:
        """Return the model if it is loaded; it may be closed any time: for looking at reports alone."""
        with self._shelf.lock:
            slot = self._shelf.slots.get(entry.key)
            return None if slot is None else slot.model

    def forget(self, entry: CatalogueEntry) -> None:
        """Remember nothing more of a version that is out of the catalogue, unless it is loaded again."""
        with self._shelf.lock:
            slot = self._shelf.slots.get(entry.key)
            is_idle = slot is not None and slot.phase is ModelPhase.FAILED and not slot.drains
            if slot is not None and is_idle and slot.entry == entry:
                del self._shelf.slots[entry.key]

    def close(self) -> None:
        """Refuse new leases, wait for loads that run, and close every model. Leases must have ended.

        Loads that no thread is at, downloads, and drains are given up, and those who wait for them are told.
        """
        shelf = self._shelf
        with shelf.lock:
            shelf.is_closed = True
            shelf.changed.notify_all()
            slots = list(shelf.slots.values())
            todo = [do for slot in slots for do in self._loading.abandon(slot)]
            for drain in {id(drain): drain for slot in slots for drain in slot.drains}.values():
                todo += shelf.give_up(drain, PredictLostError(CLOSED_REASON))
        carry_out(todo)
        self._loading.close()
        with shelf.lock:
            # What holds another one is closed before it.
            slots = sorted(shelf.slots.values(), key=lambda slot: slot.embedder is None)
            todo = list(chain.from_iterable(map(shelf.drop, slots)))
        carry_out(todo)

    def _lease_now(self, slot: Slot, done: LeaseDone) -> ModelLease | PredictError | None:
        """Return a lease or why there is none; None: ``done`` waits for the load. With the lock held."""
        shelf = self._shelf
        if shelf.is_closed:
            return PredictLostError(CLOSED_REASON)
        if slot.phase is ModelPhase.READY:
            return shelf.new_lease(slot, 0.0)
        if slot.drains or slot.is_kept_unloaded:
            return ModelUnloadedError("the model was unloaded; it must be loaded again first")
        if slot.phase is ModelPhase.FAILED and slot.error is not None:
            left_s = slot.retry_at - shelf.clock.now()
            if left_s > 0:
                return again(slot.error, retry_after_s=left_s)
        if slot.phase is not ModelPhase.LOADING:
            self._loading.begin(slot)
        slot.waiting.append((done, shelf.clock.now()))
        return None


def _is_or_are(slots: Sequence[Slot]) -> str:
    return "is" if len(slots) == 1 else "are"
