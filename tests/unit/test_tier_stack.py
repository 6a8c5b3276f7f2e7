"""All tiers as one: what goes down, what comes up, in what order, and what happens when one of them fails."""

from __future__ import annotations

import random

import pytest

from kvcore.clock import ManualClock, MonotonicClock
from kvcore.tiers.host import HostTier
from kvcore.tiers.interface import FetchFailure, ObjectKind, Presence
from kvcore.tiers.stack import StoreReason, TierStack
from kvcore.tiers.worth import DecisionReason, Worth
from tests.scripted_tier import ScriptedTier
from tests.tier_kit import (
    FORMAT,
    NAMESPACE,
    OTHER_NAMESPACE,
    ROOMY,
    TierContract,
    assert_same,
    make_chain,
    make_object,
    store,
    until,
)

BLOCK = FORMAT.bytes_per_block


class TestScriptedTierKeepsTheContract(TierContract):
    def make_tier(self, *, max_bytes=ROOMY, clock=None, on_ready=None):
        tier = ScriptedTier("disk", clock or ManualClock(), persistent=True, max_bytes=max_bytes)
        tier._board._on_ready = on_ready
        return tier


@pytest.fixture
def clock():
    return ManualClock(100.0)


@pytest.fixture
def host(clock):
    return ScriptedTier("host", clock, persistent=False)


@pytest.fixture
def disk(clock):
    return ScriptedTier("disk", clock, persistent=True)


@pytest.fixture
def make_stack(clock, host, disk):
    stacks = []

    def make(**options):
        stack = TierStack([host, disk], FORMAT, worth=Worth(), clock=clock, **options)
        stacks.append(stack)
        return stack

    yield make
    for stack in stacks:
        stack.check_integrity()
        stack.close()
        stack.check_integrity()
        assert not stack.arrivals.batches


@pytest.fixture
def stack(make_stack):
    return make_stack()


def keys_of(chain):
    return [stored.key for stored in chain]


def fill(tier, chain):
    for stored in chain:
        store(tier, stored)
    return keys_of(chain)


def fetch(stack, keys, timeout_s=10.0):
    return stack.fetch(keys, namespace=NAMESPACE, timeout_s=timeout_s)


# --------------------------------------------------------------------------------------------------- down


def put(stack, stored, reason=StoreReason.EVICTED):
    ticket = stack.prepare(stored.key, reason=reason)
    if ticket is None:
        return ()
    stack.complete(ticket, stored)
    return tuple(tier.name for tier, _ in ticket.reservations)


def test_a_written_block_goes_where_it_outlives_the_process_and_an_evicted_one_everywhere(stack):
    stored = make_object()
    assert put(stack, stored, StoreReason.WRITTEN) == ("disk",)
    assert put(stack, stored, StoreReason.WRITTEN) == ()
    assert put(stack, stored, StoreReason.EVICTED) == ("host",)
    assert put(stack, stored, StoreReason.EVICTED) == ()
    assert put(stack, make_object([9, 9, 9, 9]), StoreReason.EVICTED) == ("host", "disk")


def test_an_abandoned_ticket_leaves_nothing_in_any_tier(stack, host, disk):
    stored = make_object()
    stack.abandon(stack.prepare(stored.key, reason=StoreReason.EVICTED))
    assert stack.lookup(stored.key).presence is Presence.NO
    assert host.stats().num_objects == disk.stats().num_objects == 0


def test_blocks_that_can_never_win_a_fetch_are_not_stored_but_ends_of_prompts_are(stack, disk):
    disk.speed = (0.001, 1e3)  # a kilobyte a second
    stack.poll()
    stack.worth.observe_recompute(1000, 0, 0.01)
    assert put(stack, make_object()) == ("host",)
    assert stack.counters.not_worth_storing == {"disk": 1}
    assert put(stack, make_object([1], kind=ObjectKind.LOGITS)) == ("host", "disk")


# ---------------------------------------------------------------------------------------------------- where


def test_the_fastest_tier_that_has_it_is_named(stack, host, disk):
    stored = make_object()
    assert stack.lookup(stored.key).presence is Presence.NO
    store(disk, stored)
    assert stack.lookup(stored.key).tier == "disk"
    store(host, stored)
    assert stack.lookup(stored.key).tier == "host"


def test_locating_a_prefix_ends_at_its_first_hole(stack, host, disk):
    chain = make_chain(5)
    fill(host, chain[:2])
    fill(disk, [chain[2], chain[4]])
    assert [where.tier for where in stack.locate(keys_of(chain))] == ["host", "host", "disk"]
    ticket = stack.prepare(chain[3].key, reason=StoreReason.WRITTEN)
    assert [where.presence for where in stack.locate(keys_of(chain))][3:] == [Presence.COMING]
    stack.abandon(ticket)


