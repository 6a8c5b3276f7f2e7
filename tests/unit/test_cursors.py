"""Cursors: the tree tells waiting prompts how much of them is cached."""

from __future__ import annotations

from kvcore.cursors import Cursor
from kvcore.keys import pack_tokens
from tests.cache_kit import HOME, CacheKit

PREFIX = [1, 1, 1, 1, 2, 2, 2, 2]


def park(kit: CacheKit, tokens: list[int]) -> Cursor:
    cursor = Cursor(pack_tokens(tokens), len(tokens) - 1, None, None)
    kit.cache.park(HOME, cursor)
    return cursor


def settle(kit: CacheKit, max_moves: int = 1000) -> list[Cursor]:
    moved = kit.cache.board.settle(max_moves=max_moves, now=kit.clock.now())
    kit.cache.check_integrity()
    return moved


def test_a_cursor_starts_where_its_prompt_is_cached_to():
    kit = CacheKit()
    kit.compute(PREFIX)
    assert park(kit, [*PREFIX, 3]).num_blocks == 2
    assert park(kit, [1, 1, 1, 1, 9]).num_blocks == 1
    assert park(kit, [9]).num_blocks == 0


def test_the_last_token_of_a_prompt_is_never_matched():
    kit = CacheKit()
    kit.compute(PREFIX)
    assert park(kit, PREFIX).num_blocks == 1


def test_what_is_published_moves_those_that_wait_for_it_and_nobody_else():
    kit = CacheKit()
    one, other = park(kit, [*PREFIX, 3]), park(kit, [9, 9, 9, 9, 9])
    kit.compute(PREFIX)
    assert settle(kit) == [one]
    assert (one.num_blocks, other.num_blocks) == (2, 0)
    assert settle(kit) == []


def test_moving_is_bounded_and_goes_on_later():
    kit = CacheKit()
    cursors = [park(kit, [*PREFIX, n]) for n in range(10)]
    kit.compute(PREFIX)
    assert [len(settle(kit, 4)) for _ in range(4)] == [4, 4, 2, 0]
    assert {c.num_blocks for c in cursors} == {2}


def test_most_of_a_group_follows_its_leader_and_the_rest_finds_its_own_way():
    kit = CacheKit()
    cursors = [park(kit, [1, 1, 1, 1, last, 2, 2, 2, 3]) for last in (2, 2, 7, 2)]
    kit.compute([*PREFIX])
    settle(kit)
    assert [c.num_blocks for c in cursors] == [2, 2, 1, 2]


def test_an_eviction_sends_cursors_back_to_the_parent():
    kit = CacheKit(3)
    kit.compute(PREFIX)
    cursors = [park(kit, [*PREFIX, 3, 3, 3, n]) for n in range(3)]
    kit.cache.evict(1)
    assert {c.num_blocks for c in cursors} == {1}
    kit.cache.evict(1)
    assert {c.num_blocks for c in cursors} == {0}
    kit.compute(PREFIX)
    assert len(settle(kit)) == 3
    assert {c.num_blocks for c in cursors} == {2}


def test_cursors_of_a_displaced_node_go_to_its_successor():
    kit = CacheKit()
    holder = kit.start(PREFIX[:4], lifetime_s=1.0)
    cursor = park(kit, PREFIX)
    kit.clock.advance(2.0)
    kit.compute(PREFIX)
    assert cursor.num_blocks == 1
    kit.cache.release(holder)  # the old node goes
    assert cursor.num_blocks == 0
    assert settle(kit) == [cursor]
    assert cursor.num_blocks == 1


def test_a_step_that_fails_leaves_cursors_where_they_were():
    kit = CacheKit()
    cursor = park(kit, [*PREFIX, 3])
    lease = kit.plan(kit.open(PREFIX))
    kit.cache.roll_back([lease])
    assert settle(kit) == []
    assert cursor.num_blocks == 0


def test_leaving_is_for_good_and_may_be_repeated():
    kit = CacheKit()
    cursor = park(kit, [*PREFIX, 3])
    kit.cache.board.leave(cursor)
    kit.cache.board.leave(cursor)
    kit.compute(PREFIX)
    assert settle(kit) == []
    kit.cache.clear()
    assert not kit.cache.tree.roots
