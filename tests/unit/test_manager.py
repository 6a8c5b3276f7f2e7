"""Leases: sharing, copying, publishing, ending. Block numbers are exact."""

from __future__ import annotations

import pytest

from kvcore.errors import IntegrityError, OutOfBlocks
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.lease import SlotCopy
from kvcore.node import NodeState
from tests.cache_kit import HOME, CacheKit

A, B, C = [1] * 4, [2] * 4, [3] * 4


# -- sharing ----------------------------------------------------------------------------------------


def test_a_finished_prompt_stays_cached_block_by_block():
    kit = CacheKit()
    assert kit.compute([*A, *B, 9]) == [0, 1, 2]
    assert kit.cached([*A, *B, 7]) == (8, 0, False)
    assert kit.cached([*A, *C, 7]) == (4, 0, False)
    assert kit.cached([7]) == (0, 0, False)


def test_a_second_request_shares_blocks_of_a_running_one():
    kit = CacheKit()
    first = kit.start([*A, *B, 9])
    second = kit.start([*A, *B, 8])
    assert first.block_table.tolist() == [0, 1, 2]
    assert second.block_table.tolist() == [0, 1, 3]
    assert second.match.num_tokens == 8
    kit.cache.check_integrity()


def test_a_second_request_in_the_same_step_shares_pending_blocks():
    kit = CacheKit()
    first = kit.plan(kit.open([*A, *B, 9]))
    second = kit.plan(kit.open([*A, *B, 8]))
    assert second.block_table.tolist() == [0, 1, 3]
    assert (second.num_computed, second.in_flight) == (8, 1)
    assert [n.state for n in second.nodes[:2]] == [NodeState.PENDING] * 2
    kit.cache.check_integrity()
    kit.cache.commit([first, second])
    assert [n.state for n in second.nodes[:2]] == [NodeState.READY] * 2
    kit.cache.check_integrity()


def test_whoever_needs_what_the_running_step_computes_is_told_to_wait():
    kit = CacheKit()
    long = kit.open([*A, *B, *C, 9])
    kit.plan(long, 8)
    find = kit.cache.find
    assert find(HOME, pack_tokens([*A, *B, *C, 8])).is_being_computed  # the first goes on with C
    assert not find(HOME, pack_tokens([*A, *B, 8])).is_being_computed
    assert not find(HOME, pack_tokens([*A, 8])).is_being_computed
    kit.cache.commit([long])
    assert not find(HOME, pack_tokens([*A, *B, *C, 8])).is_being_computed


def test_an_identical_prompt_waits_for_the_logits_of_the_running_step():
    kit = CacheKit()
    first = kit.plan(kit.open([*A, 9]))
    assert kit.cache.find(HOME, pack_tokens([*A, 9])).is_being_computed
    kit.cache.commit([first])
    assert kit.cached([*A, 9]) == (4, 1, True)


@pytest.mark.parametrize("num_logits_slots", [0, 4])
def test_an_identical_prompt_of_whole_blocks_waits_too(num_logits_slots):
    kit = CacheKit(num_logits_slots=num_logits_slots)
    kit.plan(kit.open(A))
    assert kit.cache.find(HOME, pack_tokens(A)).is_being_computed


def test_two_that_fill_the_same_block_in_one_step_end_up_with_one():
    kit = CacheKit()
    first, second = kit.open(A, read=False), kit.open(A, read=False)
    kit.plan(first)
    kit.plan(second)
    assert (first.block_table.tolist(), second.block_table.tolist()) == ([0], [1])
    assert second.duplicates == {0: 1}
    kit.cache.check_integrity()
    kit.cache.commit([first, second])
    assert second.block_table.tolist() == [0]
    assert kit.cache.pool.num_free == 15
    kit.cache.check_integrity()


