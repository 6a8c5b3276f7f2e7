"""What tests of tiers share: objects of a small model, ways to wait, and a contract that every tier keeps.

``TierContract`` is a mixin: a test class says how its tier is made and inherits the stories.

::

    class TestHostTierKeepsTheContract(TierContract):
        def make_tier(self, **options): return HostTier(FORMAT, options.pop("max_bytes", ROOMY), **options)
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvcore.clock import ManualClock
from kvcore.keys import NamespaceKey, PrefixDigest, chain_digests, pack_tokens
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    FetchFailure,
    ObjectFormat,
    ObjectKey,
    ObjectKind,
    Presence,
    Tier,
)

FORMAT = ObjectFormat(fingerprint="model-a", dtype="float32", block_shape=(2, 2, 4, 2, 8), vocab_size=50)
"""Blocks of 4 positions, 1 KiB each; logits of 200 bytes."""

NAMESPACE = NamespaceKey("model-a", salt="tenant-1").seed()
OTHER_NAMESPACE = NamespaceKey("model-a", salt="tenant-2").seed()
ROOMY = 1 << 20
SOON_S = 20.0
"""Longer than anything here takes; a test that works never waits for it."""


def floats(num_bytes: int, seed: int, dtype: str = "float32") -> bytes:
    """Return a payload of finite numbers around zero, the same ones every time."""
    import numpy as np

    drawn = np.random.default_rng(seed).standard_normal(num_bytes // (4 if dtype == "float32" else 2))
    if dtype == "bfloat16":
        return (drawn.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return drawn.astype("<f4" if dtype == "float32" else "<f2").tobytes()


def make_object(
    tokens: Sequence[int] = (1, 2, 3, 4),
    *,
    parent: CacheObject | None = None,
    kind: ObjectKind = ObjectKind.BLOCK,
    namespace: PrefixDigest = NAMESPACE,
    object_format: ObjectFormat = FORMAT,
    expires_in_s: float | None = None,
) -> CacheObject:
    """Return the object that an engine would make of ``tokens`` after ``parent``."""
    before = namespace if parent is None else parent.key.digest
    digest = next(chain_digests(before, [tokens])) if tokens else before
    seed = int.from_bytes(hashlib.sha256(digest + kind.encode()).digest()[:4], "little")
    num_bytes = object_format.payload_bytes(kind)
    return CacheObject(
        key=ObjectKey(digest, kind),
        namespace=namespace,
        parent=before,
        depth=1 if parent is None else parent.depth + 1,
        tokens=pack_tokens(tokens).tobytes(),
        payload=floats(num_bytes, seed, "float32" if kind is ObjectKind.LOGITS else object_format.dtype),
        expires_in_s=expires_in_s,
    )


def make_chain(
    num_blocks: int,
    *,
    first: int = 0,
    namespace: PrefixDigest = NAMESPACE,
    object_format: ObjectFormat = FORMAT,
) -> list[CacheObject]:
    """Return the blocks of one prefix, from its start; prefixes with another ``first`` share none."""
    size = object_format.block_size
    chain: list[CacheObject] = []
    for number in range(num_blocks):
        tokens = [first, *range(number * size + 1, number * size + size)]
        parent = chain[-1] if chain else None
        chain.append(make_object(tokens, parent=parent, namespace=namespace, object_format=object_format))
    return chain


def until(condition: Callable[[], Any], what: str = "it", *, within_s: float = SOON_S) -> Any:
    """Return the condition's first true value, asking again and again; fail if it does not come."""
    give_up_at = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < give_up_at, f"{what} did not happen"
        time.sleep(0.001)


def store(tier: Tier, stored: CacheObject) -> None:
    """Store an object and wait until the tier shows it."""
    ticket = tier.prepare(stored.key, len(stored.payload))
    assert ticket is not None, f"{stored!r} was refused"
    tier.complete(ticket, stored)
    until(lambda: tier.lookup(stored.key) is Presence.YES, f"storing {stored!r}")


