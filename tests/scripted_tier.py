"""A real tier in memory whose answers come when a test lets them, and fail when it says so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcore.clock import ManualClock
from kvcore.tiers.host import HostTier
from kvcore.tiers.interface import Fetched, FetchFailure, ObjectKey, TierStats
from tests.tier_kit import FORMAT

__all__ = ["ScriptedTier"]


@dataclass
class _Waiting:
    outcome: Fetched | None
    started_at: float
    deadline: float
    is_cancelled: bool = False


class ScriptedTier(HostTier):
    """Keeps the ``Tier`` contract; ``held`` fetches wait for ``release``, and time out like any other."""

    def __init__(self, name: str, clock: ManualClock, *, persistent: bool, max_bytes: int = 1 << 20) -> None:
        super().__init__(FORMAT, max_bytes, clock=clock)
        self.name = name
        self._board._tier = name
        self.is_persistent = persistent
        self.manual_clock = clock
        self.is_held = False
        self.asked: list[ObjectKey] = []
        self.failing: dict[ObjectKey, FetchFailure] = {}
        self._waiting: dict[ObjectKey, list[_Waiting]] = {}
        self._released: set[ObjectKey] = set()
        self.speed: tuple[float, float] | None = None

    def fetch(self, key, *, namespace, timeout_s):
        if not super().fetch(key, namespace=namespace, timeout_s=1e9):
            return False
        self.asked.append(key)
        now = self.manual_clock.now()
        self._waiting.setdefault(key, []).append(_Waiting(None, now, now + timeout_s))
        return True

    def cancel(self, keys):
        for key in keys:
            for waiting in self._waiting.get(key, ()):
                waiting.is_cancelled = True

    def poll(self):
        for outcome in super().poll():
            next(w for w in self._waiting[outcome.key] if w.outcome is None).outcome = outcome
        now = self.manual_clock.now()
        arrived = []
        for key, queue in list(self._waiting.items()):
            for waiting in list(queue):
                failure = self.failing.get(key)
                if waiting.is_cancelled:
                    failure = FetchFailure.CANCELLED
                elif self.is_held and key not in self._released:
                    if now < waiting.deadline:
                        continue
                    failure = FetchFailure.TIMEOUT
                assert waiting.outcome is not None
                outcome = replace(waiting.outcome, seconds=now - waiting.started_at)
                if failure is not None:
                    outcome = replace(outcome, found=None, failure=failure, num_bytes=0)
                arrived.append(outcome)
                queue.remove(waiting)
            if not queue:
                del self._waiting[key]
        return arrived

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def release(self, *keys: ObjectKey) -> None:
        """Let these come with the next poll although others are held."""
        self._released.update(keys)

    def stats(self) -> TierStats:
        stats = super().stats()
        latency_s, rate = self.speed or (0.0, 0.0)
        return replace(stats, latency_s=latency_s, read_bytes_per_s=rate, write_bytes_per_s=rate)
