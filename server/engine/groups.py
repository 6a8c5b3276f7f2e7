"""Find which sequences of a plan share leading blocks.

Sorted by block table, sequences that share a prefix are neighbours (this *is* depth-first order), and
the shared ranges form a forest. It is read off the lengths shared by neighbours, the way intervals are
read off a suffix array::

    tables      [1 2 3]  [1 2 3]  [1 2 7]  [9]          groups   [0,3) blocks [0,2)
    shared          3        2        0                           [0,2) blocks [2,3)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from server.engine.plan import PrefixGroup

__all__ = ["find_groups", "shared_length"]


def shared_length(left: array[int], right: array[int], limit: int) -> int:
    """Return how many leading entries agree, at most ``limit``. Sharing is prefix-closed, so it bisects."""
    if limit == 0 or left[0] != right[0]:
        return 0
    low, high = 1, limit  # the first ``low`` agree
    while low < high:
        middle = (low + high + 1) // 2
        if left[middle - 1] == right[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def find_groups(tables: Sequence[array[int]], shareable: Sequence[int]) -> list[PrefixGroup]:
    """Return the laminar groups of sequences that share blocks, parents first.

    ``tables`` are sorted; ``shareable[i]`` is how many leading blocks of sequence ``i`` lie wholly before
    its first token to compute, so that it may attend to them without a mask.
    """
    groups: list[PrefixGroup] = []
    stack: list[tuple[int, int]] = []  # (first member, number of blocks shared by all since), increasing
    for index in range(1, len(tables) + 1):
        shared = 0
        if index < len(tables):
            limit = min(shareable[index - 1], shareable[index])
            shared = shared_length(tables[index - 1], tables[index], limit)
        start = index - 1
        while stack and stack[-1][1] > shared:
            start, depth = stack.pop()
            outer = max(shared, stack[-1][1] if stack else 0)
            groups.append(PrefixGroup(start, index, outer, depth))
        if shared > (stack[-1][1] if stack else 0):
            stack.append((start, shared))
    groups.sort(key=lambda g: (g.start, -g.stop, g.first_block))
    return groups
