"""What is known of each version of a model, what is unloaded together, and which to unload to make room."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.predict.catalogue import CatalogueEntry
from server.predict.errors import PredictError
from server.predict.messages import ModelInfo, ModelPhase, ModelStatus
from server.predict.model import FoundModel, PredictModel

__all__ = ["CacheCounters", "Drain", "Lease", "MemoryLimits", "Progress", "Slot", "UnloadDone", "again"]


Progress = Callable[[ModelStatus, str, int, int], None]
"""Called with the status, the phase of the load, bytes done and in all."""
UnloadDone = Callable[[tuple[ModelStatus, ...] | PredictError], None]


class Lease(Protocol):
    """A hold on another model."""

    slot: Slot | None
    """What is held; None once it is let go of."""

    @property
    def model(self) -> PredictModel: ...

    def release(self) -> None:
        """Let go."""
        ...


@dataclass(slots=True)
class CacheCounters:
    """Since the start."""

    num_loads: int = 0
    num_failed_loads: int = 0
    num_evictions: int = 0
    load_s: float = 0.0


@dataclass(slots=True, eq=False)
class Slot:
    """What is known of one version."""

    entry: CatalogueEntry
    phase: ModelPhase = ModelPhase.UNLOADED
    found: FoundModel | None = None
    """What its files are held by: from the time that they were found until it is unloaded."""
    model: PredictModel | None = None
    info: ModelInfo | None = None
    num_bytes: int = 0
    """Reserved or taken."""
    num_leases: int = 0
    num_requests: int = 0
    used_s: float | None = None
    started_s: float = 0.0
    """When its load began."""
    load_s: float = 0.0
    is_held: bool = False
    """Unloaded by an operator, and not loaded by one since."""
    is_queued: bool = False
    """It is LOADING, and no thread is at it: it waits for one, or for its embedder."""
    fault: str = ""
    error: PredictError | None = None
    retry_at: float = 0.0
    num_failures: int = 0
    waiting: list[tuple[Callable[[Any], None], float]] = field(default_factory=list)
    """Leases asked for while it loads, and since when."""
    listeners: list[tuple[Progress | None, Callable[[Any], None]]] = field(default_factory=list)
    drains: list[Drain] = field(default_factory=list)
    """It is unloaded when one of them ends well. Until all are over nothing is leased and nothing loaded."""
    after_drains: list[Callable[[], None]] = field(default_factory=list)
    """What to call when there is none any more."""
    embedder: Lease | None = None

    has_reserved: bool = False
    """It is being loaded and counts as a model already."""

    @property
    def takes_room(self) -> bool:
        return self.has_reserved or self.phase in (ModelPhase.READY, ModelPhase.DRAINING)

    @property
    def is_kept_unloaded(self) -> bool:
        """Say whether calls do not load it: an operator must."""
        return self.is_held and self.phase is not ModelPhase.LOADING

    @property
    def names(self) -> tuple[str, str]:
        """Return name and version, for the log."""
        return self.entry.spec.name, self.entry.spec.version


@dataclass(slots=True, eq=False)
class Drain:
    """Versions that are unloaded together, as soon as none of them is used, or not at all."""

    slots: Sequence[Slot]
    done: UnloadDone
    timer: threading.Timer | None = None
    is_over: bool = False

    def busy(self) -> list[Slot]:
        """Return those in use. What only others of them hold goes with these."""
        held = Counter(id(slot.embedder.slot) for slot in self.slots if slot.embedder is not None)
        return [slot for slot in self.slots if slot.num_leases > held[id(slot)]]

    def name(self, some: Sequence[Slot]) -> str:
        """Return how an error calls some of them."""
        if len(self.slots) == 1:
            return "the model"
        versions = [slot.entry.spec.version for slot in some]
        return f"{'version' if len(versions) == 1 else 'versions'} {', '.join(versions)}"


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """How much may be loaded; None: no limit."""

    num_bytes: int | None
    num_models: int | None

    def can_ever_hold(self, needed: int) -> bool:
        """Say whether a model of ``needed`` bytes fits into the memory when it has it for itself."""
        return self.num_bytes is None or needed <= self.num_bytes

    def choose_victims(self, slots: Iterable[Slot], loading: Slot, needed: int) -> list[Slot] | None:
        """Return what to unload so that ``loading`` has room, the least recently used first.

        What only idle models hold goes as well, after them. None: unloading everything idle would not be
        enough.
        """
        others = [slot for slot in slots if slot is not loading]
        num_bytes = needed + sum(slot.num_bytes for slot in others)
        num_models = 1 + sum(slot.takes_room for slot in others)
        idle = [slot for slot in others if _may_leave(slot) and not slot.num_leases]
        idle.sort(key=lambda slot: -1.0 if slot.used_s is None else slot.used_s)
        num_leases = {id(slot): slot.num_leases for slot in others}
        victims: list[Slot] = []
        while self._are_exceeded(num_bytes, num_models):
            if len(victims) == len(idle):
                return None
            victim = idle[len(victims)]
            victims.append(victim)
            num_bytes -= victim.num_bytes
            num_models -= 1
            held = None if victim.embedder is None else victim.embedder.slot
            if held is not None:
                num_leases[id(held)] -= 1
                if not num_leases[id(held)] and _may_leave(held):
                    idle.append(held)
        return victims

    def _are_exceeded(self, num_bytes: int, num_models: int) -> bool:
        too_many = self.num_models is not None and num_models > self.num_models
        return too_many or (self.num_bytes is not None and num_bytes > self.num_bytes)


def _may_leave(slot: Slot) -> bool:
    # One that is drained with others in use is idle already, and would be unloaded soon.
    return slot.phase in (ModelPhase.READY, ModelPhase.DRAINING)


def again(error: PredictError, *, retry_after_s: float | None = None) -> PredictError:
    """Return the error anew: one exception must not be raised in several places at once.

    ``retry_after_s`` takes the place of what it said when it was new.
    """
    copied = copy.copy(error)
    if retry_after_s is not None:
        copied.retry_after_s = retry_after_s
    return copied