def test_salts_never_share():
    kit = CacheKit()
    kit.compute([*A, 9], namespace=NamespaceKey("model", salt="one"))
    assert kit.cached([*A, 9], namespace=NamespaceKey("model", salt="two")) == (0, 0, False)
    assert kit.cached([*A, 9]) == (0, 0, False)
    assert kit.cached([*A, 9], namespace=NamespaceKey("model", salt="one")) == (4, 1, True)


def test_looking_changes_nothing():
    kit = CacheKit()
    kit.lookup([*A, 9])
    assert not kit.cache.tree.roots
    kit.compute([*A, 9])
    before = [(n, n.last_used, n.hits) for n in kit.cache.tree.iterate()]
    kit.lookup([*A, 9])
    assert [(n, n.last_used, n.hits) for n in kit.cache.tree.iterate()] == before


# -- exact repeats and parts of blocks --------------------------------------------------------------


def test_an_exact_repeat_needs_no_computing():
    kit = CacheKit()
    kit.compute([*A, 5, 6])
    repeat = kit.open([*A, 5, 6])
    assert repeat.match.is_exact
    assert (repeat.num_computed, repeat.logits_from) == (6, 0)
    assert repeat.copy == SlotCopy(1, 2, 2)
    assert repeat.block_table.tolist() == [0, 2]


def test_an_exact_repeat_of_whole_blocks_copies_nothing():
    kit = CacheKit()
    kit.compute([*A, *B])
    repeat = kit.open([*A, *B])
    assert (repeat.num_computed, repeat.logits_from, repeat.copy) == (8, 0, None)


def test_an_exact_repeat_whose_partial_block_has_gone_still_has_its_logits():
    kit = CacheKit(2)
    kit.compute([*A, 5, 6])
    kit.cache.evict(1)
    repeat = kit.open([*A, 5, 6])
    assert (repeat.num_computed, repeat.logits_from, repeat.copy) == (4, 0, None)


def test_a_partial_block_is_copied_not_recomputed():
    kit = CacheKit()
    kit.compute([*A, 5, 6, 7, 8])
    other = kit.open([*A, 5, 6, 9, 9, 9])
    assert other.match.partial_tokens == 2
    assert other.copy == SlotCopy(1, 2, 2)
    assert other.num_computed == 6
    kit.plan(other)
    assert other.in_flight == 3
    kit.cache.commit([other])
    kit.cache.check_integrity()


def test_at_least_one_token_of_a_prompt_is_computed_without_kept_logits():
    kit = CacheKit(num_logits_slots=0)
    kit.compute([*A, *B])
    again = kit.open([*A, *B])
    assert (again.num_computed, again.logits_from) == (7, None)
    assert again.copy == SlotCopy(1, 2, 3)


def test_the_source_of_a_copy_may_become_its_target():
    kit = CacheKit(2)
    kit.compute([*A, 5, 6])
    lease = kit.open([*A, 5, 9])
    assert lease.copy == SlotCopy(1, 1, 1)  # nothing is moved, one slot stays as it is
    assert lease.block_table.tolist() == [0, 1]
    kit.cache.check_integrity()


def test_no_block_for_a_copy_leaves_everything_as_it_was():
    kit = CacheKit(2)
    holder = kit.start([*A, 5, 6])
    with pytest.raises(OutOfBlocks):
        kit.open([*A, 5, 9])
    kit.cache.check_integrity()
    assert len(kit.cache.leases) == 1
    kit.cache.release(holder)


def test_logits_that_are_being_computed_cannot_be_drawn_from():
    kit = CacheKit()
    kit.plan(kit.open([1]))
    found = kit.cache.find(HOME, pack_tokens([1]))
    with pytest.raises(IntegrityError, match="cannot draw"):
        kit.cache.open(found, pack_tokens([1]))


def test_a_prompt_of_one_token_is_computed_once_and_then_repeated():
    kit = CacheKit()
    assert kit.cached([5]) == (0, 0, False)
    kit.compute([5])
    assert kit.cached([5]) == (0, 1, True)


