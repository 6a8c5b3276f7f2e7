"""Lifetimes that change, hints, explicit eviction, policies at run time, and those who listen."""

from __future__ import annotations

import pytest

from kvcore.errors import IntegrityError
from kvcore.events import LeaveCause
from kvcore.index import PrefixSearch, digest_of
from kvcore.keys import NamespaceKey, chain_digests
from kvcore.pins import PinKind
from kvcore.policies import LruPolicy
from tests.cache_kit import HOME, CacheKit

A, B, C, D = [1] * 4, [2] * 4, [3] * 4, [4] * 4


class Listener:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, object, object]] = []

    def stored(self, nodes):
        self.said.append(("stored", [n.tokens for n in nodes], None))

    def tail_stored(self, tail):
        self.said.append(("tail", tail.node.tokens, tail.slot))

    def leaving(self, node, cause):
        assert node.parent is not None
        self.said.append(("leaving", node.tokens, cause))


class Upside(LruPolicy):
    """The most recently used goes first."""

    name = "upside"

    def order(self, entry):
        return -entry.last_used


# -- lifetimes --------------------------------------------------------------------------------------


def test_a_lifetime_can_be_lengthened_and_takes_along_what_leads_there():
    kit = CacheKit()
    kit.compute([*A, *B], lifetime_s=5.0)
    kit.compute([*A, *C], lifetime_s=5.0)
    changed = kit.cache.control.set_lifetime(kit.node([*A, *B]), 20.0)
    assert [n.tokens[0] for n in changed] == [2, 1]
    kit.clock.advance(10.0)
    kit.cache.sweep_expired()
    kit.cache.check_integrity()
    assert kit.cached([*A, *B]) == (8, 0, True)  # the last logits live as long
    assert kit.cached([*A, *C, 0])[0] == 4


def test_shortening_spares_what_others_share():
    kit = CacheKit()
    kit.compute([*A, *B, *D])
    kit.compute([*A, *C])
    kit.cache.control.set_lifetime(kit.node([*A, *B, *D]), 5.0)
    kit.clock.advance(5.0)
    kit.cache.sweep_expired()
    kit.cache.check_integrity()
    assert kit.cached([*A, *C, 0])[0] == 8
    assert kit.cached([*A, *B, *D, 0])[0] == 4


def test_a_lifetime_of_none_never_ends():
    kit = CacheKit()
    kit.compute(A, lifetime_s=5.0)
    kit.cache.control.set_lifetime(kit.node(A), None)
    kit.clock.advance(1e9)
    kit.cache.sweep_expired()
    assert kit.cached(A)[2]


def test_what_may_not_be_used_any_more_gets_no_new_lifetime():
    kit = CacheKit()
    bad = kit.start([*A, 9])
    neighbour = kit.start([*A, 8])
    node = neighbour.nodes[0]
    kit.cache.discard([bad])
    with pytest.raises(IntegrityError, match="cannot be named"):
        kit.cache.control.set_lifetime(node, None)
    kit.cache.release(neighbour)


# -- hints ------------------------------------------------------------------------------------------


def test_what_is_released_goes_first():
    kit = CacheKit()
    listener = Listener()
    kit.compute(A)
    kit.compute([*B, *C])
    kit.cache.listeners.append(listener)
    assert len(kit.cache.control.release(kit.node([*B, *C]))) == 2
    kit.cache.evict(3)
    assert [(t[0], cause) for _, t, cause in listener.said] == [
        (3, LeaveCause.RELEASED),
        (2, LeaveCause.RELEASED),
        (1, LeaveCause.CAPACITY),
    ]


def test_a_reuse_takes_the_hint_back():
    kit = CacheKit()
    kit.compute(A)
    kit.compute(B)
    kit.cache.control.release(kit.node(B))
    kit.compute(B)
    kit.cache.evict(1)
    assert (kit.cached([*A, 0])[0], kit.cached([*B, 0])[0]) == (0, 4)


def test_a_hint_reaches_no_further_than_a_branch():
    kit = CacheKit()
    kit.compute([*A, *B])
    kit.compute([*A, *C])
    assert len(kit.cache.control.release(kit.node([*A, *B]))) == 1


