"""The orders in which entries leave the tree."""

from __future__ import annotations

import pytest

from kvcore.cursors import Cursor
from kvcore.errors import OutOfBlocks
from kvcore.keys import pack_tokens
from kvcore.node import Node
from kvcore.policies import LruPolicy
from kvcore.queues import SLACK, EvictionQueue, ExpiryQueue
from tests.cache_kit import HOME, CacheKit

A, B, C = [1] * 4, [2] * 4, [3] * 4


def test_the_least_recently_used_goes_first():
    kit = CacheKit(3)
    for prompt in (A, B, C):
        kit.compute(prompt)
    kit.compute([*A, 9])  # evicts one block for its own last one, B's, and uses A
    assert kit.cached([*A, 0])[0] == 4
    assert kit.cached([*B, 0])[0] == 0
    assert kit.cached([*C, 0])[0] == 4


def test_a_request_has_used_its_blocks_until_it_ends():
    kit = CacheKit(3)
    long = kit.start(A)
    kit.compute(B)
    kit.cache.release(long)
    kit.cache.evict(1)
    assert kit.cached([*A, 0])[0] == 4
    assert kit.cached([*B, 0])[0] == 0


def test_a_chain_goes_from_its_end():
    kit = CacheKit(4)
    kit.compute([*A, *B, *C])
    kit.cache.evict(1)
    assert kit.cached([*A, *B, *C, 0])[0] == 8
    kit.cache.evict(1)
    assert kit.cached([*A, *B, *C, 0])[0] == 4


def test_eviction_refused_changes_nothing():
    kit = CacheKit(4)
    kit.compute([*A, *B])
    holder = kit.start(C)
    with pytest.raises(OutOfBlocks) as caught:
        kit.cache.evict(3)
    assert (caught.value.needed, caught.value.available) == (3, 2)
    assert kit.cached([*A, *B, 0])[0] == 8
    assert kit.cache.counters.evicted_blocks == 0
    kit.cache.release(holder)
    kit.cache.evict(3)
    assert kit.cache.pool.num_free == 4


def test_what_a_lease_holds_is_never_evicted():
    kit = CacheKit(3)
    holder = kit.start([*A, *B])
    kit.compute(C)
    kit.cache.evict(1)
    assert kit.cached([*A, *B, 0])[0] == 8
    assert kit.cached([*C, 0])[0] == 0
    kit.cache.release(holder)


def test_what_a_waiting_request_would_use_is_spared():
    kit = CacheKit(3)
    for prompt in (A, B):
        kit.compute(prompt)
    kit.cache.park(HOME, Cursor(pack_tokens([*A, 0]), 4, None, None))
    kit.cache.evict(1)
    assert kit.cached([*A, 0])[0] == 4
    assert kit.cached([*B, 0])[0] == 0
    kit.cache.evict(1)  # nothing else is left
    assert kit.cached([*A, 0])[0] == 0


def test_an_entry_goes_when_its_lifetime_is_over():
    kit = CacheKit()
    kit.compute(A, lifetime_s=10.0)
    kit.compute(B)
    kit.clock.advance(9.9)
    assert kit.cache.sweep_expired() == 0
    kit.clock.advance(0.2)
    assert kit.cached([*A, 0])[0] == 0  # at once, before anybody sweeps
    assert kit.cache.sweep_expired() == 1
    assert kit.cached([*B, 0])[0] == 4
    assert kit.cache.counters.expired_blocks == 1


def test_what_hangs_below_an_expired_entry_goes_with_it():
    kit = CacheKit()
    kit.compute(A, lifetime_s=1.0)
    kit.compute([*A, *B])
    kit.clock.advance(2.0)
    assert kit.cache.sweep_expired() == 2
    assert kit.cache.pool.num_free == 16


def test_an_expired_entry_that_is_held_goes_when_it_is_let_go():
    kit = CacheKit()
    holder = kit.start([*A, *B], lifetime_s=1.0)
    kit.clock.advance(2.0)
    assert kit.cache.sweep_expired() == 0
    kit.cache.check_integrity()
    kit.cache.release(holder)
    assert kit.cache.pool.num_free == 16


def test_dead_entries_do_not_pile_up():
    kit = CacheKit(8)
    eviction, expiry = kit.cache._lanes._main, kit.cache._reclaimer._expiry
    for number in range(3000):
        kit.compute([number % 50] * 4, lifetime_s=1000.0)
    assert len(eviction) <= 2 * 8 + SLACK
    kit.cache.sweep_expired()
    assert len(expiry) <= 2 * 8 + SLACK


def test_an_empty_queue_says_so():
    with pytest.raises(IndexError):
        EvictionQueue[Node](LruPolicy(capacity_blocks=1)).pop(0.0)
    assert ExpiryQueue().pop_due(1e9) is None
