"""The slots of the model cache under their one lock: leases, drains, and what leaves memory when they end.

::

    release --> let_go --> settle --> finish (a drain ends well) --> drop --> let_go (of the embedder) --> ...
    the drain's timer ------------> give_up

Methods are called with the lock held unless they say otherwise. What must not be done with it held (close a
model, tell who waits) is returned as calls to make, and :func:`carry_out` makes them as soon as it is let go
of.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from functools import partial

from kvcore.clock import Clock
from server.predict.catalogue import CatalogueEntry, ModelKey
from server.predict.errors import ModelInUseError, PredictError
from server.predict.messages import ModelPhase, ModelStatus
from server.predict.model import PredictModel
from server.predict.slots import CacheCounters, Drain, MemoryLimits, Slot

__all__ = ["ModelLease", "Shelf", "ToDo", "carry_out"]

log = logging.getLogger(__name__)

ToDo = list[Callable[[], object]]
"""What is to be done without the lock."""


class ModelLease:
    """A call's hold on a loaded model: it is not unloaded before it is released."""

    __slots__ = ("_shelf", "load_s", "model", "slot")

    def __init__(self, shelf: Shelf, slot: Slot, model: PredictModel, load_s: float) -> None:
        self._shelf = shelf
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
        """Let go. Idempotent; any thread, without the lock."""
        shelf = self._shelf
        with shelf.lock:
            slot, self.slot = self.slot, None
            todo = [] if slot is None else shelf.let_go(slot)
        carry_out(todo)


class Shelf:
    """See the module's text."""

    def __init__(self, limits: MemoryLimits, clock: Clock) -> None:
        self.limits = limits
        self.clock = clock
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        """Notified when there may be more room, or the end has come."""
        self.slots: dict[ModelKey, Slot] = {}
        self.counters = CacheCounters()
        self.is_closed = False

    def slot(self, entry: CatalogueEntry) -> Slot:
        """Return a version's slot, also of one that was never asked for."""
        slot = self.slots.get(entry.key)
        is_idle = (
            slot is not None and slot.phase in (ModelPhase.UNLOADED, ModelPhase.FAILED) and not slot.drains
        )
        # The catalogue may have withdrawn a version and have another under its number.
        if slot is None or (is_idle and slot.entry != entry):
            slot = self.slots[entry.key] = Slot(entry)
        return slot

    def status(self, slot: Slot) -> ModelStatus:
        """Return how a version stands."""
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
            idle_s=None if slot.used_s is None else max(0.0, self.clock.now() - slot.used_s),
            held=slot.is_kept_unloaded,
            fault=slot.fault,
        )

    def taken_bytes(self) -> int:
        """Return what loaded models take and loading ones have reserved."""
        return sum(slot.num_bytes for slot in self.slots.values())

    # -- leases -------------------------------------------------------------------------------------

    def new_lease(self, slot: Slot, load_s: float) -> ModelLease:
        """Hold a model that is READY."""
        assert slot.model is not None
        slot.num_leases += 1
        slot.num_requests += 1
        slot.used_s = self.clock.now()
        return ModelLease(self, slot, slot.model, load_s)

    def let_go(self, slot: Slot) -> ToDo:
        """Take back a lease; the last one of what is drained ends the drain."""
        slot.num_leases -= 1
        slot.used_s = self.clock.now()
        if slot.num_leases == 0:
            self.changed.notify_all()
        return self._settle(slot) if slot.drains else []

    def drop(self, slot: Slot) -> ToDo:
        """Take the model out of its slot, and with it its hold on another one and on its files."""
        model, slot.model = slot.model, None
        found, slot.found = slot.found, None
        slot.phase = ModelPhase.UNLOADED
        slot.fault = ""
        slot.num_bytes, slot.has_reserved = 0, False
        todo: ToDo = []
        if model is not None:
            todo.append(model.close)
        if found is not None:
            todo.append(found.close)
        embedder, slot.embedder = slot.embedder, None
        if embedder is not None and embedder.slot is not None:
            held, embedder.slot = embedder.slot, None
            todo += self.let_go(held)
        self.changed.notify_all()
        return todo

    # -- drains -------------------------------------------------------------------------------------

    def begin_drain(self, drain: Drain, drain_s: float) -> None:
        """Lease nothing more of its versions; they are unloaded when the last lease ends, or go on later."""
        timer = threading.Timer(min(drain_s, threading.TIMEOUT_MAX), self._stop_draining, (drain,))
        timer.daemon = True
        # First of all: without a thread it would never be given up. The thread waits for the lock.
        timer.start()
        drain.timer = timer
        for slot in drain.slots:
            slot.drains.append(drain)
            if slot.phase is ModelPhase.READY:
                slot.phase = ModelPhase.DRAINING

    def finish(self, drain: Drain) -> ToDo:
        """Unload all versions of a drain (that none of them is in use is known) and keep them so."""
        todo = self._end(drain)
        # What holds another one is closed before it.
        for slot in sorted(drain.slots, key=lambda slot: slot.embedder is None):
            slot.is_held = True
            todo += self.drop(slot)
        for slot in drain.slots:
            todo += self._settle(slot)  # others may have waited for the same
        return [*todo, partial(drain.done, tuple(map(self.status, drain.slots)))]

    def give_up(self, drain: Drain, error: PredictError) -> ToDo:
        """Let all versions of a drain go on, and tell who asked for it."""
        todo = self._end(drain)
        for slot in drain.slots:
            if slot.phase is ModelPhase.DRAINING and not slot.drains:
                slot.phase = ModelPhase.READY
        self.changed.notify_all()
        return [*todo, partial(drain.done, error)]

    def in_use(self, drain: Drain, run: str) -> ModelInUseError:
        """Return the error that says what keeps a drain's versions: requests ``run`` on them, and caches."""
        busy = drain.busy()
        reason = f"requests {run} on {drain.name(busy)}"
        holders = sorted(
            slot.entry.spec.name
            for slot in self.slots.values()
            if slot.embedder is not None and slot.embedder.slot in busy
        )
        if holders:
            reason += f", which embeds for the semantic cache of {', '.join(holders)}"
        return ModelInUseError(reason if len(drain.slots) == 1 else f"{reason}; no version was unloaded")

    def _end(self, drain: Drain) -> ToDo:
        drain.is_over = True
        if drain.timer is not None:
            drain.timer.cancel()
        todo: ToDo = []
        for slot in drain.slots:
            if drain in slot.drains:
                slot.drains.remove(drain)
            if not slot.drains:
                todo += slot.after_drains
                slot.after_drains.clear()
        return todo

    def _settle(self, slot: Slot) -> ToDo:
        todo: ToDo = []
        for drain in tuple(slot.drains):
            if not drain.is_over and not drain.busy():
                todo += self.finish(drain)
        return todo

    def _stop_draining(self, drain: Drain) -> None:
        """Keep the versions after all, all of them: requests did not end in time. Without the lock."""
        with self.lock:
            if drain.is_over:
                return  # it ended when the timer was on its way
            todo = self.give_up(drain, self.in_use(drain, "still run"))
        carry_out(todo)


def carry_out(todo: Iterable[Callable[[], object]]) -> None:
    """Make the calls, all of them. Never with the lock held."""
    for do in todo:
        try:
            do()
        except Exception:
            log.exception("a model was not closed, or nobody told of it, as it should be")