def test_fetch_or_recompute_is_decided_over_all_tiers_involved(stack, host, disk):
    chain = make_chain(4)
    keys = fill(host, chain[:1]) + fill(disk, chain[1:])
    host.speed, disk.speed = (0.0, 1e9), (0.5, 1e9)
    located = stack.locate(keys)
    assert stack.decide(located, keys, start_position=0).reason is DecisionReason.UNMEASURED
    stack.poll()
    stack.worth.observe_recompute(16, 0, 0.1)
    assert stack.decide(located, keys, start_position=0).reason is DecisionReason.RECOMPUTE_FASTER
    assert stack.decide(located[:1], keys, start_position=0).reason is DecisionReason.FETCH_FASTER
    hidden = stack.decide(located, keys, start_position=0, queue_wait_s=2.0)
    assert hidden.fetch
    assert hidden.reason is DecisionReason.HIDDEN
    assert stack.decide([], keys, start_position=0).reason is DecisionReason.NOTHING
    assert stack.counters.chosen.total() == 4


# ------------------------------------------------------------------------------------------------------- up


def test_a_prefix_comes_up_from_several_tiers_in_order(stack, host, disk):
    chain = make_chain(4)
    keys = fill(host, chain[::2])
    fill(disk, chain[1::2])
    batch = fetch(stack, keys_of(chain))
    assert batch.num_ready == 0
    assert stack.poll()
    assert batch.is_done
    for stored, found in zip(chain, batch.take(4), strict=True):
        assert_same(found, stored)
    assert batch.objects_by_tier == {"host": 2, "disk": 2}
    assert stack.is_idle
    assert stack.reserved_bytes == 0
    assert keys == [chain[0].key, chain[2].key]


def test_only_leading_objects_count_as_ready(stack, disk):
    chain = make_chain(4)
    keys = fill(disk, chain)
    disk.is_held = True
    batch = fetch(stack, keys)
    disk.release(keys[1], keys[3])
    stack.poll()
    assert batch.num_ready == 0
    disk.release(keys[0])
    assert stack.poll()
    assert batch.num_ready == 2
    assert [found.key for found in batch.take(1)] == keys[:1]
    with pytest.raises(ValueError, match="1 are ready"):
        batch.take(2)
    disk.is_held = False
    stack.poll()
    assert [found.key for found in batch.take(3)] == keys[1:]
    assert stack.is_idle


def test_what_one_tier_fails_to_give_comes_from_the_next(stack, host, disk):
    chain = make_chain(3)
    keys = fill(host, chain)
    fill(disk, chain)
    host.failing[keys[1]] = FetchFailure.CORRUPT
    batch = fetch(stack, keys)
    stack.poll()
    stack.poll()
    assert batch.num_ready == 3
    for stored, found in zip(chain, batch.take(3), strict=True):
        assert_same(found, stored)
    assert batch.objects_by_tier == {"host": 2, "disk": 1}
    assert stack.counters.fallbacks == {"host": 1}
    assert stack.counters.failures == {("host", FetchFailure.CORRUPT): 1}
    assert stack.counters.lost == 0


def test_a_hole_ends_the_batch_and_what_lies_behind_is_cancelled(stack, disk):
    chain = make_chain(4)
    keys = fill(disk, chain)
    disk.is_held = True
    disk.failing[keys[1]] = FetchFailure.MISSING
    batch = fetch(stack, keys)
    disk.release(keys[1])
    stack.poll()
    assert (batch.failed_at, batch.failure, batch.num_ready) == (1, FetchFailure.MISSING, 0)
    assert not batch.is_done
    disk.is_held = False
    stack.poll()
    assert batch.is_done
    assert [found.key for found in batch.take(1)] == keys[:1]
    stack.poll()
    assert stack.is_idle
    assert stack.counters.lost == 1


def test_the_end_of_a_prompt_may_be_missing_while_its_blocks_are_there(stack, disk):
    block = make_object()
    logits = make_object([5], parent=block, kind=ObjectKind.LOGITS)
    store(disk, block)
    batch = fetch(stack, [block.key, logits.key])
    stack.poll()
    assert (batch.num_ready, batch.failed_at, batch.is_done) == (1, 1, True)
    assert_same(batch.take(1)[0], block)


