"""The tree alone: matching, holds, what may be removed."""

from __future__ import annotations

import pytest

from kvcore.blocks import BlockId
from kvcore.errors import IntegrityError
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.lease import Found, Lease, PrefixMatch
from kvcore.node import Node, NodeState
from kvcore.tree import PrefixTree, num_common_tokens


def packed(*tokens: int) -> bytes:
    return pack_tokens(tokens).tobytes()


def some_lease(root: Node) -> Lease:
    found = Found(root, [], None, None, is_being_computed=False, match=PrefixMatch(0, 0, is_exact=False))
    return Lease(found=found, tokens=pack_tokens([]), owner=None, lifetime_s=None)


class Plant:
    """A tree of blocks of two tokens."""

    def __init__(self) -> None:
        self.tree = PrefixTree(2)
        self.root = self.tree.root(NamespaceKey("model"))
        self.next_block = 0

    def grow(
        self, *blocks: tuple[int, int], parent: Node | None = None, owner: int | None = None
    ) -> list[Node]:
        """Add a READY path."""
        path, node = [], parent or self.root
        for block in blocks:
            child = self.tree.add_open(node, BlockId(self.next_block), owner)
            self.next_block += 1
            self.tree.fill(child, packed(*block), producer=some_lease(self.root))
            child.state, child.producer = NodeState.READY, None
            path.append(child)
            node = child
        return path

    def walk(self, *tokens: int, owner: int | None = None, now: float = 0.0) -> list[Node]:
        return self.tree.walk(self.root, pack_tokens(tokens), len(tokens), owner, now)


def test_a_walk_goes_as_far_as_whole_blocks_match():
    plant = Plant()
    one, two, three = plant.grow((1, 2), (3, 4), (5, 6))
    assert plant.walk(1, 2, 3, 4, 5, 6, 7) == [one, two, three]
    assert plant.walk(1, 2, 3, 4, 5) == [one, two]
    assert plant.walk(1, 2, 9, 9, 5, 6) == [one]
    assert plant.walk(2, 1) == []


def test_a_walk_stops_at_what_has_expired():
    plant = Plant()
    one, two = plant.grow((1, 2), (3, 4))
    two.limit_life(5.0)
    assert plant.walk(1, 2, 3, 4, now=4.9) == [one, two]
    assert plant.walk(1, 2, 3, 4, now=5.0) == [one]


def test_private_nodes_are_found_by_their_owner_alone():
    plant = Plant()
    [mine] = plant.grow((1, 2), owner=7)
    assert plant.walk(1, 2, owner=7) == [mine]
    assert plant.walk(1, 2, owner=8) == []
    assert plant.walk(1, 2) == []


def test_an_expired_shared_node_hides_no_private_one():
    plant = Plant()
    [shared] = plant.grow((1, 2))
    shared.limit_life(1.0)
    [mine] = plant.grow((1, 2), owner=7)
    assert plant.walk(1, 2, owner=7, now=2.0) == [mine]


def test_inside_a_block_the_longest_match_counts():
    plant = Plant()
    plant.grow((1, 2), (3, 8))
    [other] = plant.grow((3, 4), parent=plant.walk(1, 2)[0])
    assert plant.tree.find_partial(plant.walk(1, 2)[0], packed(3, 4), None, 0.0) == (other, 2)
    assert plant.tree.find_partial(plant.root, packed(2), None, 0.0) == (None, 0)
    assert plant.tree.find_partial(plant.root, b"", None, 0.0) == (None, 0)


def test_a_pending_block_is_not_copied_from():
    plant = Plant()
    [node] = plant.grow((1, 2))
    node.state = NodeState.PENDING
    assert plant.tree.find_partial(plant.root, packed(1), None, 0.0) == (None, 0)


@pytest.mark.parametrize(
    ("left", "right", "common"),
    [
        ((), (1,), 0),
        ((1, 2), (1, 2), 2),
        ((1, 2), (1, 2, 3), 2),
        ((1, 2, 3), (1, 9, 3), 1),
        ((256,), (0,), 0),
    ],
)
def test_common_tokens_are_counted_by_token_not_by_byte(left, right, common):
    assert num_common_tokens(packed(*left), packed(*right)) == common


def test_a_hold_keeps_the_whole_path():
    plant = Plant()
    one, two, three = plant.grow((1, 2), (3, 4), (5, 6))
    plant.tree.hold(two)
    assert (one.is_busy, two.is_busy, three.is_busy) == (True, True, False)
    assert plant.tree.num_evictable == 1
    assert plant.tree.num_idle([one, two, three]) == 1
    assert plant.tree.drop(two)
    assert plant.tree.num_evictable == 3
    assert plant.tree.num_idle([one, two, three]) == 3


def test_a_node_below_another_hold_stays_busy():
    plant = Plant()
    one, two = plant.grow((1, 2), (3, 4))
    plant.tree.hold(one)
    plant.tree.hold(two)
    assert not plant.tree.drop(one)
    assert plant.tree.num_evictable == 0
    assert plant.tree.drop(two)
    assert plant.tree.num_evictable == 2


def test_held_nodes_and_parents_cannot_be_removed():
    plant = Plant()
    one, two = plant.grow((1, 2), (3, 4))
    with pytest.raises(IntegrityError, match="cannot be removed"):
        plant.tree.remove(one)
    plant.tree.hold(two)
    with pytest.raises(IntegrityError, match="cannot be removed"):
        plant.tree.remove(two)
    plant.tree.drop(two)
    assert plant.tree.remove(two) == 1
    assert plant.tree.remove(one) == 0
    assert plant.tree.num_nodes == plant.tree.num_evictable == 0


def test_a_successor_displaces_an_expired_node_that_is_still_held():
    plant = Plant()
    [old] = plant.grow((1, 2))
    old.limit_life(1.0)
    plant.tree.hold(old)
    [new] = plant.grow((1, 2))
    assert plant.walk(1, 2, now=2.0) == [new]
    assert list(plant.tree.displaced) == [old]
    plant.tree.drop(old)
    plant.tree.remove(old)
    assert not plant.tree.displaced
    assert plant.walk(1, 2, now=2.0) == [new]


def test_empty_namespaces_do_not_pile_up():
    tree = PrefixTree(2)
    kept = tree.root(NamespaceKey("model", salt="kept"))
    tree.add_open(kept, BlockId(0), None)
    for number in range(10_000):
        tree.root(NamespaceKey("model", salt=str(number)))
    assert len(tree.roots) <= 65
    assert tree.root(NamespaceKey("model", salt="kept")) is kept
