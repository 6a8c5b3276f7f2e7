"""Say in the log that a tier is left alone, and that it is back: once each, however many notice.

A tier is opened in parts (blocks, ends of prompts), each with a ``Health`` of its own for the same use. An
outage of a use begins with the first of them that opens and ends when all are closed.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict

from kvcore.tiers.health import Health

__all__ = ["OutageLog"]

log = logging.getLogger(__name__)


class OutageLog:
    """Of one tier, shared by its parts. Healths report from any thread."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._lock = threading.Lock()
        self._healths: dict[str, list[Health]] = defaultdict(list)
        self._out: set[str] = set()

    def watch(self, health: Health, use: str = "") -> None:
        """Report the outages of a new health. ``use``: what is left alone, where that is not everything."""
        with self._lock:
            self._healths[use].append(health)
        health.on_change = lambda: self._look(use)

    def _look(self, use: str) -> None:
        suffix = f" ({use})" if use else ""
        # By what is true now, not by what was reported: reports of two threads may overtake each other.
        with self._lock:
            failing = [health for health in self._healths[use] if not health.is_available]
            if failing and use not in self._out:
                self._out.add(use)
                fault = failing[0].last_fault
                log.warning("tier %s is left alone for a while%s: %s", self._tier, suffix, fault)
            elif not failing and use in self._out:
                self._out.remove(use)
                log.info("tier %s is back%s", self._tier, suffix)