def offer(tier: Tier, stored: CacheObject) -> bool:
    """Hand an object over, if the tier takes it, without waiting."""
    ticket = tier.prepare(stored.key, len(stored.payload))
    if ticket is not None:
        tier.complete(ticket, stored)
    return ticket is not None


def poll_until(tier: Tier, num_fetched: int = 1) -> list[Fetched]:
    """Poll until so many outcomes have come."""
    outcomes: list[Fetched] = []

    def is_enough() -> bool:
        outcomes.extend(tier.poll())
        return len(outcomes) >= num_fetched

    until(is_enough, f"{num_fetched} outcomes")
    return outcomes


def bring(tier: Tier, key: ObjectKey, *, namespace: PrefixDigest = NAMESPACE) -> Fetched:
    """Fetch one object and return the outcome."""
    assert tier.fetch(key, namespace=namespace, timeout_s=SOON_S), f"{key!r} is not to be had"
    (outcome,) = poll_until(tier)
    return outcome


def assert_same(found: CacheObject | None, stored: CacheObject) -> None:
    """Compare all that an engine needs, the lifetime apart."""
    assert found is not None
    for name in ("key", "namespace", "parent", "depth"):
        assert getattr(found, name) == getattr(stored, name)
    assert bytes(found.tokens) == bytes(stored.tokens)
    assert bytes(found.payload) == bytes(stored.payload)


