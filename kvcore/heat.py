"""How often a prefix is used, as one number per node that fades with time.

A use is noted at the node where its match ended, and counts for everything above: the heat of a run is
the sum over its subtree, and nothing is written along the path. A node that leaves hands its heat to its
parent. Each use weighs half as much after ``HALF_LIFE_S``; noted as the base-two logarithm of a sum of
``2 ** (time / HALF_LIFE_S)``, it needs no updating as time goes by, does not overflow, and the order of
two prefixes changes only when one of them is used.
"""

from __future__ import annotations

import math

__all__ = ["HALF_LIFE_S", "add_heat", "rate_of", "use_at"]

HALF_LIFE_S = 900.0

_USES_PER_S = math.log(2) / HALF_LIFE_S
"""What one fresh use says about the rate: uses at a steady rate r sum up to ``r / _USES_PER_S``."""


def use_at(now: float) -> float:
    """Return the heat of one use at ``now``."""
    return now / HALF_LIFE_S


def add_heat(one: float | None, other: float | None) -> float | None:
    """Return the sum of two heats; None is no use at all."""
    if one is None or other is None:
        return other if one is None else one
    high, low = (one, other) if one >= other else (other, one)
    return high + math.log2(1.0 + 2.0 ** (low - high))


def rate_of(heat: float | None, now: float) -> float:
    """Return the uses per second that a heat stands for at ``now``."""
    return 0.0 if heat is None else _USES_PER_S * 2.0 ** (heat - now / HALF_LIFE_S)