def test_blocks_of_one_position_work():
    kit = CacheKit(block_size=1)
    kit.compute([1, 2, 3])
    assert kit.cached([1, 2, 3]) == (3, 0, True)
    assert kit.cached([1, 2, 9]) == (2, 0, False)
    assert kit.cached([1, 2]) == (1, 0, False)


# -- running out ------------------------------------------------------------------------------------


def test_extending_beyond_the_pool_changes_nothing():
    kit = CacheKit(2)
    lease = kit.open([*A, *B, 9])
    with pytest.raises(OutOfBlocks):
        kit.plan(lease)
    assert (lease.block_table.tolist(), lease.in_flight) == ([], 0)
    kit.cache.check_integrity()
    kit.plan(lease, 8)
    kit.cache.commit([lease])
    kit.cache.check_integrity()


def test_whether_a_prompt_fits_counts_what_it_would_hold_itself():
    kit = CacheKit(3)
    kit.compute([*A, *B])
    found = kit.cache.find(HOME, pack_tokens([*A, *B, 9]))
    assert kit.cache.fits(found, 9, spare=0)
    assert not kit.cache.fits(found, 9, spare=1)  # A and B could be evicted, but not by one who uses them
    assert not kit.cache.fits(found, 13, spare=0)


def test_blocks_needed_counts_from_what_is_held():
    kit = CacheKit()
    lease = kit.start([*A, 9])
    assert [kit.cache.blocks_needed(lease, n) for n in (0, 3, 4, 8)] == [0, 0, 1, 2]


# -- ends -------------------------------------------------------------------------------------------


def test_nothing_of_a_failed_step_stays():
    kit = CacheKit()
    kit.compute(A)
    first = kit.plan(kit.open([*A, *B, 9]))
    second = kit.plan(kit.open([*A, *B, 8]))
    kit.cache.roll_back([first, second])
    kit.cache.check_integrity()
    assert kit.cached([*A, *B, 9]) == (4, 0, False)
    assert kit.cache.pool.num_free == 15
    assert len(kit.cache.tails) == 1  # A's own


def test_discarded_content_is_not_found_again_even_while_others_hold_it():
    kit = CacheKit()
    bad = kit.start([*A, *B, 9])
    neighbour = kit.start([*A, *B, 8])
    kit.cache.discard([bad])
    kit.cache.check_integrity()
    assert kit.cached([*A, *B, 7]) == (0, 0, False)
    assert kit.compute([*A, *B, 7])[:2] == [2, 4]  # computed anew, in other blocks
    kit.cache.release(neighbour)
    kit.cache.check_integrity()
    assert kit.cached([*A, *B, 7]) == (8, 1, True)


def test_spoiled_logits_are_not_kept():
    kit = CacheKit()
    kit.compute(A)
    bad = kit.plan(kit.open([*A, 9]))
    kit.cache.commit([bad], spoiled={bad})
    kit.cache.discard([bad])
    kit.cache.check_integrity()
    assert kit.cached([*A, 9]) == (4, 0, False)


def test_a_discarded_lease_takes_nothing_from_others():
    kit = CacheKit()
    kit.compute(A)
    lease = kit.plan(kit.open([*A, 9], read=False))  # computes A again and then uses the cached one
    kit.cache.commit([lease])
    kit.cache.discard([lease])
    assert kit.cached([*A, 0]) == (4, 0, False)


def test_a_lease_in_a_step_cannot_be_released():
    kit = CacheKit()
    lease = kit.plan(kit.open(A))
    with pytest.raises(IntegrityError, match="in the middle of a step"):
        kit.cache.release(lease)


def test_a_lease_ends_once():
    kit = CacheKit()
    lease = kit.start(A)
    kit.cache.release(lease)
    with pytest.raises(IntegrityError, match="closed twice"):
        kit.cache.release(lease)