def test_what_two_batches_want_is_fetched_once_and_given_to_both(stack, disk):
    chain = make_chain(3)
    keys = fill(disk, chain)
    first, second = fetch(stack, keys), fetch(stack, keys[:2])
    assert stack.counters.shared == 2
    stack.poll()
    assert disk.asked == keys
    assert [found.key for found in first.take(3)] == keys
    assert stack.reserved_bytes == 2 * BLOCK
    third = fetch(stack, keys[:1])  # ready already: the second batch has not taken it
    assert third.num_ready == 1
    assert [found.key for found in second.take(2)] == keys[:2]
    assert [found.key for found in third.take(1)] == keys[:1]
    assert disk.asked == keys
    assert stack.reserved_bytes == 0


def test_cancelling_one_of_two_batches_leaves_the_other_whole(stack, disk):
    chain = make_chain(3)
    keys = fill(disk, chain)
    disk.is_held = True
    first, second = fetch(stack, keys), fetch(stack, keys[:2])
    first.cancel()
    first.cancel()
    disk.is_held = False
    stack.poll()
    assert [found.key for found in second.take(2)] == keys[:2]
    assert stack.is_idle
    with pytest.raises(ValueError, match="wanted"):
        first.take(1)


def test_what_was_cancelled_and_is_wanted_again_arrives(stack, disk):
    keys = fill(disk, make_chain(2))
    disk.is_held = True
    fetch(stack, keys).cancel()
    again = fetch(stack, keys)
    stack.poll()  # the first fetches end as cancelled
    disk.is_held = False
    stack.poll()
    assert again.num_ready == 2
    assert stack.counters.failures == {}
    again.cancel()
    assert stack.is_idle


def test_the_budget_bounds_what_is_under_way_and_not_taken(make_stack, disk):
    stack = make_stack(max_fetched_bytes=2 * BLOCK)
    keys = fill(disk, make_chain(6))
    batch = fetch(stack, keys)
    assert disk.asked == keys[:2]
    stack.poll()
    assert stack.reserved_bytes == 2 * BLOCK
    taken = []
    while not (batch.is_done and batch.num_taken == len(keys)):
        stack.check_integrity()
        assert stack.reserved_bytes <= 2 * BLOCK
        taken += batch.take(batch.num_ready - batch.num_taken)
        stack.poll()
    assert [found.key for found in taken] == keys


def test_the_first_batch_gets_all_its_room_before_the_next_gets_any(make_stack, disk):
    stack = make_stack(max_fetched_bytes=4 * BLOCK)
    old, new = make_chain(5, first=1), make_chain(2, first=2)
    fill(disk, old + new)
    first, second = fetch(stack, keys_of(old)), fetch(stack, keys_of(new))
    stack.poll()
    assert (first.num_ready, second.num_ready) == (4, 0)
    first.take(4)
    stack.poll()
    stack.poll()
    assert (first.num_ready, second.num_ready) == (5, 2)


def test_a_budget_below_one_object_still_lets_them_through_one_by_one(make_stack, disk):
    stack = make_stack(max_fetched_bytes=1)
    keys = fill(disk, make_chain(3))
    batch = fetch(stack, keys)
    for _ in keys:
        stack.poll()
        assert len(batch.take(1)) == 1
    assert stack.is_idle


def test_a_tier_that_hangs_is_given_up_for_the_next_one(stack, host, disk, clock):
    keys = fill(host, make_chain(2))
    fill(disk, make_chain(2))
    host.speed = (0.001, 1e9)
    stack.poll()
    host.is_held = True
    batch = fetch(stack, keys, timeout_s=30.0)
    clock.advance(0.6)
    stack.poll()
    stack.poll()
    assert batch.num_ready == 2
    assert stack.counters.fallbacks == {"host": 2}
    assert stack.counters.failures == {("host", FetchFailure.TIMEOUT): 2}


def test_a_batch_ends_at_its_deadline_with_what_has_come(stack, disk, clock):
    keys = fill(disk, make_chain(3))
    disk.is_held = True
    batch = fetch(stack, keys, timeout_s=0.2)
    disk.release(keys[0])
    stack.poll()
    clock.advance(0.2)
    stack.poll()
    assert batch.is_done
    assert (batch.num_ready, batch.failed_at, batch.failure) == (1, 1, FetchFailure.TIMEOUT)
    assert len(batch.take(1)) == 1
    stack.poll()
    assert stack.is_idle


def test_a_key_asked_for_in_another_namespace_gives_nothing(stack, disk):
    keys = fill(disk, make_chain(1))
    disk.is_held = True
    mine = fetch(stack, keys)
    theirs = stack.fetch(keys, namespace=OTHER_NAMESPACE, timeout_s=1.0)
    assert (theirs.is_done, theirs.failure) == (True, FetchFailure.MISMATCH)
    disk.is_held = False
    stack.poll()
    assert mine.num_ready == 1