class TierContract:
    """Stories that are true of every tier. A subclass makes tiers; all are closed afterwards."""

    can_evict = True
    """False for a tier that leaves making room to somebody else."""

    def make_tier(
        self,
        *,
        max_bytes: int = ROOMY,
        clock: ManualClock | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> Tier:
        """Make a tier of ``FORMAT``, empty, lossless; on the given clock where there is one."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def tiers_are_closed(self) -> Iterator[None]:
        self._tiers: list[Tier] = []
        yield
        for tier in self._tiers:
            tier.close()

    def tier(self, **options: Any) -> Tier:
        tier = self.make_tier(**options)
        self._tiers.append(tier)
        return tier

    def test_what_was_stored_comes_back_byte_for_byte(self):
        tier = self.tier()
        chain = make_chain(3)
        for stored in chain:
            store(tier, stored)
        for stored in chain:
            outcome = bring(tier, stored.key)
            assert (outcome.key, outcome.failure, outcome.is_lossy) == (stored.key, None, False)
            assert outcome.tier == tier.name
            assert outcome.num_bytes > 0
            assert outcome.found.expires_in_s is None
            assert_same(outcome.found, stored)

    def test_partial_blocks_and_logits_travel_beside_the_block_of_the_same_tokens(self):
        tier = self.tier()
        block = make_object()
        partial = make_object([5, 6], parent=block, kind=ObjectKind.PARTIAL)
        logits = make_object([5, 6], parent=block, kind=ObjectKind.LOGITS)
        bare_logits = make_object([], parent=block, kind=ObjectKind.LOGITS)
        assert bare_logits.key.digest == block.key.digest
        everything = [block, partial, logits, bare_logits]
        for stored in everything:
            store(tier, stored)
        for stored in everything:
            assert_same(bring(tier, stored.key).found, stored)

    def test_a_removed_prefix_takes_along_what_continues_it_and_nothing_else(self):
        tier = self.tier()
        chain = make_chain(4)
        other = make_object([9, 9, 9, 9], parent=chain[0])
        for stored in [*chain, other]:
            store(tier, stored)
        assert tier.remove_prefixes([chain[1].key.digest]) == 3
        gone = [stored.key for stored in chain[1:]]
        assert until(lambda: all(tier.lookup(key) is Presence.NO for key in gone))
        assert tier.lookup(chain[0].key) is Presence.YES
        assert tier.lookup(other.key) is Presence.YES

    def test_a_removed_prefix_takes_along_what_is_still_being_written(self):
        tier = self.tier()
        chain = make_chain(3)
        store(tier, chain[0])
        for stored in chain[1:]:
            ticket = tier.prepare(stored.key, len(stored.payload))
            tier.complete(ticket, stored)
        tier.remove_prefixes([chain[0].key.digest])
        assert until(lambda: all(tier.lookup(stored.key) is Presence.NO for stored in chain))

    def test_presence_goes_from_no_over_coming_to_yes(self):
        tier = self.tier()
        stored = make_object()
        assert until(lambda: tier.lookup(stored.key) is not Presence.COMING)
        assert tier.lookup(stored.key) is Presence.NO
        ticket = tier.prepare(stored.key, len(stored.payload))
        assert tier.lookup(stored.key) is Presence.COMING
        tier.complete(ticket, stored)
        assert tier.lookup(stored.key) in {Presence.COMING, Presence.YES}
        until(lambda: tier.lookup(stored.key) is Presence.YES, "the store")

    def test_nothing_is_visible_before_it_is_complete(self):
        tier = self.tier()
        stored = make_object()
        ticket = tier.prepare(stored.key, len(stored.payload))
        assert not tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
        assert stored.key not in set(tier.keys())
        assert tier.poll() == []
        tier.abandon(ticket)

    def test_an_object_on_its_way_or_there_is_not_taken_twice(self):
        tier = self.tier()
        stored = make_object()
        ticket = tier.prepare(stored.key, len(stored.payload))
        assert tier.prepare(stored.key, len(stored.payload)) is None
        tier.complete(ticket, stored)
        until(lambda: tier.lookup(stored.key) is Presence.YES, "the store")
        assert tier.prepare(stored.key, len(stored.payload)) is None

    def test_an_abandoned_reservation_leaves_no_trace(self):
        tier = self.tier()
        stored = make_object()
        bytes_before = tier.stats().num_bytes
        tier.abandon(tier.prepare(stored.key, len(stored.payload)))
        assert tier.stats().num_bytes == bytes_before
        assert tier.lookup(stored.key) is not Presence.YES
        store(tier, stored)
        assert_same(bring(tier, stored.key).found, stored)

    def test_a_fetch_of_what_is_not_there_yields_nothing(self):
        tier = self.tier()
        missing = make_object()
        until(lambda: tier.lookup(missing.key) is Presence.NO)
        assert not tier.fetch(missing.key, namespace=NAMESPACE, timeout_s=SOON_S)
        assert tier.poll() == []

    def test_every_fetch_is_polled_exactly_once(self):
        tier = self.tier()
        chain = make_chain(8)
        for stored in chain:
            store(tier, stored)
        for stored in chain:
            assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
        outcomes = poll_until(tier, len(chain))
        assert sorted(outcome.key.digest for outcome in outcomes) == sorted(s.key.digest for s in chain)
        assert tier.poll() == []
        assert tier.stats().fetched == len(chain)

    def test_another_namespace_gets_nothing_of_it(self):
        tier = self.tier()
        stored = make_object()
        store(tier, stored)
        if tier.fetch(stored.key, namespace=OTHER_NAMESPACE, timeout_s=SOON_S):
            (outcome,) = poll_until(tier)
            assert outcome.found is None
            assert outcome.failure is FetchFailure.MISMATCH

    def test_the_engine_is_woken_when_an_outcome_is_there(self):
        woken = threading.Event()
        tier = self.tier(on_ready=woken.set)
        stored = make_object()
        store(tier, stored)
        woken.clear()
        assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
        assert woken.wait(SOON_S)
        assert len(tier.poll()) == 1

    def test_a_cancelled_fetch_still_ends_once(self):
        tier = self.tier()
        stored = make_object()
        store(tier, stored)
        assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
        tier.cancel([stored.key])
        (outcome,) = poll_until(tier)
        assert outcome.failure in {None, FetchFailure.CANCELLED}
        assert_same(bring(tier, stored.key).found, stored)  # nothing of the first is left over

    def test_a_fetch_without_any_time_ends_once_too(self):
        tier = self.tier()
        stored = make_object()
        store(tier, stored)
        assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=0.0)
        (outcome,) = poll_until(tier)
        assert outcome.failure in {None, FetchFailure.TIMEOUT}
        assert_same(bring(tier, stored.key).found, stored)

    def test_a_removed_object_is_gone_and_may_be_stored_again(self):
        tier = self.tier()
        stored = make_object()
        store(tier, stored)
        tier.remove([stored.key, make_object([9, 9, 9, 9]).key])
        until(lambda: tier.lookup(stored.key) is Presence.NO, "the removal")
        store(tier, stored)
        assert_same(bring(tier, stored.key).found, stored)

    def test_one_namespace_is_cleared_and_the_other_stays(self):
        tier = self.tier()
        mine = make_object()
        others = make_object(namespace=OTHER_NAMESPACE)
        store(tier, mine)
        store(tier, others)
        assert tier.clear(NAMESPACE) == 1
        until(lambda: tier.lookup(mine.key) is Presence.NO, "the removal")
        assert tier.lookup(others.key) is Presence.YES
        assert set(tier.keys()) == {others.key}
        assert tier.clear() == 1
        until(lambda: tier.lookup(others.key) is Presence.NO, "the removal")

    def test_what_a_tier_holds_never_exceeds_its_budget(self):
        if not self.can_evict:
            pytest.skip("room in this tier is made elsewhere")
        max_bytes = 20_000
        tier = self.tier(max_bytes=max_bytes)
        for first in range(12):
            for stored in make_chain(2, first=first):
                store(tier, stored)
                assert tier.stats().num_bytes <= max_bytes
        stats = tier.stats()
        assert stats.evicted > 0
        assert stats.num_objects == len(set(tier.keys())) == 24 - stats.evicted

    def test_the_rest_of_a_prefix_is_dropped_before_its_start(self):
        if not self.can_evict:
            pytest.skip("room in this tier is made elsewhere")
        tier = self.tier(max_bytes=20_000)
        old = make_chain(4, first=1)
        for stored in old:
            store(tier, stored)
        first = 2
        while tier.stats().evicted == 0:
            store(tier, make_chain(1, first=first)[0])
            first += 1
        kept = [tier.lookup(stored.key) is Presence.YES for stored in old]
        assert kept == [True, True, True, False]

    def test_a_lifetime_ends_and_is_handed_over_with_what_is_left_of_it(self):
        clock = ManualClock(1000.0)
        tier = self.tier(clock=clock)
        short = make_object([1, 1, 1, 1], expires_in_s=30.0)
        store(tier, short)
        clock.advance(10.0)
        outcome = bring(tier, short.key)
        assert_same(outcome.found, short)
        assert outcome.found.expires_in_s == pytest.approx(20.0, abs=1.0)
        clock.advance(21.0)
        assert tier.lookup(short.key) is Presence.NO
        assert not tier.fetch(short.key, namespace=NAMESPACE, timeout_s=SOON_S)

    def test_an_object_of_another_size_never_becomes_visible(self):
        tier = self.tier()
        stored = make_object()
        ticket = tier.prepare(stored.key, len(stored.payload))
        tier.complete(ticket, replace(stored, payload=stored.payload[:-4]))
        until(lambda: tier.lookup(stored.key) is Presence.NO, "giving up")
        assert tier.stats().store_failures == 1
        store(tier, stored)

    def test_closing_ends_the_threads_and_every_fetch(self):
        before = set(threading.enumerate())
        tier = self.tier()
        chain = make_chain(4)
        for stored in chain:
            store(tier, stored)
        for stored in chain:
            assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
        tier.close()
        assert len(tier.poll()) == len(chain)
        assert {thread for thread in set(threading.enumerate()) - before if thread.is_alive()} == set()
        assert tier.prepare(make_object([7, 7, 7, 7]).key, 1024) is None
        assert not tier.fetch(chain[0].key, namespace=NAMESPACE, timeout_s=SOON_S)
        tier.close()


def unpack(tokens: bytes) -> list[int]:
    """Return packed ids as numbers."""
    return list(array("i", tokens))
