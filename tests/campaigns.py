"""How much a random campaign does: enough in every run to find what breaks, all of it in a search.

``HYPOTHESIS_PROFILE=search make test ARGS=...`` runs campaigns in full, and lets hypothesis look for new
examples.
"""

from __future__ import annotations

import os

__all__ = ["cases"]

IS_SEARCH = os.environ.get("HYPOTHESIS_PROFILE") == "search"


def cases(quick: int, *, full: int) -> int:
    """Return how many cases to go through: ``full`` of them in a search."""
    return full if IS_SEARCH else quick
