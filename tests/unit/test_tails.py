"""Kept last logits: slots, order of use, privacy, lifetime."""

from __future__ import annotations

import pytest

from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.node import Node
from kvcore.tails import Tail, TailStore
from kvcore.tree import PrefixTree


@pytest.fixture
def node() -> Node:
    return PrefixTree(4).root(NamespaceKey("model"))


def packed(*tokens: int) -> bytes:
    return pack_tokens(tokens).tobytes()


def keep(
    store: TailStore, node: Node, *tokens: int, owner: int | None = None, expires_at: float | None = None
) -> Tail:
    """Add a tail in a step of its own."""
    tail = store.add(node, packed(*tokens), owner, 0.0, expires_at=expires_at)
    assert tail is not None
    tail.is_ready = True
    store.end_step()
    store.check_integrity()
    return tail


def find(
    store: TailStore, node: Node, *tokens: int, owner: int | None = None, now: float = 0.0
) -> Tail | None:
    return store.find(node, packed(*tokens), owner, now)


def test_a_tail_is_found_by_the_exact_tokens_that_follow(node):
    store = TailStore(2)
    tail = keep(store, node, 1, 2)
    assert tail.slot == 0
    assert find(store, node, 1, 2) is tail
    assert find(store, node, 1) is None
    assert find(store, node) is None


def test_the_least_recently_used_slot_is_taken_when_none_is_free(node):
    store = TailStore(2)
    old, new = keep(store, node, 1), keep(store, node, 2)
    store.use(old)
    store.end_step()
    assert keep(store, node, 3).slot == new.slot
    assert find(store, node, 2) is None
    assert find(store, node, 1) is old


def test_a_slot_that_the_plan_reads_is_not_written_by_it(node):
    store = TailStore(1)
    store.use(keep(store, node, 1))
    assert store.add(node, packed(2), None, 0.0, expires_at=None) is None
    store.end_step()
    assert keep(store, node, 2).slot == 0


def test_a_slot_that_the_plan_reads_stays_untouched_when_its_tail_goes(node):
    store = TailStore(1)
    tail = keep(store, node, 1)
    store.use(tail)
    store.remove(tail)
    store.check_integrity()
    assert store.add(node, packed(2), None, 0.0, expires_at=None) is None
    store.end_step()
    assert keep(store, node, 2).slot == 0


def test_the_same_logits_are_not_kept_twice(node):
    store = TailStore(2)
    keep(store, node, 1)
    assert store.add(node, packed(1), None, 0.0, expires_at=None) is None
    assert store.add(node, packed(1), 7, 0.0, expires_at=None) is None
    assert len(store) == 1


def test_a_private_tail_is_not_found_by_a_prompt_that_spells_its_owner(node):
    # It was: the owner's number stood in front of the tokens, like one more token.
    store = TailStore(2)
    keep(store, node, 7, owner=5)
    assert find(store, node, 5, 7) is None
    assert find(store, node, 7) is None
    assert find(store, node, 7, owner=6) is None
    assert find(store, node, 7, owner=5) is not None


def test_private_tails_go_with_their_owner(node):
    store = TailStore(2)
    keep(store, node, 1, owner=5)
    shared = keep(store, node, 2)
    store.remove_private(5)
    store.remove_private(6)
    assert len(store) == 1
    assert find(store, node, 2) is shared
    store.check_integrity()


def test_a_tail_has_a_lifetime_of_its_own(node):
    store = TailStore(2)
    keep(store, node, 1, expires_at=3.0)
    assert find(store, node, 1, now=2.9) is not None
    assert find(store, node, 1, now=3.0) is None
    renewed = store.add(node, packed(1), None, 3.0, expires_at=None)
    assert renewed is not None
    assert len(store) == 1


def test_a_tail_that_expires_while_its_step_runs_is_not_replaced(node):
    # It was: the second of two leases in a plan removed the tail that the first one was about to fill.
    store = TailStore(2)
    assert store.add(node, packed(1), None, 0.0, expires_at=0.0) is not None
    assert store.add(node, packed(1), None, 0.0, expires_at=0.0) is None
    store.check_integrity()


def test_without_slots_nothing_is_kept(node):
    assert TailStore(0).add(node, packed(1), None, 0.0, expires_at=None) is None
