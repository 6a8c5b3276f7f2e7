"""Quotas: a namespace that has too much pays for it itself."""

from __future__ import annotations

import pytest

from kvcore.events import LeaveCause
from kvcore.keys import NamespaceKey
from kvcore.pins import PinKind
from tests.cache_kit import CacheKit

ONE, TWO = NamespaceKey("model", salt="one"), NamespaceKey("model", salt="two")
A, B, C, D = [1] * 4, [2] * 4, [3] * 4, [4] * 4


def space(kit: CacheKit, key: NamespaceKey):
    return kit.cache.tree.spaces.get(key)


def test_free_blocks_are_anybodys():
    kit = CacheKit(8, max_share=0.25)
    for tokens in (A, B, C):
        kit.compute(tokens, namespace=ONE)
    assert space(kit, ONE).num_blocks == 3
    assert space(kit, ONE).totals.evicted_blocks == {}


def test_who_has_more_than_its_quota_makes_room_for_itself_first():
    kit = CacheKit(4, max_share=0.5)
    kit.compute(D, namespace=TWO)
    for tokens in (A, B, C):
        kit.compute(tokens, namespace=ONE)
    kit.compute([*A, *B], namespace=ONE)
    assert kit.cached([*D, 0], namespace=TWO)[0] == 4  # although it was used longest ago
    assert space(kit, ONE).totals.evicted_blocks == {LeaveCause.QUOTA: 1}


def test_who_has_more_than_its_quota_makes_room_for_others_too():
    kit = CacheKit(4, max_share=0.5)
    kit.compute(D, namespace=TWO)
    for tokens in (A, B, C):
        kit.compute(tokens, namespace=ONE)
    kit.compute([*D, *A], namespace=TWO)
    assert space(kit, ONE).num_blocks == space(kit, TWO).num_blocks == 2
    kit.compute([*D, *B], namespace=TWO)  # from here on it pays itself
    assert space(kit, TWO).totals.evicted_blocks == {LeaveCause.QUOTA: 1}


def test_one_that_floods_the_cache_does_not_lower_the_hits_of_others():
    """THREATS D7. Without a quota the flood leaves nothing of the other's; with one, everything."""

    def hit_rate_of_other(max_share: float | None) -> float:
        kit = CacheKit(64, max_share=max_share)
        hits = 0
        for turn in range(40):
            for unique in range(40):
                kit.compute([1000 + 100 * turn + unique] * 8, namespace=ONE)
            hits += kit.request([*A, *B, *C, *D, 9], namespace=TWO) >= 16
        return hits / 40

    assert hit_rate_of_other(0.5) == 39 / 40
    assert hit_rate_of_other(None) < 0.1


def test_what_is_in_use_may_go_over_and_is_the_first_to_go_later():
    kit = CacheKit(4)
    kit.cache.control.set_quota(ONE, 0.25)
    kit.compute(D, namespace=TWO)
    running = kit.start([*A, *B, *C], namespace=ONE)  # nothing waits for a quota
    kit.plan(kit.open([9], namespace=ONE))  # everything of its own is in use: another's block goes
    assert kit.cached([*D, 0], namespace=TWO)[0] == 0
    kit.cache.check_integrity()
    assert space(kit, TWO).totals.evicted_blocks == {LeaveCause.CAPACITY: 1}
    kit.cache.release(running)
    kit.cache.evict(3)
    assert space(kit, ONE).totals.evicted_blocks == {LeaveCause.QUOTA: 3}


def test_a_quota_that_is_lowered_evicts_when_room_is_wanted():
    kit = CacheKit(4)
    kit.compute(D, namespace=TWO)
    for tokens in (A, B):
        kit.compute(tokens, namespace=ONE)
    kit.cache.control.set_quota(ONE, 0.25)
    assert space(kit, ONE).num_blocks == 2
    kit.cache.evict(2)
    assert [space(kit, key).totals.evicted_blocks for key in (ONE, TWO)] == [
        {LeaveCause.QUOTA: 1},
        {LeaveCause.CAPACITY: 1},
    ]


def test_a_quota_does_not_take_pinned_blocks():
    kit = CacheKit(3)
    kit.cache.control.set_quota(ONE, 0.34)
    kit.compute(D, namespace=TWO)
    kit.compute(A, namespace=ONE)
    kit.compute(B, namespace=ONE)
    node = kit.node(A, namespace=ONE)
    kit.cache.control.pin(node, PinKind.SOFT)
    kit.cache.control.pin(kit.node(B, namespace=ONE), PinKind.SOFT)
    kit.compute(C, namespace=ONE)
    kit.cache.check_integrity()
    assert [kit.cached([*x, 0], namespace=ONE)[0] for x in (A, B, C)] == [4, 4, 4]
    kit.cache.control.unpin(node)
    kit.compute(D, namespace=ONE)  # A was used longest ago, and counts again
    assert [kit.cached([*x, 0], namespace=ONE)[0] for x in (A, B, C, D)] == [0, 4, 4, 4]


def test_a_quota_of_its_own_comes_before_the_default():
    kit = CacheKit(16, max_share=0.125)
    kit.cache.quotas.set(TWO, None)
    assert [kit.cache.quotas.limit_of(key) for key in (ONE, TWO)] == [2, None]
    kit.cache.quotas.reset(TWO)
    assert kit.cache.quotas.limit_of(TWO) == 2


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_quota_is_a_share(share):
    with pytest.raises(ValueError, match="share"):
        CacheKit(16, max_share=share)