# -- explicit eviction ------------------------------------------------------------------------------


def test_a_subtree_goes_and_what_leads_to_it_stays():
    kit = CacheKit()
    kit.compute([*A, *B, *C, 9])
    chosen = kit.cache.control.select(below=[kit.node([*A, *B])])
    assert [n.tokens[0] for n in chosen.nodes] == [9, 3, 2]
    assert kit.cache.control.take_out(chosen.nodes) == 3
    kit.cache.check_integrity()
    assert kit.cached([*A, *B, 0])[0] == 4


def test_what_is_held_is_counted_and_left():
    kit = CacheKit()
    kit.compute([*A, *B])
    kit.compute([*A, *C])
    kit.cache.control.pin(kit.node([*A, *C]), PinKind.HARD)
    lease = kit.start([*A, *D])
    chosen = kit.cache.control.select(below=[kit.node(A)])
    assert (len(chosen.nodes), chosen.num_in_use, chosen.num_kept) == (1, 3, 3)
    kit.cache.release(lease)
    chosen = kit.cache.control.select(below=[kit.node(A)])
    assert (len(chosen.nodes), chosen.num_in_use, chosen.num_kept) == (2, 2, 2)


def test_only_what_is_idle_for_so_long():
    kit = CacheKit()
    kit.compute([*A, *B])
    kit.clock.advance(60.0)
    kit.compute([*A, *C])
    chosen = kit.cache.control.select(min_idle_s=60.0)
    assert [n.tokens[0] for n in chosen.nodes] == [2]
    assert chosen.num_kept == 0


def test_one_namespace_alone():
    kit = CacheKit()
    other = NamespaceKey("model", salt="other")
    kit.compute([*A, *B])
    kit.compute([*A, *B], namespace=other)
    kit.compute([5], namespace=other)
    space = kit.cache.tree.spaces.get(other)
    kit.cache.control.take_out(kit.cache.control.select(space=space).nodes)
    kit.cache.control.forget_tails(space)
    kit.cache.check_integrity()
    assert list(kit.cache.tree.roots) == [HOME]
    assert kit.cached([*A, *B])[0] == 8


# -- policies ---------------------------------------------------------------------------------------


def test_a_policy_is_changed_at_run_time_and_nothing_goes():
    kit = CacheKit()
    for tokens in (A, B, C):
        kit.compute(tokens)
    kit.cache.control.set_policy(Upside(capacity_blocks=16))
    assert kit.cache.tree.num_nodes == 3
    kit.cache.evict(1)
    assert [kit.cached([*x, 0])[0] for x in (A, B, C)] == [4, 4, 0]
    kit.cache.control.set_policy(LruPolicy(capacity_blocks=16))
    kit.cache.evict(2)
    kit.cache.check_integrity()
    assert kit.cache.pool.num_free == 16


def test_a_canary_judges_its_own_namespaces_and_the_less_recently_used_nominee_goes():
    kit = CacheKit()
    keys = sorted((NamespaceKey("m", salt=str(n)) for n in range(20)), key=_position)
    inside, outside = keys[0], keys[-1]
    kit.cache.control.start_canary(Upside(capacity_blocks=16), 0.5)
    assert kit.cache.control.policy_of(kit.cache.tree.root(inside).space).name == "upside"
    assert kit.cache.control.policy_of(kit.cache.tree.root(outside).space).name == "lru"
    kit.compute(A, namespace=inside)
    kit.compute(B, namespace=outside)
    kit.compute(C, namespace=inside)
    kit.compute(D, namespace=outside)
    places, gone = ((A, inside), (B, outside), (C, inside), (D, outside)), []
    for _ in range(4):
        kit.cache.evict(1)
        gone.append([kit.cached([*x, 0], namespace=n)[0] for x, n in places])
    # The canary names C, then A; the other B, then D. B before C, C before D, A before D.
    assert gone == [[4, 0, 4, 4], [4, 0, 0, 4], [0, 0, 0, 4], [0, 0, 0, 0]]
    kit.cache.control.end_canary()
    assert kit.cache.control.canary is None


