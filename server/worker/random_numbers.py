"""One uniform number per (seed, sample index, position), from a counter: no state, no order.

The three are absorbed one after another into a 64-bit state by the finalizer of SplitMix64 (Steele,
Lea and Flood 2014); the top 53 bits are the number. The same three give the same number in every
process, batch and machine.
"""

from __future__ import annotations

__all__ = ["uniform"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, sample_index: int, position: int) -> float:
    """Return a number in ``[0, 1)``; the arguments are taken modulo 2**64."""
    state = _mix(seed & _MASK)
    state = _mix(state ^ (sample_index & _MASK))
    state = _mix(state ^ (position & _MASK))
    return (state >> 11) * 2.0**-53
