"""Policies: who goes first, told by small stories in ghost caches; and what all of them promise."""

from __future__ import annotations

import random

import pytest

from kvcore.ghost import GhostCache, GhostEntry
from kvcore.policies import ALIASES, POLICIES, ForesightPolicy, make_policy
from kvcore.policies.reuse import AGES_S, ReuseModel, indices
from tests.cache_kit import CacheKit

HOUR_S = 3600.0


def ghost(name: str, capacity: int) -> GhostCache:
    return GhostCache(make_policy(name, capacity_blocks=capacity), capacity_blocks=capacity)


def ask(cache: GhostCache, *blocks: int, now: float = 0.0, output: int = 0) -> int:
    return cache.request(0, blocks, now, num_tokens=16 * len(blocks), num_output_tokens=output)


def test_every_policy_has_a_name_and_a_line_about_it():
    assert set(POLICIES) == {"lru", "lfu", "fifo", "s3fifo", "arc", "cost", "foresight"}
    for name, description in POLICIES.items():
        assert make_policy(name, capacity_blocks=4).name == name
        assert description
        assert "\n" not in description


def test_best_is_ours():
    assert ALIASES == {"best": "foresight"}
    assert isinstance(make_policy("best", capacity_blocks=4), ForesightPolicy)


def test_an_unknown_policy_is_refused_with_the_names_of_those_that_exist():
    with pytest.raises(ValueError, match=r"'mru'.*lru, lfu"):
        make_policy("mru", capacity_blocks=4)


@pytest.mark.parametrize("wrong", [{"capacity_blocks": 0}, {"capacity_blocks": 1, "block_tokens": 0}])
def test_a_policy_for_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        make_policy("lru", **wrong)


def test_lru_evicts_what_was_used_longest_ago_and_fifo_what_came_first():
    for name, survivor in (("lru", 1), ("fifo", 2)):
        cache = ghost(name, 2)
        ask(cache, 1)
        ask(cache, 2)
        assert ask(cache, 1) == 1
        ask(cache, 3)
        assert ask(cache, survivor) == 1, name


def test_lfu_keeps_what_was_hit_often_over_what_is_new():
    cache = ghost("lfu", 2)
    for _ in range(5):
        ask(cache, 1)
    ask(cache, 2)
    ask(cache, 3)
    ask(cache, 4)
    assert ask(cache, 1) == 1


def test_an_old_winner_of_lfu_fades_when_nobody_asks_any_more():
    cache = ghost("lfu", 2)
    for _ in range(5):
        ask(cache, 1)
    for number in range(10, 30):
        ask(cache, number)
    assert ask(cache, 1) == 0


def test_cost_aware_keeps_deep_blocks_longer_than_shallow_ones():
    def is_kept(depth: int) -> bool:
        policy = make_policy("cost", capacity_blocks=120, block_tokens=512)
        cache = GhostCache(policy, capacity_blocks=120)
        chain = tuple(range(depth))
        ask(cache, *chain)
        for number in range(1000, 1000 + 130 - depth):
            ask(cache, number)
        return ask(cache, *chain) == depth

    assert is_kept(64)
    assert not is_kept(1)


def test_s3fifo_lets_a_scan_pass_by_what_was_used_twice():
    cache = ghost("s3fifo", 20)
    for _ in range(2):
        for block in range(10):
            ask(cache, block)
    for number in range(100, 200):
        ask(cache, number)
    assert sum(ask(cache, block) for block in range(10)) == 10


def test_s3fifo_keeps_what_comes_back_soon_after_it_was_evicted():
    cache = ghost("s3fifo", 20)
    for number in range(25):
        ask(cache, number)
    assert ask(cache, 0) == 0
    for number in range(100, 200):
        ask(cache, number)
    assert ask(cache, 0) == 1


def test_s3fifo_lets_a_long_path_go_in_as_many_rounds_as_a_single_block():
    def num_rounds(depth: int) -> int:
        cache = ghost("s3fifo", 20)
        for _ in range(2):
            ask(cache, *range(depth))
        for number in range(100, 120):
            ask(cache, number)  # the path moves to the main queue
        for _ in range(3):
            assert ask(cache, *range(depth)) == depth
        rounds = 0
        while 0 in first_keys(cache) and rounds < 50:
            for number in range(18):  # all of these are used again: the main queue turns once
                ask(cache, 1000 * rounds + 200 + number)
                ask(cache, 1000 * rounds + 200 + number)
            rounds += 1
        return rounds

    assert num_rounds(8) <= num_rounds(1)


