"""The pool of physical blocks."""

from __future__ import annotations

import pytest

from kvcore.blocks import BlockId, BlockPool
from kvcore.errors import IntegrityError, OutOfBlocks


def test_a_new_pool_hands_out_blocks_from_zero_up():
    assert BlockPool(4).take(3) == [0, 1, 2]


def test_the_block_given_back_last_is_taken_first():
    pool = BlockPool(4)
    pool.take(4)
    pool.give_back([BlockId(1), BlockId(3)])
    assert pool.take(2) == [3, 1]


def test_taking_too_many_changes_nothing():
    pool = BlockPool(3)
    pool.take(1)
    with pytest.raises(OutOfBlocks) as caught:
        pool.take(3)
    assert (caught.value.needed, caught.value.available) == (3, 2)
    assert pool.num_free == 2
    assert pool.take(2) == [1, 2]


def test_giving_back_twice_is_noticed():
    pool = BlockPool(2)
    pool.take(1)
    pool.give_back([BlockId(0)])
    with pytest.raises(IntegrityError, match="block 0 given back twice"):
        pool.give_back([BlockId(0)])


def test_a_pool_needs_a_block():
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)
