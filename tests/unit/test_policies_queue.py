"""The eviction queue and its policy: groups, orders, worths and second rounds."""

from __future__ import annotations

import pytest

from kvcore.ghost import GhostCache, GhostEntry
from kvcore.policies import Entry, EvictionPolicy, LruPolicy
from kvcore.queues import EvictionQueue


class ByHand(EvictionPolicy):
    """Each entry's key is (group, order); the worths are given."""

    name = "by-hand"
    description = "for tests"
    num_groups = 3
    gives_rounds = True

    def __init__(self, *worths: float, lifetime_s: float = 0.0) -> None:
        super().__init__(capacity_blocks=100)
        self.worths = list(worths)
        self.worth_lifetime_s = lifetime_s
        self.rounds: dict[object, int] = {}
        self.num_asked = 0

    def group_of(self, entry: Entry) -> int:
        return int(entry.key[0])  # type: ignore[index]

    def order(self, entry: Entry) -> float:
        return float(entry.key[1])  # type: ignore[index]

    def worth(self, group: int, head: Entry, now: float) -> float:
        self.num_asked += 1
        return self.worths[group]

    def gets_another_round(self, entry: Entry) -> bool:
        self.rounds[entry] = self.rounds.get(entry, 1) - 1
        return self.rounds[entry] > 0


def leaves(*places: tuple[int, float]) -> list[GhostEntry]:
    root = GhostEntry(None, 0, 0)
    return [GhostEntry(root, place, 0) for place in places]


def queue_of(policy: EvictionPolicy, entries: list[GhostEntry]) -> EvictionQueue[GhostEntry]:
    queue = EvictionQueue[GhostEntry](policy)
    for entry in entries:
        queue.offer(entry)
    return queue


def drain(queue: EvictionQueue[GhostEntry], now: float = 0.0) -> list[object]:
    popped = []
    while True:
        try:
            popped.append(queue.pop(now).key)
        except IndexError:
            return popped


def test_the_head_of_least_worth_goes_and_inside_a_group_the_lowest_order():
    queue = queue_of(ByHand(3.0, 1.0, 2.0), leaves((0, 1), (1, 8), (1, 4), (2, 5), (0, 0)))
    assert drain(queue) == [(1, 4), (1, 8), (2, 5), (0, 0), (0, 1)]


def test_worths_are_asked_again_when_their_time_is_over_or_the_policy_says_so():
    policy = ByHand(1.0, 2.0, 3.0, lifetime_s=10.0)
    queue = queue_of(policy, leaves(*((group, order) for group in range(3) for order in range(3))))
    assert queue.pop(0.0).key == (0, 0)
    policy.worths = [3.0, 1.0, 2.0]
    assert queue.pop(5.0).key == (1, 0)  # worth 2 as told at 0 s; the new head of group 0 is asked now: 3
    assert queue.pop(11.0).key == (1, 1)
    policy.worths = [0.0, 1.0, 2.0]
    policy.epoch += 1
    assert queue.pop(12.0).key == (0, 1)


def test_one_worth_is_asked_for_each_eviction_while_worths_stay_good():
    policy = ByHand(1.0, 2.0, 3.0, lifetime_s=10.0)
    queue = queue_of(policy, leaves(*((group, order) for group in range(3) for order in range(100))))
    for _ in range(100):
        queue.pop(1.0)
    assert policy.num_asked <= 3 + 100


def test_an_entry_that_has_changed_its_place_is_found_in_the_new_one():
    entries = leaves((0, 1), (0, 2), (1, 0))
    queue = queue_of(ByHand(1.0, 2.0, 3.0), entries)
    entries[0].key = (2, 0)
    assert drain(queue) == [(0, 2), (1, 0), (2, 0)]


def test_offered_again_a_leaf_gets_its_present_place_once():
    entries = leaves((0, 5), (0, 6))
    queue = queue_of(ByHand(1.0, 2.0, 3.0), entries)
    entries[1].key = (0, 1)
    queue.offer(entries[1])
    entries[1].key = (0, 6)
    queue.offer(entries[1])
    entries[1].key = (0, 1)
    queue.offer(entries[1])
    assert drain(queue) == [(0, 1), (0, 5)]


def test_a_leaf_may_get_another_round():
    entries = leaves((0, 1), (0, 2))
    policy = ByHand(1.0, 2.0, 3.0)
    policy.rounds[entries[0]] = 3
    assert drain(queue_of(policy, entries)) == [(0, 1), (0, 2)]
    assert policy.rounds[entries[0]] == 0


def test_busy_entries_parents_and_removed_ones_are_passed_over():
    entries = leaves((0, 1), (0, 2), (0, 3), (1, 4))
    queue = queue_of(ByHand(1.0, 2.0, 3.0), entries)
    entries[0].is_busy = True
    entries[1].num_children = 1
    entries[2].parent = None
    assert drain(queue) == [(1, 4)]


def test_a_queue_goes_on_with_another_policy():
    entries = leaves((0, 1), (1, 2), (2, 3))
    queue = queue_of(ByHand(3.0, 2.0, 1.0), entries)
    for tick, entry in enumerate(entries):
        entry.last_used = tick
    queue.rebuild(LruPolicy(capacity_blocks=3), entries)
    assert drain(queue) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("lifetime_s", [0.0, 100.0])
def test_groups_evict_exactly_what_a_search_of_all_leaves_would(lifetime_s):
    class ByWorth(LruPolicy):
        num_groups = 5
        worth_lifetime_s = lifetime_s

        def group_of(self, entry: Entry) -> int:
            return hash(entry.key) % 5

        def worth(self, group: int, head: Entry, now: float) -> float:
            return head.last_used * (1 + group)

    policy = ByWorth(capacity_blocks=30)
    cache = GhostCache(policy, capacity_blocks=30)
    for step in range(600):
        everything = [e for r in cache._roots.values() for e in r.children.values()]
        block = (step * step) % 47
        is_hit = block in {e.key for e in everything}
        cache.request(0, [block], float(step // 3), num_tokens=16)
        if not is_hit and len(everything) == 30:
            expected = min(
                everything, key=lambda e: (policy.worth(policy.group_of(e), e, 0.0), policy.group_of(e))
            )
            assert expected.parent is None, step
