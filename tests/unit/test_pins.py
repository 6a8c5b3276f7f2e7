"""Pins: what they cover, what they protect, what they cost, when they end."""

from __future__ import annotations

import pytest

from kvcore.errors import IntegrityError, OutOfBlocks, OverBudget
from kvcore.pins import PinKind, PinOutcome
from tests.cache_kit import CacheKit

A, B, C, D = [1] * 4, [2] * 4, [3] * 4, [4] * 4
HARD, SOFT = PinKind.HARD, PinKind.SOFT


def test_a_hard_pin_keeps_its_whole_path():
    kit = CacheKit(4)
    kit.compute([*A, *B])
    kit.compute(C)
    kit.cache.control.pin(kit.node([*A, *B]), HARD)
    kit.cache.check_integrity()
    assert (kit.cache.num_available, kit.cache.tree.num_evictable) == (2, 1)
    kit.cache.evict(1)
    assert (kit.cached(C)[0], kit.cached([*A, *B])[0]) == (0, 8)
    with pytest.raises(OutOfBlocks):
        kit.cache.evict(1)


def test_a_soft_pin_goes_last_and_from_its_end():
    kit = CacheKit(4)
    kit.compute([*A, *B])
    kit.compute(C)
    kit.compute(D)
    kit.cache.control.pin(kit.node([*A, *B]), SOFT)
    kit.cache.evict(2)  # C and D were used later, and go first
    assert [kit.cached(x)[0] for x in (C, D)] == [0, 0]
    assert kit.cached([*A, *B])[0] == 8
    kit.cache.evict(1)
    kit.cache.check_integrity()
    assert kit.cached([*A, *B, 9])[0] == 4
    assert [pin.node for pin in kit.cache.pins.all] == [kit.node(A)]
    kit.cache.evict(1)
    kit.cache.check_integrity()
    assert len(kit.cache.pins) == 0


def test_blocks_under_several_pins_count_once():
    kit = CacheKit(16)
    kit.compute([*A, *B])
    kit.compute([*A, *C])
    control, pins = kit.cache.control, kit.cache.pins
    assert control.pin(kit.node([*A, *B]), HARD) == PinOutcome(2, 2)
    assert control.pin(kit.node([*A, *C]), HARD) == PinOutcome(2, 1)
    assert control.pin(kit.node(A), SOFT) == PinOutcome(1, 0)
    assert (pins.num_blocks(HARD), pins.num_blocks(SOFT)) == (3, 1)
    assert kit.node(A).space.num_pinned_blocks == 3
    control.unpin(kit.node([*A, *B]))
    kit.cache.check_integrity()
    assert (pins.num_blocks(HARD), kit.node(A).space.num_pinned_blocks) == (2, 2)


def test_a_pin_beyond_its_budget_is_refused_with_the_figures():
    kit = CacheKit(8, hard_pin_share=0.25, soft_pin_share=0.5)
    kit.compute([*A, *B, *C])
    with pytest.raises(OverBudget) as refused:
        kit.cache.control.pin(kit.node([*A, *B, *C]), HARD)
    assert (refused.value.needed, refused.value.pinned, refused.value.budget) == (3, 0, 2)
    kit.cache.control.pin(kit.node([*A, *B]), HARD)
    with pytest.raises(OverBudget):
        kit.cache.control.pin(kit.node([*A, *B, *C]), HARD)
    kit.cache.control.pin(kit.node([*A, *B, *C]), SOFT)
    kit.cache.check_integrity()


def test_a_caller_may_allow_less_than_the_budget():
    kit = CacheKit(8)
    kit.compute([*A, *B])
    with pytest.raises(OverBudget):
        kit.cache.control.pin(kit.node([*A, *B]), HARD, budget=1)
    assert len(kit.cache.pins) == 0


def test_pinning_again_changes_kind_and_lifetime():
    kit = CacheKit(8)
    kit.compute(A)
    node = kit.node(A)
    kit.cache.control.pin(node, HARD, lifetime_s=5.0)
    assert kit.cache.control.pin(node, SOFT) == PinOutcome(1, 0)
    kit.cache.check_integrity()
    assert kit.cache.tree.num_evictable == 1
    kit.clock.advance(6.0)
    kit.cache.sweep_expired()
    assert [(p.kind, p.ends_at) for p in kit.cache.pins.all] == [(SOFT, None)]