def first_keys(cache: GhostCache) -> list[object]:
    """Return the first blocks of all paths."""
    return [key for root in cache._roots.values() for key in root.children]


def test_s3fifo_moves_what_was_used_again_to_the_main_queue_although_something_hangs_below():
    policy = make_policy("s3fifo", capacity_blocks=10)
    root = GhostEntry(None, "root", 0)
    trunk, other = GhostEntry(root, "trunk", 0), GhostEntry(root, "other", 0)
    leaf = GhostEntry(trunk, "leaf", 0)
    root.num_children, trunk.num_children = 2, 1
    policy.inserted(trunk, 0.0)
    policy.opened([trunk], 32, 0.0)
    policy.inserted(leaf, 0.0)
    policy.inserted(other, 0.0)
    assert policy.group_of(trunk) == policy.group_of(leaf)
    policy.removed(other, 0.0, evicted=True)
    assert policy.group_of(trunk) != policy.group_of(leaf)


def test_s3fifo_gives_up_an_old_main_queue_while_a_trunk_is_in_use():
    cache, trunk = ghost("s3fifo", 40), range(200, 210)
    for number in range(20):
        for _ in range(3):
            ask(cache, number)
    for number in range(50, 90):
        ask(cache, number)
    for number in range(1000, 1060):
        ask(cache, *trunk, number)
        ask(cache, 2 * number)
        ask(cache, 2 * number)
    assert not set(range(20)) & set(first_keys(cache))
    assert ask(cache, *trunk) == 10


def test_s3fifo_does_not_charge_a_trunk_for_every_leaf():
    policy = make_policy("s3fifo", capacity_blocks=10)
    root = GhostEntry(None, "root", 0)
    trunk = GhostEntry(root, "trunk", 0)
    leaves = [GhostEntry(trunk, number, 0) for number in range(2)]
    root.num_children, trunk.num_children = 1, 2
    for entry in (trunk, *leaves):
        policy.inserted(entry, 0.0)
    for leaf in leaves:
        policy.opened([trunk, leaf], 32, 0.0)
    assert [policy.gets_another_round(leaf) for leaf in leaves] == [True, True]  # to the main queue
    policy.opened([trunk, leaves[0]], 32, 0.0)
    assert policy.gets_another_round(leaves[0])
    assert not any(map(policy.gets_another_round, leaves))
    trunk.num_children = 0
    assert policy.gets_another_round(trunk)
    assert not policy.gets_another_round(trunk)


def test_arc_lets_a_scan_pass_by():
    cache = ghost("arc", 20)
    for _ in range(3):
        for block in range(10):
            ask(cache, block)
    for number in range(100, 200):
        ask(cache, number)
    assert sum(ask(cache, block) for block in range(10)) == 10


@pytest.mark.parametrize("name", list(POLICIES))
def test_random_traffic_breaks_nothing_and_two_runs_agree(name):
    def play() -> list[int]:
        chance = random.Random(name)
        cache = ghost(name, 40)
        found = []
        for step in range(1500):
            root = chance.randrange(12)
            blocks = [root, *(chance.randrange(2) for _ in range(chance.randrange(9)))]
            if chance.random() < 0.02:
                blocks = list(range(60))  # more than fits
            found.append(ask(cache, *blocks, now=step * 0.5, output=chance.randrange(300)))
            if step % 100 == 0:
                cache.check_integrity()
        cache.check_integrity()
        assert cache.num_entries == 40
        return found

    assert play() == play()


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_serves_in_the_real_cache_on_nodes_it_has_never_been_told_of(name):
    kit = CacheKit(8)
    for number in range(40):
        kit.compute([number % 11] * 4)
    kit.cache.control.set_policy(make_policy(name, capacity_blocks=8))
    for number in range(40):
        kit.compute([number % 13] * 4)
    kit.cache.check_integrity()
    assert kit.cache.pool.num_free == 0


