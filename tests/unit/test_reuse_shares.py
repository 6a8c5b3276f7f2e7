"""Whose entries leave when there is no room: a tenant's flood is its own loss."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from server.predict.messages import Inputs, Output, TextItem
from server.predict.options import FeatureSpec
from server.predict.reuse.keys import KeyRule
from server.predict.reuse.responses import Partition, Response, ResponseCache
from server.predict.reuse.shares import FairOrder
from tests.unit.reuse_world import World, rows_of


def ask(world: World, rows: np.ndarray, tenant: str) -> int:
    """Return how many of the rows were reused."""
    inputs = Inputs(rows=rows.tobytes(), num_rows=len(rows))
    outputs = world.model.run(world.model.prepare(inputs, truncate=False, reuse=True, tenant=tenant))
    world.model.check_integrity()
    return sum(each.cache_hit for each in outputs)


def test_one_owner_alone_is_least_recently_used_first() -> None:
    order: FairOrder[str, int] = FairOrder()
    for key in (1, 2, 3, 1):
        order.use("a", key)
    assert order.next_to_leave() == 2


def test_who_holds_the_most_gives_up_whoever_comes() -> None:
    order: FairOrder[str, int] = FairOrder()
    for owner, keys in {"few": (1, 2), "many": (3, 4, 5)}.items():
        for key in keys:
            order.use(owner, key)
    order.use("new", 6)
    assert order.next_to_leave() == 3
    order.discard("many", 3)
    order.use("many", 4)
    order.use("few", 7)
    assert order.next_to_leave() == 1


@pytest.mark.parametrize("seed", range(5))
def test_shares_even_out_whatever_comes(seed: int) -> None:
    """Of what is full nobody who wants it holds less than an equal share, but for one."""
    draw = np.random.default_rng(seed)
    order: FairOrder[int, int] = FairOrder()
    kept: dict[int, int] = {}
    for step in range(2000):
        if kept and draw.random() < 0.1:
            key = list(kept)[int(draw.integers(len(kept)))]
            order.discard(kept.pop(key), key)
        owner = int(draw.choice(3, p=(0.9, 0.07, 0.03)))
        order.use(owner, step)
        kept[step] = owner
        if len(kept) > 60:
            leaving = order.next_to_leave()
            held = Counter(kept.values())
            assert held[kept[leaving]] == max(held.values())
            order.discard(kept.pop(leaving), leaving)
        order.check_integrity()
    order.clear()
    order.check_integrity()


@pytest.mark.parametrize("bin_width", [0.0, 0.5])
def test_a_flood_of_one_tenant_leaves_the_others_encodings(bin_width: float) -> None:
    world = World(max_entries=100, bin_width=bin_width, sample_share=0.0)
    mine = rows_of(40, seed=1)
    ask(world, mine, "mine")
    for seed in range(5):
        ask(world, rows_of(300, seed=10 + seed), "flood")
        assert ask(world, mine, "mine") == 40


def test_a_flood_of_one_tenant_leaves_the_others_responses() -> None:
    cache = ResponseCache(max_entries=50, lifetime_s=None)

    def put(tenant: str, text: str) -> None:
        partition = Partition(tenant, truncate=False, has_pair=False)
        cache.put(Response(partition, TextItem(text), Output(b"\0" * 8), [], 0.0))
        cache.check_integrity()

    for number in range(20):
        put("mine", f"text {number}")
    for number in range(500):
        put("flood", f"text {number}")
    partition = Partition("mine", truncate=False, has_pair=False)
    assert all(cache.exact(partition, TextItem(f"text {number}")) for number in range(20))
    assert len(cache) == 50


@pytest.mark.parametrize("bin_width", [0.0, 0.25])
def test_a_key_tells_whose_it_is(bin_width: float) -> None:
    rule = KeyRule(FeatureSpec().prefix, bin_width)
    rows = rows_of(3)
    assert {rule.owner_of(key) for tenant in ("", "a", "ä/b") for key in rule.keys(rows, tenant)} == {
        b"",
        b"a",
        "ä/b".encode(),
    }