def test_a_pin_ends_with_its_own_lifetime():
    kit = CacheKit(8)
    kit.compute(A)
    ended = []
    kit.cache.pins.on_end = ended.append
    kit.cache.control.pin(kit.node(A), HARD, lifetime_s=5.0)
    kit.clock.advance(4.9)
    kit.cache.sweep_expired()
    assert not ended
    kit.clock.advance(0.1)
    kit.cache.sweep_expired()
    kit.cache.check_integrity()
    assert [pin.kind for pin in ended] == [HARD]
    assert kit.cached(A)[2]  # only the pin has ended
    kit.cache.evict(1)


def test_a_pin_does_not_keep_content_alive():
    kit = CacheKit(8)
    kit.compute([*A, *B], lifetime_s=10.0)
    kit.cache.control.pin(kit.node([*A, *B]), HARD)
    kit.clock.advance(10.0)
    assert kit.cached([*A, *B])[0] == 0
    assert kit.cache.sweep_expired() == 2
    kit.cache.check_integrity()
    assert (len(kit.cache.pins), kit.cache.pool.num_free) == (0, 8)


def test_a_pin_below_what_expires_ends_too():
    kit = CacheKit(8)
    kit.compute(A, lifetime_s=10.0)
    kit.compute([*A, *B])
    kit.cache.control.pin(kit.node([*A, *B]), HARD)
    kit.clock.advance(10.0)
    kit.cache.sweep_expired()
    kit.cache.check_integrity()
    assert (len(kit.cache.pins), kit.cache.pool.num_free) == (0, 8)


def test_content_that_may_not_be_used_loses_its_pin():
    kit = CacheKit(8)
    bad = kit.start([*A, *B, 9])
    neighbour = kit.start([*A, *B, *C])
    kit.cache.control.pin(kit.node([*A, *B, *C]), HARD)
    kit.cache.discard([bad])
    kit.cache.check_integrity()
    assert (len(kit.cache.pins), kit.cached([*A, *B])[0]) == (0, 0)
    kit.cache.release(neighbour)
    kit.cache.check_integrity()
    assert kit.cache.pool.num_free == 8


def test_the_block_that_a_request_is_filling_cannot_be_pinned():
    kit = CacheKit(8)
    lease = kit.start([*A, 5, 6])
    with pytest.raises(IntegrityError, match="cannot be named"):
        kit.cache.control.pin(lease.nodes[-1], HARD)
    kit.cache.release(lease)
    kit.cache.control.pin(kit.node([*A, 5, 6]), HARD)
    assert kit.cache.tree.num_evictable == 0


def test_a_reader_of_a_pinned_prefix_neither_moves_nor_ends_the_pin():
    kit = CacheKit(8)
    kit.compute([*A, 5, 6])
    node = kit.node([*A, 5, 6])
    kit.cache.control.pin(node, HARD)
    kit.compute([*A, 5, 6, 7, 8, 9])
    kit.compute([*A, 5, 6])
    assert [pin.node for pin in kit.cache.pins.all] == [node]
    assert kit.cached([*A, 5, 6]) == (4, 2, True)


def test_clearing_leaves_hard_pins_and_takes_soft_ones():
    kit = CacheKit(8)
    kit.compute(A)
    kit.compute(B)
    kit.cache.control.pin(kit.node(A), HARD)
    kit.cache.control.pin(kit.node(B), SOFT)
    assert kit.cache.clear() == 1
    kit.cache.check_integrity()
    assert (kit.cached([*A, 0])[0], kit.cached([*B, 0])[0], len(kit.cache.pins)) == (4, 0, 1)


def test_leaves_that_requests_wait_for_still_go_before_soft_pins():
    from kvcore.cursors import Cursor
    from kvcore.keys import pack_tokens
    from tests.cache_kit import HOME

    kit = CacheKit(4)
    kit.compute(A)
    kit.compute(B)
    kit.cache.control.pin(kit.node(A), SOFT)
    kit.cache.park(HOME, Cursor(pack_tokens([*B, 9]), 4, None, None))
    kit.cache.evict(1)
    assert (kit.cached([*A, 0])[0], kit.cached([*B, 0])[0]) == (4, 0)
