"""What is counted, by namespace and in all, and that it adds up."""

from __future__ import annotations

import pytest

from kvcore.events import LeaveCause
from kvcore.keys import NamespaceKey
from kvcore.spaces import SpaceTable
from tests.cache_kit import HOME, CacheKit

A, B, C = [1] * 4, [2] * 4, [3] * 4


def test_requests_are_counted_by_where_their_tokens_came_from():
    kit = CacheKit()
    kit.cache.cost = lambda start, stop: 0.01 * (stop - start)
    kit.request([*A, *B, 9, 9])
    kit.request([*A, *B, 9, 8])  # two blocks and one token of the third
    kit.request([*A, *B, 9, 9])  # an exact repeat
    totals = kit.cache.tree.spaces.totals()
    assert (totals.requests, totals.hits, totals.prompt_tokens) == (3, 2, 30)
    assert totals.cached_block_tokens == 16
    assert (totals.cached_partial_tokens, totals.cached_tail_tokens) == (1, 2)
    assert totals.time_saved_s == pytest.approx(0.19)


def test_restored_tokens_are_none_of_the_cached_and_cost_their_time():
    kit = CacheKit()
    kit.cache.cost = lambda start, stop: 0.01 * (stop - start)
    kit.compute([*A, *B])
    lease = kit.start([*A, *B, 9])
    kit.cache.count_request(lease, restored_tokens=4, restore_s=0.03)
    totals = kit.cache.tree.spaces.get(HOME).totals
    assert (totals.cached_block_tokens, totals.restored_tokens) == (4, 4)
    assert totals.time_saved_s == pytest.approx(0.05)


def test_every_block_that_came_is_there_or_has_gone_for_a_reason():
    kit = CacheKit(8)
    kit.request([*A, *B, 9])
    kit.request(C, lifetime_s=1.0)
    kit.clock.advance(2.0)
    kit.cache.sweep_expired()
    kit.cache.evict(1)
    kit.cache.control.take_out(kit.cache.control.select(below=[kit.node([*A, *B])]).nodes)
    failed = kit.plan(kit.open([7] * 5))
    kit.cache.roll_back([failed])
    kit.cache.check_integrity()
    totals = kit.cache.tree.spaces.totals()
    assert totals.inserted_blocks == 5  # A, B, the 9, C, and the full one of the step that failed
    assert totals.evicted_blocks == {LeaveCause.CAPACITY: 1, LeaveCause.ADMIN: 1}
    assert (totals.expired_blocks, totals.discarded_blocks) == (1, 1)
    assert kit.cache.tree.num_nodes == totals.inserted_blocks - totals.left_blocks == 1


def test_counters_outlive_the_blocks_of_a_namespace():
    kit = CacheKit()
    kit.request([*A, 9])
    kit.cache.clear()
    assert not kit.cache.tree.roots
    assert kit.cache.tree.spaces.get(HOME).totals.requests == 1
    kit.request([*A, 9])
    assert kit.cache.tree.spaces.get(HOME).totals.requests == 2


def test_any_number_of_salts_keeps_the_table_bounded_and_the_sum_right():
    kit = CacheKit(4)
    kit.cache.tree.spaces._max_spaces = 50
    for number in range(1000):
        kit.request([number % 7, 5], namespace=NamespaceKey("model", salt=str(number)))
    spaces = kit.cache.tree.spaces
    assert len(spaces) <= 50 + 2 * 64
    assert len(kit.cache.tree.roots) <= 2 * 64
    assert spaces.totals().requests == 1000
    assert spaces.other.requests > 800


def test_the_least_recently_used_namespace_is_forgotten_first():
    table = SpaceTable(max_spaces=2)
    one, two, three = (NamespaceKey("m", salt=s) for s in ("1", "2", "3"))
    table.use(one).totals.requests = 5
    table.use(two)
    table.use(one)
    table.use(three)
    assert [table.get(key) is None for key in (one, two, three)] == [False, True, False]
    assert (table.totals().requests, table.other.requests) == (5, 0)


def test_an_id_is_stable_and_tells_nothing():
    space = SpaceTable().use(NamespaceKey("m", salt="acme"))
    assert space.id == NamespaceKey("m", salt="acme").seed().hex()[:16]
    assert 0.0 <= space.position < 1.0