def test_what_no_tier_has_fails_at_once(stack):
    batch = fetch(stack, keys_of(make_chain(2)))
    assert (batch.is_done, batch.failed_at, batch.num_ready) == (True, 0, 0)
    assert stack.is_idle


def test_what_came_from_below_is_kept_above_only_if_asked(make_stack, host, disk):
    keys = fill(disk, make_chain(2))
    plain = make_stack()
    fetch(plain, keys)
    plain.poll()
    assert host.stats().num_objects == 0
    promoting = make_stack(promotes=True)
    batch = fetch(promoting, keys)
    promoting.poll()
    batch.take(2)
    assert [host.lookup(key) for key in keys] == [Presence.YES, Presence.YES]
    assert promoting.counters.promoted == 2


def test_real_fetches_teach_what_a_tier_takes(stack, disk, clock):
    keys = fill(disk, make_chain(8))
    disk.is_held = True
    for _ in range(30):
        batch = fetch(stack, keys)
        clock.advance(0.08)
        disk.is_held = False
        stack.poll()
        batch.take(8)
        disk.is_held = True
    assert stack.worth.fetch_s("disk", 8 * BLOCK) == pytest.approx(0.08, rel=0.1)


def test_removing_and_clearing_reach_every_tier(stack, host, disk):
    chain = make_chain(2)
    fill(host, chain)
    fill(disk, chain)
    stack.remove([chain[0].key])
    assert [stack.lookup(key).tier for key in keys_of(chain)] == [None, "host"]
    assert stack.clear(NAMESPACE) == {"host": 1, "disk": 1}
    assert stack.lookup(chain[1].key).presence is Presence.NO
    assert set(stack.stats()) == {"host", "disk"}


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_events_delivers_the_right_objects_and_leaks_nothing(
    make_stack, host, disk, clock, seed
):
    draw = random.Random(seed)
    stack = make_stack(max_fetched_bytes=draw.choice([BLOCK, 3 * BLOCK, 100 * BLOCK]))
    chains = [make_chain(6, first=first) for first in range(3)]
    by_key = {stored.key: stored for chain in chains for stored in chain}
    for stored in by_key.values():
        for tier in draw.sample([host, disk], draw.choice([1, 2])):
            store(tier, stored)
    batches = []
    for _ in range(150):
        act = draw.random()
        if act < 0.2:
            chain = draw.choice(chains)
            begin = draw.randrange(4)
            keys = keys_of(chain)[begin : draw.randrange(begin + 1, 7)]
            batches.append(fetch(stack, keys, timeout_s=draw.choice([0.05, 5.0])))
        elif act < 0.5:
            stack.poll()
        elif act < 0.6:
            clock.advance(draw.choice([0.01, 0.3, 2.0]))
        elif act < 0.7:
            tier = draw.choice([host, disk])
            tier.is_held = not tier.is_held
        elif act < 0.8:
            tier = draw.choice([host, disk])
            tier.failing = {
                draw.choice(list(by_key)): draw.choice([FetchFailure.CORRUPT, FetchFailure.MISSING])
            }
        elif batches:
            batch = draw.choice(batches)
            if draw.random() < 0.2:
                batch.cancel()
            elif not batch.is_cancelled:
                wanted = batch.keys[batch.num_taken : batch.num_ready]
                for key, found in zip(wanted, batch.take(len(wanted)), strict=True):
                    assert_same(found, by_key[key])
        stack.check_integrity()
        assert stack.reserved_bytes <= max(stack.arrivals.max_fetched_bytes, BLOCK)
    host.is_held = disk.is_held = False
    clock.advance(100.0)
    stack.poll()
    assert all(batch.is_done for batch in batches)
    for batch in batches:
        batch.cancel()
    stack.poll()
    assert stack.is_idle
    assert stack.reserved_bytes == 0
    assert not +stack.arrivals.outstanding_bytes


def test_real_tiers_with_threads_bring_a_prefix_up(tmp_path):
    from kvcore.codec import make_codec

    slow = HostTier(FORMAT, ROOMY, codec=make_codec("zstd"))
    stack = TierStack([slow], FORMAT, worth=Worth(), clock=MonotonicClock())
    chain = make_chain(16)
    for stored in chain:
        assert put(stack, stored) == ("host",)
    until(lambda: len(stack.locate(keys_of(chain))) == 16 and stack.locate(keys_of(chain))[-1].tier == "host")
    batch = fetch(stack, keys_of(chain))
    until(lambda: stack.poll() or batch.is_done)
    until(lambda: stack.poll() or batch.num_ready == 16)
    for stored, found in zip(chain, batch.take(16), strict=True):
        assert_same(found, stored)
    assert stack.is_idle
    stack.close()
