"""The ghost cache behaves as the tree of the server does."""

from __future__ import annotations

import random

import pytest

from kvcore.ghost import GhostCache
from kvcore.policies import LruPolicy
from kvcore.policies.lru_ghost import LruGhost
from tests.cache_kit import CacheKit


def ghost(capacity: int, *, lifetime_s: float | None = None) -> GhostCache:
    policy = LruPolicy(capacity_blocks=capacity)
    return GhostCache(policy, capacity_blocks=capacity, lifetime_s=lifetime_s)


def ask(cache: GhostCache, *blocks: int, now: float = 0.0, namespace: int = 0) -> int:
    return cache.request(namespace, blocks, now, num_tokens=4 * len(blocks))


def test_the_longest_cached_prefix_is_the_hit():
    cache = ghost(10)
    assert ask(cache, 1, 2, 3) == 0
    assert ask(cache, 1, 2, 9, 3) == 2
    assert ask(cache, 2, 3) == 0  # the same content after another beginning is another block
    assert cache.num_entries == 7


def test_namespaces_share_nothing():
    cache = ghost(10)
    ask(cache, 1, 2)
    assert ask(cache, 1, 2, namespace=1) == 0


def test_a_chain_goes_from_its_end():
    cache = ghost(4)
    ask(cache, 1, 2, 3)
    ask(cache, 7, 8)
    assert ask(cache, 1, 2, 3) == 2


def test_a_request_never_evicts_what_it_uses_itself():
    cache = ghost(4)
    ask(cache, 1, 2, 3)
    assert ask(cache, 1, 2, 3, 4, 5, 6) == 3
    assert ask(cache, 1, 2, 3, 4, 5, 6) == 4  # only what fits was kept
    cache.check_integrity()


def test_an_expired_entry_is_no_hit_and_goes_with_what_hangs_below():
    cache = ghost(10, lifetime_s=10.0)
    ask(cache, 1, now=0.0)
    ask(cache, 1, 2, now=5.0)
    assert ask(cache, 1, 2, now=9.9) == 2
    assert ask(cache, 1, 2, now=10.0) == 0
    assert cache.num_expired == 2
    cache.check_integrity()


def test_a_smaller_capacity_takes_effect_at_once():
    cache = ghost(10)
    ask(cache, *range(8))
    cache.resize(3, 0.0)
    assert cache.num_entries == 3
    assert ask(cache, *range(8)) == 3


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_ghost_without_room_is_refused(capacity):
    with pytest.raises(ValueError, match="at least 1"):
        GhostCache(LruPolicy(capacity_blocks=1), capacity_blocks=capacity)


def test_a_ghost_hits_about_what_the_real_cache_hits():
    """Not block for block: the real one also spends blocks on what does not fill a block."""
    chance, kit, cache = random.Random(11), CacheKit(24), ghost(24)
    real = ghostly = 0
    for step in range(600):
        blocks = [chance.randrange(1, 6), *(chance.randrange(1, 3) for _ in range(chance.randrange(4)))]
        tokens = [token for block in blocks for token in [block] * 4]
        real += kit.cached([*tokens, 99])[0] // 4
        kit.compute(tokens)
        ghostly += ask(cache, *blocks, now=float(step))
    assert real > 500
    assert ghostly == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("capacity", [1, 5, 17, 60])
def test_the_cheap_ghost_of_lru_decides_as_the_tree_does(capacity: int):
    dice = random.Random(capacity)
    cheap, tree = LruGhost(capacity_blocks=capacity), ghost(capacity)
    for _ in range(2000):
        path = [dice.randrange(3) for _ in range(dice.randrange(1, 12))]
        prefixes = [tuple(path[: end + 1]) for end in range(len(path))]  # its keys name whole prefixes
        assert cheap.request(prefixes) == ask(tree, *path)
        assert len(cheap) == tree.num_entries
