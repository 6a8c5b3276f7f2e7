"""Random traffic over a device that is far too small, with tiers below it: every token is checked.

The worker's "KV" is a hash of everything before it (``tests.chain_runner``), so a block that comes back under
a wrong name, too early, half, or from before it was written gives a wrong token.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest

from kvcore.keys import NamespaceKey, PrefixDigest
from kvcore.policies import POLICIES
from kvcore.tiers.host import HostTier
from kvcore.tiers.interface import (
    CacheObject,
    Fetched,
    FetchFailure,
    MeasuredDivergence,
    ObjectKey,
    Presence,
    StoreTicket,
    TierStats,
)
from kvcore.tiers.stack import TierStack
from kvcore.tiers.worth import Worth
from server.engine.admin_messages import (
    AdminCall,
    AdminOp,
    AdminReply,
    ClearCache,
    EvictPrefixes,
    PinPrefix,
    PinType,
    PrefixRef,
    ReleasePrefix,
    SetLifetime,
    SetPolicy,
    UnpinPrefix,
)
from server.engine.cache_desk import CacheDesk
from server.engine.options import TierOptions
from server.engine.tiering.snapshots import Snapshots
from server.engine.tiering.tiering import Tiering
from server.engine.tiering.view import EngineTierView
from tests.property.engine_world import VOCABULARY, World


class CapriciousTier:
    """A host tier that takes its time, asks back, fails and forgets, as a disk or a network may."""

    def __init__(self, inner: HostTier, seed: int, *, name: str, is_persistent: bool) -> None:
        self.inner = inner
        self.name = name
        self.is_persistent = is_persistent
        self.dice = random.Random(seed)
        self.pending: deque[tuple[int, Fetched]] = deque()
        self.num_polls = 0

    @property
    def is_lossy(self) -> bool:
        return self.inner.is_lossy

    def lookup(self, key: ObjectKey) -> Presence:
        if self.dice.random() < 0.1:
            return Presence.COMING
        return self.inner.lookup(key)

    def prepare(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        return None if self.dice.random() < 0.1 else self.inner.prepare(key, num_bytes)

    def complete(self, ticket: StoreTicket, stored: CacheObject) -> None:
        self.inner.complete(ticket, stored)

    def abandon(self, ticket: StoreTicket) -> None:
        self.inner.abandon(ticket)

    def fetch(self, key: ObjectKey, *, namespace: PrefixDigest, timeout_s: float) -> bool:
        return self.dice.random() > 0.05 and self.inner.fetch(key, namespace=namespace, timeout_s=timeout_s)

    def cancel(self, keys: Iterable[ObjectKey]) -> None:
        self.inner.cancel(keys)

    def poll(self) -> list[Fetched]:
        self.num_polls += 1
        for fetched in self.inner.poll():
            if self.dice.random() < 0.1:
                fetched = replace(fetched, found=None, failure=FetchFailure.CORRUPT)
            self.pending.append((self.num_polls + self.dice.randrange(5), replace(fetched, tier=self.name)))
        ready = [fetched for due, fetched in self.pending if due <= self.num_polls]
        self.pending = deque(entry for entry in self.pending if entry[0] > self.num_polls)
        return ready

    def remove(self, keys: Iterable[ObjectKey]) -> None:
        self.inner.remove(keys)

    def remove_prefixes(self, digests: Iterable[PrefixDigest]) -> int:
        return self.inner.remove_prefixes(digests)

    def take_divergences(self) -> Sequence[tuple[ObjectKey, MeasuredDivergence]]:
        return self.inner.take_divergences()

    def clear(self, namespace: PrefixDigest | None = None) -> int:
        return self.inner.clear(namespace)

    def keys(self) -> Iterable[ObjectKey]:
        return self.inner.keys()

    def stats(self) -> TierStats:
        return self.inner.stats()

    def close(self) -> None:
        self.inner.close()


def make_tiers(
    seed: int, *, tier_blocks: int = 200, mode: str = "always", is_capricious: bool = True
) -> Callable[[World], Tiering]:
    """Return what gives a world a host tier and a persistent one."""

    def make(world: World) -> Tiering:
        object_format = world.runner.object_format
        worth = Worth()

        def stack(number: int) -> TierStack:
            def tier(name: str, blocks: int, *, is_persistent: bool) -> CapriciousTier | HostTier:
                host = HostTier(object_format, blocks * 1000, clock=world.clock)
                if not is_capricious and not is_persistent:
                    return host
                return CapriciousTier(
                    host, seed + number + is_persistent, name=name, is_persistent=is_persistent
                )

            tiers = [
                tier("host", tier_blocks // 4, is_persistent=False),
                tier("disk", tier_blocks, is_persistent=True),
            ]
            return TierStack(tiers, object_format, worth=worth, clock=world.clock)

        return Tiering(
            world.scheduler.cache,
            blocks=stack(0),
            tails=stack(2),
            object_format=object_format,
            worth=worth,
            clock=world.clock,
            mode=mode,
        )

    return make


def random_prompt(dice: random.Random) -> list[int]:
    """Return a prompt of one of a few families, so that prefixes of every length are shared."""
    family = random.Random(dice.randrange(6))
    base = [family.randrange(VOCABULARY) for _ in range(60)]
    length = dice.randrange(1, 50)
    return base[:length] + [dice.randrange(VOCABULARY) for _ in range(dice.choice([0, 0, 1, 3, 9]))]


class Operator:
    """Pins, evicts, shortens lives, changes policies and quotas, in the middle of everything."""

    def __init__(self, world: World, seed: int) -> None:
        tiering, object_format = world.tiering, world.runner.object_format
        assert tiering is not None
        self.world = world
        self.dice = random.Random(seed)
        self.num_calls = 0
        self.replies: list[str] = []
        cache = world.scheduler.cache
        snapshots = Snapshots(None, cache, tiering, object_format=object_format)
        self.desk = CacheDesk(
            cache,
            clock=world.clock,
            fingerprint="",
            epoch=1,
            largest_need=world.scheduler.largest_need,
            tiers=EngineTierView(
                tiering, snapshots, options=TierOptions(host_bytes=1), object_format=object_format
            ),
            trial=world.scheduler.trial,
        )
        tiering.notes = self.desk.events
        self.desk.watch(True)

    def act(self) -> None:
        """Do something between two steps, and a piece of whatever is still going on."""
        if self.dice.random() < 0.15:
            self.num_calls += 1
            self.desk.handle(AdminCall(self.num_calls, self.choose()))
        if self.dice.random() < 0.05:
            share = self.dice.choice([None, 0.2, 0.5])
            salt = self.dice.choice(["", "other"])
            self.world.scheduler.cache.control.set_quota(NamespaceKey("", salt=salt), share)
        self.desk.advance()
        for said in self.desk.drain():
            if isinstance(said, AdminReply):
                self.replies.append(type(said.result).__name__)

    def choose(self) -> AdminOp:
        dice = self.dice
        tokens = random_prompt(dice)
        ref = PrefixRef(token_ids=tokens[: len(tokens) // 4 * 4] or tokens, salt=dice.choice(["", "other"]))
        choices: list[AdminOp] = [
            PinPrefix(ref, dice.choice(list(PinType)), lifetime_s=dice.choice([0.02, 0.3])),
            UnpinPrefix(ref),
            SetLifetime(ref, dice.choice([None, 0.0, 0.03, 1.0])),
            ReleasePrefix(ref),
            EvictPrefixes(subtree=ref, skip_in_use=dice.random() < 0.5, tiers=dice.random() < 0.7),
            EvictPrefixes(min_idle_s=0.02, skip_in_use=True, tiers=dice.random() < 0.5),
            ClearCache(skip_in_use=True, tiers=dice.random() < 0.5),
            SetPolicy(policy=dice.choice(list(POLICIES))),
            SetPolicy(canary=(dice.choice(list(POLICIES)), dice.choice([0.0, 0.5]))),
        ]
        return dice.choice(choices)

    def leave(self) -> None:
        """Finish what is going on; no pin stays."""
        while self.desk.is_busy:
            self.desk.advance()
        self.world.clock.advance(1.0)
        for _ in range(10):
            self.world.scheduler.cache.sweep_expired()
        assert not len(self.world.scheduler.cache.pins)


def run_campaign(
    world: World, seed: int, *, num_requests: int, num_slots: int = 4, operator: Operator | None = None
) -> None:
    dice = random.Random(seed)
    waiting = num_requests
    for _ in range(20_000):
        if not waiting and not world.scheduler.has_work:
            break
        if operator is not None:
            operator.act()
        if waiting and dice.random() < 0.4:
            waiting -= 1
            world.submit(
                random_prompt(dice),
                dice.randrange(1, 9),
                num_samples=dice.choice([1, 1, 1, 2]),
                salt=dice.choice(["", "", "other"]),
                read_prefix=dice.random() < 0.9,
                write_prefix=dice.random() < 0.9,
                lifetime_s=dice.choice([None, None, 0.05]),
                use_kv_cache=dice.random() < 0.95,
                priority=dice.choice([0, 0, 0, 1]),
                deadline_s=dice.choice([None, None, None, 0.1]),
            )
        if dice.random() < 0.05 and world.told:
            world.cancel(dice.choice(list(world.told)))
        world.step(crash=dice.random() < 0.02)
        world.clock.advance(0.002)
    world.finish()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("mode", ["always", "auto"])
def test_every_token_is_right_whatever_the_tiers_do(seed: int, mode: str) -> None:
    world = World(num_blocks=24, block_size=4, tiers=make_tiers(seed, mode=mode))
    run_campaign(world, seed, num_requests=120)
    world.check_end()
    assert world.tiering is not None
    world.tiering.blocks.check_integrity()
    world.tiering.close()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", ["always", "auto"])
def test_every_token_is_right_while_an_operator_is_at_work(seed: int, mode: str) -> None:
    trouble = random.Random(seed + 1000)
    world = World(
        num_blocks=24,
        block_size=4,
        num_logits_slots=4,
        tiers=make_tiers(seed, mode=mode),
        fails=lambda part: trouble.random() < 0.005,
        min_cached_tokens=2,
    )
    operator = Operator(world, seed)
    run_campaign(world, seed + 50, num_requests=120, operator=operator)
    operator.leave()
    world.finish()
    world.check_end()
    tiering = world.tiering
    assert tiering is not None
    for restorations in (tiering.restorations, tiering.for_sessions):
        assert restorations._num_ahead >= 0
    assert not tiering.restorations.is_busy
    assert len(set(operator.replies)) > 3, operator.replies
    for stack in (tiering.blocks, tiering.tails):
        stack.check_integrity()
        for tier in stack.tiers:
            assert isinstance(tier, CapriciousTier)
            tier.inner.check_integrity()
            assert not tier.inner._reserved, "neither completed nor abandoned"
    tiering.close()
    assert tiering.blocks.reserved_bytes == tiering.tails.reserved_bytes == 0


def test_tiers_bring_back_what_the_device_could_not_keep() -> None:
    world = World(num_blocks=24, block_size=4, tiers=make_tiers(1, is_capricious=False))
    run_campaign(world, 7, num_requests=200)
    world.check_end()
    with_tiers = world.runner.num_tokens_computed
    assert world.scheduler.counters.restored_tokens > 500

    without = World(num_blocks=24, block_size=4)
    run_campaign(without, 7, num_requests=200)
    assert with_tiers < without.runner.num_tokens_computed
