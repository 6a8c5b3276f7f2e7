"""What a lossy codec did to objects, until somebody asks."""

from __future__ import annotations

import threading
from collections import deque

from kvcore.codec import Divergence
from kvcore.tiers.interface import ObjectKey

__all__ = ["DivergenceLog"]


class DivergenceLog:
    """The latest divergences, ``max_kept`` of them at most. Any thread may call any method."""

    def __init__(self, max_kept: int) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[ObjectKey, Divergence]] = deque(maxlen=max_kept)

    def note(self, key: ObjectKey, divergence: Divergence | None) -> None:
        """Keep what an encoder measured; None: its codec gives back the same bits."""
        if divergence is not None:
            with self._lock:
                self._kept.append((key, divergence))

    def take(self) -> list[tuple[ObjectKey, Divergence]]:
        """Return what was noted since the last call."""
        with self._lock:
            taken = list(self._kept)
            self._kept.clear()
            return taken