def test_a_last_block_that_another_has_in_full_is_not_kept_twice():
    kit = CacheKit()
    kit.compute([*A, 5, 6, 7, 8])
    kit.compute([*A, 5, 6])
    assert kit.cache.tree.num_nodes == 2


def test_a_private_request_leaves_nothing_behind():
    kit = CacheKit()
    kit.compute(A)
    lease = kit.start([*A, *B, 9], owner=7)
    assert lease.block_table.tolist() == [0, 1, 2]
    assert kit.cached([*A, *B, 9]) == (4, 0, False)
    kit.cache.release(lease)
    kit.cache.forget_owner(7)
    kit.cache.check_integrity()
    assert (kit.cache.tree.num_nodes, len(kit.cache.tails)) == (1, 1)


def test_samples_of_a_private_request_share_and_the_last_one_cleans_up():
    kit = CacheKit()
    first = kit.start([*A, *B, 9], owner=7)
    second = kit.open([*A, *B, 9], owner=7)
    assert second.match.is_exact
    kit.cache.release(first)
    kit.cache.check_integrity()
    kit.cache.discard([second])  # whichever way it ends
    kit.cache.forget_owner(7)
    kit.cache.check_integrity()
    assert kit.cache.pool.num_free == 16


# -- lifetimes --------------------------------------------------------------------------------------


def test_a_few_copied_tokens_do_not_hand_on_their_lifetime():
    """Everybody's prompts begin with the same token: one short lifetime used to reach all of them."""
    kit = CacheKit()
    kit.compute([5, 6, 7, 8], lifetime_s=10.0)
    kit.compute([5, 1, 2, 3, 9])
    kit.clock.advance(11.0)
    assert kit.cached([5, 1, 2, 3, 9])[0] == 4


def test_a_lifetime_counts_from_insertion_not_from_use():
    kit = CacheKit()
    kit.compute(A, lifetime_s=10.0)
    kit.clock.advance(9.0)
    assert kit.compute([*A, 9], lifetime_s=10.0)[0] == 0
    kit.clock.advance(1.0)
    assert kit.cached([*A, 9])[0] == 0


def test_a_block_is_as_old_as_its_first_slot():
    kit = CacheKit()
    lease = kit.start([5, 6, 7], lifetime_s=10.0)
    kit.clock.advance(5.0)
    lease.tokens.append(8)
    kit.plan(lease)
    kit.cache.commit([lease])
    assert (lease.nodes[0].inserted_at, lease.nodes[0].expires_at) == (0.0, 10.0)


def test_a_copy_does_not_live_longer_than_what_was_copied():
    kit = CacheKit()
    kit.compute([5, 6, 7, 8], lifetime_s=10.0)
    kit.clock.advance(9.0)
    kit.compute([5, 6, 9, 9, 9], lifetime_s=10.0)
    assert kit.cached([5, 6, 9, 9, 0])[0] == 4
    kit.clock.advance(1.0)
    assert kit.cached([5, 6, 9, 9, 0])[0] == 0


def test_kept_logits_of_a_short_prompt_expire_too():
    kit = CacheKit()
    kit.compute([5], lifetime_s=10.0)
    kit.clock.advance(10.0)
    assert kit.cached([5]) == (0, 0, False)


def test_clearing_returns_to_the_start():
    kit = CacheKit()
    kit.compute([*A, *B, 9], lifetime_s=1.0)
    kit.compute([5])
    kit.clock.advance(2.0)
    kit.compute([*A, *B, *C])
    assert kit.cache.clear() == 7
    kit.cache.check_integrity()
    assert (kit.cache.pool.num_free, len(kit.cache.tails), len(kit.cache.tree.roots)) == (16, 0, 0)


def test_clearing_leaves_running_requests_alone():
    kit = CacheKit()
    kit.compute(B)
    lease = kit.start([*A, 9])
    assert kit.cache.clear() == 1
    kit.cache.check_integrity()
    assert kit.cached([*A, 0])[0] == 4
    kit.cache.release(lease)
