"""Host memory as a tier: the contract with each lossless codec, and what is its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcore.clock import ManualClock
from kvcore.codec import Int8Codec, ZstdCodec
from kvcore.tiers.host import HostTier
from kvcore.tiers.interface import FetchFailure, ObjectKind, Presence
from tests.tier_kit import (
    FORMAT,
    NAMESPACE,
    ROOMY,
    TierContract,
    assert_same,
    bring,
    make_chain,
    make_object,
    offer,
    store,
    until,
)


class TestHostTierKeepsTheContract(TierContract):
    def make_tier(self, *, max_bytes=ROOMY, clock=None, on_ready=None):
        return HostTier(FORMAT, max_bytes, clock=clock, on_ready=on_ready)


class TestCompressedHostTierKeepsTheContract(TierContract):
    def make_tier(self, *, max_bytes=ROOMY, clock=None, on_ready=None):
        return HostTier(FORMAT, max_bytes, codec=ZstdCodec(), clock=clock, on_ready=on_ready)


def test_a_payload_is_neither_copied_on_its_way_in_nor_out():
    tier = HostTier(FORMAT, ROOMY)
    stored = make_object()
    store(tier, stored)
    assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=1.0)
    (outcome,) = tier.poll()  # at once, without a thread
    assert outcome.found.payload is stored.payload


def test_a_fetched_prefix_outlives_one_that_was_not_used():
    tier = HostTier(FORMAT, 8_000)
    used, unused = make_chain(2, first=1), make_chain(2, first=2)
    for stored in (*used, *unused):
        store(tier, stored)
    for stored in used:
        bring(tier, stored.key)
    while tier.stats().evicted == 0:
        store(tier, make_object([8, 8, 8, tier.stats().stored]))
    present = [tier.lookup(stored.key) is Presence.YES for stored in (*used, *unused)]
    assert present == [True, True, True, False]
    tier.check_integrity()


def test_looking_something_up_is_no_use_of_it():
    clock = ManualClock()
    tier = HostTier(FORMAT, 5_500, clock=clock)
    first, second, third = (make_object([n] * 4) for n in (1, 2, 3))
    store(tier, first)
    clock.advance(1)
    store(tier, second)
    clock.advance(1)
    assert tier.lookup(first.key) is Presence.YES
    store(tier, third)
    store(tier, make_object([4] * 4))
    assert tier.lookup(first.key) is Presence.NO
    assert tier.lookup(second.key) is Presence.YES


def test_an_object_larger_than_the_budget_is_refused_and_evicts_nothing():
    tier = HostTier(FORMAT, 2_000)
    store(tier, make_object())
    assert tier.prepare(make_object([9] * 4).key, 4_000) is None
    stats = tier.stats()
    assert (stats.refused_stores, stats.evicted, stats.num_objects) == (1, 0, 1)


def test_reservations_are_not_evicted_for_others():
    tier = HostTier(FORMAT, 3_500)
    tickets = [tier.prepare(make_object([n] * 4).key, 1024) for n in (1, 2)]
    assert None not in tickets
    assert tier.prepare(make_object([3] * 4).key, 1024) is None
    tier.abandon(tickets[0])
    assert tier.prepare(make_object([3] * 4).key, 1024) is not None


def test_an_object_removed_while_it_is_stored_stays_away():
    tier = HostTier(FORMAT, ROOMY)
    stored = make_object()
    ticket = tier.prepare(stored.key, 1024)
    tier.remove([stored.key])
    tier.complete(ticket, stored)
    assert tier.lookup(stored.key) is Presence.NO
    assert tier.stats().num_bytes == 0
    tier.check_integrity()


def test_int8_says_that_it_is_lossy_and_how_much_and_spares_logits():
    tier = HostTier(FORMAT, ROOMY, codec=Int8Codec())
    block, logits = make_object(), make_object([5], kind=ObjectKind.LOGITS)
    store(tier, block)
    store(tier, logits)
    outcome = bring(tier, block.key)
    assert outcome.is_lossy
    assert bytes(outcome.found.payload) != bytes(block.payload)
    exact = bring(tier, logits.key)
    assert not exact.is_lossy
    assert_same(exact.found, logits)
    ((key, divergence),) = tier.take_divergences()
    assert key == block.key
    assert 0 < divergence.relative_l2 < 0.02
    assert tier.take_divergences() == []
    tier.close()


def test_a_payload_that_int8_cannot_carry_is_counted_not_raised():
    tier = HostTier(FORMAT, ROOMY, codec=Int8Codec())
    stored = make_object()
    broken = replace(stored, payload=b"\x00\x00\xc0\x7f" + stored.payload[4:])  # a NaN
    assert offer(tier, broken)
    until(lambda: tier.stats().store_failures == 1)
    assert tier.lookup(stored.key) is Presence.NO
    assert "NaN" in tier.stats().last_fault
    tier.close()


def test_a_fetch_past_its_timeout_has_failed_even_if_nobody_answers():
    clock = ManualClock()
    tier = HostTier(FORMAT, ROOMY, codec=ZstdCodec(), clock=clock)
    stored = make_object()
    store(tier, stored)
    tier._workers.close()  # nobody works any more
    tier._workers.submit_read = lambda job: True  # type: ignore[method-assign]
    assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=2.0)
    assert tier.poll() == []
    clock.advance(2.0)
    (outcome,) = tier.poll()
    assert (outcome.failure, outcome.seconds) == (FetchFailure.TIMEOUT, 2.0)
    assert tier.stats().failures == {FetchFailure.TIMEOUT: 1}


@pytest.mark.parametrize("codec", [None, ZstdCodec()])
def test_speeds_are_measured(codec):
    tier = HostTier(replace(FORMAT, block_shape=(8, 2, 16, 8, 32)), 1 << 24, codec=codec)
    stored = make_object(list(range(16)), object_format=replace(FORMAT, block_shape=(8, 2, 16, 8, 32)))
    store(tier, stored)
    bring(tier, stored.key)
    stats = tier.stats()
    assert stats.read_bytes_per_s > 1e6
    assert stats.write_bytes_per_s > 1e6
    tier.close()