def test_a_canary_reports_its_own_hit_rate():
    kit = CacheKit()
    inside, outside = sorted((NamespaceKey("m", salt=str(n)) for n in range(20)), key=_position)[::19]
    kit.cache.control.start_canary(LruPolicy(capacity_blocks=8), 0.5)
    for _ in range(2):
        kit.request([*A, 9], namespace=inside)
    kit.request([*A, 9], namespace=outside)
    canary = kit.cache.control.canary
    assert (canary.counts.token_hit_rate, canary.live_counts.token_hit_rate) == (0.5, 0.0)


def _position(key: NamespaceKey) -> float:
    return int.from_bytes(key.seed()[:6], "big") / (1 << 48)


def test_a_policy_is_told_what_comes_and_goes():
    class Diary(LruPolicy):
        name = "diary"

        def __init__(self, **how):
            super().__init__(**how)
            self.said = []

        def opened(self, path, num_tokens, now):
            self.said.append(("opened", len(path), num_tokens))

        def inserted(self, entry, now):
            entry.mark = "seen"
            self.said.append(("inserted", entry.depth))

        def removed(self, entry, now, *, evicted):
            self.said.append(("removed", entry.mark, evicted))

    diary = Diary(capacity_blocks=16)
    kit = CacheKit(policy=diary)
    kit.compute([*A, *B, 9])
    kit.compute([*A, *C], owner=7)
    kit.cache.forget_owner(7)
    kit.cache.evict(2)  # the 9, which no policy marks, and B
    kit.cache.clear()
    assert diary.said == [
        ("opened", 0, 9),
        ("inserted", 1),
        ("inserted", 2),
        ("opened", 1, 8),
        ("removed", "seen", True),
        ("removed", "seen", False),
    ]


# -- listeners and names ----------------------------------------------------------------------------


def test_listeners_hear_what_is_stored_once_it_is_ready():
    kit = CacheKit()
    listener = Listener()
    kit.cache.listeners.append(listener)
    lease = kit.plan(kit.open([*A, *B]))
    assert listener.said == []
    kit.cache.commit([lease])
    assert listener.said == [("stored", [tuple(A), tuple(B)], None), ("tail", tuple(B), 0)]


def test_listeners_hear_nothing_of_private_or_spoiled_content():
    kit = CacheKit()
    listener = Listener()
    kit.cache.listeners.append(listener)
    private = kit.start(A, owner=7)
    bad = kit.plan(kit.open([*B, 9]))
    kit.cache.commit([bad], spoiled={bad})
    kit.cache.discard([bad, private])
    assert {what for what, _, _ in listener.said} == {"leaving"}
    assert {cause for _, _, cause in listener.said} == {LeaveCause.DISCARDED}


def test_the_digest_of_a_node_is_that_of_its_prefix():
    kit = CacheKit()
    kit.compute([*A, *B, 5, 6])
    expected = list(chain_digests(HOME.seed(), [A, B, [5, 6]]))
    node = kit.node([*A, *B, 5, 6])
    assert [digest_of(n) for n in (node.parent.parent, node.parent, node)] == expected
    assert node.digest is None  # of a block that is not full none is kept
    assert node.parent.digest == expected[1]


def test_a_prefix_is_found_by_the_beginning_of_its_digest_piece_by_piece():
    kit = CacheKit(64)
    for number in range(20):
        kit.compute([*A, *[number] * 4])
    node = kit.node([*A, *[7] * 4])
    search = PrefixSearch(kit.cache.tree, digest_of(node).hex()[:9].upper())
    pieces = 1
    while not search.advance(4, now=0.0):
        pieces += 1
    assert (search.found, pieces > 3) == ([node], True)


def test_prefixes_are_located_by_what_they_say():
    kit = CacheKit()
    kit.compute([*A, 5, 6, 7, 7])
    kit.compute([*A, 5, 6, 8, 8])
    locate = kit.cache.control.locate
    from kvcore.keys import pack_tokens

    exact = locate(HOME, pack_tokens([*A, 5, 6]))
    assert (exact.num_tokens, len(exact.ends)) == (6, 2)
    beginning = locate(HOME, pack_tokens([*A, 5, 9]))
    assert (beginning.node, beginning.num_tokens, beginning.ends) == (kit.node(A), 4, [])
    assert locate(HOME, pack_tokens([9, 9])).node is None