def test_two_objects_of_a_policy_share_nothing():
    busy, quiet = (make_policy("best", capacity_blocks=10) for _ in range(2))
    cache = GhostCache(busy, capacity_blocks=10)
    for step in range(150):
        ask(cache, step % 20, now=float(step))
    assert isinstance(busy, ForesightPolicy)
    assert isinstance(quiet, ForesightPolicy)
    assert busy.model.num_requests == 150
    assert quiet.model.num_requests == 0


def two_kinds(seed: int, *, num_requests: int) -> list[tuple[tuple[int, ...], float, int]]:
    """Documents that are asked of again, with short answers; and others that are not, with long ones."""
    chance = random.Random(seed)
    alive: list[int] = []
    requests, now = [], 0.0
    for number in range(num_requests):
        now += chance.expovariate(1.0)
        if len(alive) >= 24 and chance.random() < 0.4:
            document, output = chance.choice(alive), 10
            alive.append(alive.pop(0))
        elif chance.random() < 0.1 or len(alive) < 24:
            document, output = number, 10
            alive = [*alive[-23:], number]
        else:
            document, output = number, 400
        blocks = tuple(1000 * document + place for place in range(8))
        requests.append((blocks, now, output))
    return requests


def hits(name: str, requests: list[tuple[tuple[int, ...], float, int]], capacity: int) -> int:
    cache = ghost(name, capacity)
    return sum(ask(cache, *blocks, now=now, output=output) for blocks, now, output in requests)


def test_ours_learns_which_documents_are_asked_of_again():
    requests = two_kinds(1, num_requests=3000)
    ours, lru = hits("best", requests, 160), hits("lru", requests, 160)
    assert ours > 1.25 * lru


def test_ours_follows_lru_where_recency_is_all_there_is():
    chance, stack, requests = random.Random(5), [], []
    for number in range(2500):
        if stack and chance.random() < 0.7:
            document = stack.pop(-1 - min(len(stack) - 1, int(chance.expovariate(0.1))))
        else:
            document = number
        stack.append(document)
        blocks = tuple(1000 * document + place for place in range(6))
        requests.append((blocks, float(number), chance.randrange(400)))
    ours, lru = hits("best", requests, 90), hits("lru", requests, 90)
    assert ours >= 0.998 * lru


def test_ours_is_exactly_lru_until_there_is_evidence():
    requests = two_kinds(3, num_requests=90)
    assert hits("best", requests, 160) == hits("lru", requests, 160)


def test_a_clock_that_stands_still_does_no_harm():
    requests = [(blocks, 7.0, output) for blocks, _, output in two_kinds(1, num_requests=1500)]
    assert hits("best", requests, 160) >= hits("lru", requests, 160)


def test_the_records_of_the_model_are_bounded():
    model = ReuseModel(max_records=100, block_tokens=16)
    for number in range(500):
        model.learn([number, number + 10_000], 32, 5, float(number))
    assert len(model._records) == 100


def test_spells_that_go_on_are_censored_not_counted_as_no_reuse():
    model = ReuseModel(max_records=1000, block_tokens=16)
    for number in range(50):
        model.learn([number], 16, 5, float(number))
    model.learn([999], 16, 5, 60.0)
    (cell,) = {record.spell.cell for record in model._records.values()}
    reached = model._new.reached[cell]
    assert reached[0] == 50  # all but the one that has just begun
    assert reached[AGES_S.index(32.0)] == 29  # those of the first 28 s are old enough
    assert sum(model._new.reuses[cell]) == 0


def test_the_index_of_a_constant_hazard_is_that_hazard():
    per_second = 0.001
    widths = [end - start for start, end in zip(AGES_S, (*AGES_S[1:], 2 * AGES_S[-1]), strict=True)]
    flat = indices([1 - (1 - per_second) ** width for width in widths])
    assert flat[0] == pytest.approx(per_second, rel=0.1)
    assert flat[5] == pytest.approx(per_second, rel=0.1)


def test_the_index_sees_a_reuse_that_is_due_later():
    hazards = [0.0] * len(AGES_S)
    hazards[6] = 0.9
    found = indices(hazards)
    assert 0 < found[0] < found[5] < found[6]
    assert found[7] == 0
