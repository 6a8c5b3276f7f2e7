"""Prefix groups, read off sorted block tables."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from server.engine.groups import find_groups, shared_length
from server.engine.plan import PrefixGroup


def groups(*tables: list[int], shareable: list[int] | None = None) -> list[PrefixGroup]:
    arrays = [array("i", t) for t in tables]
    return find_groups(arrays, shareable or [len(t) for t in tables])


def test_nobody_shares_with_nobody():
    assert groups() == []
    assert groups([1, 2]) == []
    assert groups([1], [2], [3]) == []


def test_nested_groups_come_after_their_parents():
    assert groups([1, 2, 3], [1, 2, 3], [1, 2, 7], [9]) == [
        PrefixGroup(0, 3, 0, 2),
        PrefixGroup(0, 2, 2, 3),
    ]


def test_two_groups_side_by_side():
    assert groups([1, 2], [1, 3], [5, 6], [5, 7]) == [PrefixGroup(0, 2, 0, 1), PrefixGroup(2, 4, 0, 1)]


def test_only_blocks_before_the_first_new_token_count():
    assert groups([1, 2], [1, 2], shareable=[0, 2]) == []
    assert groups([1, 2], [1, 2], shareable=[1, 2]) == [PrefixGroup(0, 2, 0, 1)]


def test_one_that_computes_the_prefix_stays_outside_the_group_that_uses_it():
    assert groups([1, 2, 3], [1, 2, 4], [1, 2, 5], shareable=[0, 2, 2]) == [PrefixGroup(1, 3, 0, 2)]


def test_shared_length_bisects():
    left, right = array("i", range(100)), array("i", [*range(63), 999, *range(64, 100)])
    right[64:] = array("i", range(1000, 1036))
    assert shared_length(left, right, 100) == 63
    assert shared_length(left, right, 10) == 10
    assert shared_length(left, right, 0) == 0


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=12))
def test_groups_say_how_much_neighbours_share(paths):
    """A block's number stands for its whole path, as in the tree: sharing is closed towards the front."""
    numbers: dict[tuple[int, ...], int] = {}
    tables = sorted(
        [numbers.setdefault(tuple(path[: i + 1]), len(numbers)) for i in range(len(path))] for path in paths
    )
    found = groups(*tables)
    for left in range(len(tables)):
        for right in range(left + 1, len(tables)):
            common = 0
            for a, b in zip(tables[left], tables[right], strict=False):
                if a != b:
                    break
                common += 1
            covering = [g for g in found if g.start <= left and right < g.stop]
            assert max((g.last_block for g in covering), default=0) == common
    for group in found:
        assert group.stop - group.start >= 2
        assert group.first_block < group.last_block
        assert group.first_block == 0 or any(
            p.last_block == group.first_block and p.start <= group.start and group.stop <= p.stop
            for p in found
        )
