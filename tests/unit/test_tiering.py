"""Blocks between the device and the tiers, step by step, on a worker whose "KV" proves what it was given."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvcore.clock import Clock
from kvcore.prefetch import SessionPredictor
from kvcore.tiers.host import HostTier
from kvcore.tiers.interface import ObjectFormat, ObjectKey, Presence
from kvcore.tiers.stack import TierStack
from kvcore.tiers.worth import Worth
from server.engine.messages import Finished
from server.engine.tiering.restorations import ASK_S
from server.engine.tiering.sessions import SessionPrefetch
from server.engine.tiering.tiering import Tiering
from tests.property.engine_world import World

MANY = 1 << 20


class LastingTier(HostTier):
    """A host tier that counts as one that outlives the process: worlds may come and go around it."""

    name = "disk"
    is_persistent = True


class UndecidedTier(LastingTier):
    """Always about to know."""

    def lookup(self, key: ObjectKey) -> Presence:
        return Presence.COMING


Tiers = Callable[[ObjectFormat, Clock], tuple[HostTier, HostTier]]


def host(object_format: ObjectFormat, clock: Clock) -> tuple[HostTier, HostTier]:
    return HostTier(object_format, MANY, clock=clock), HostTier(object_format, MANY, clock=clock)


def lasting(object_format: ObjectFormat, clock: Clock) -> tuple[HostTier, HostTier]:
    return LastingTier(object_format, MANY, clock=clock), LastingTier(object_format, MANY, clock=clock)


def undecided(object_format: ObjectFormat, clock: Clock) -> tuple[HostTier, HostTier]:
    return UndecidedTier(object_format, MANY, clock=clock), UndecidedTier(object_format, MANY, clock=clock)


def make_world(
    tiers: Tiers | tuple[HostTier, HostTier],
    *,
    worth: Worth | None = None,
    mode: str = "auto",
    num_blocks: int = 8,
) -> World:
    """Return a world of a few blocks of four tokens above the tiers."""
    known = worth or Worth()

    def make(world: World) -> Tiering:
        object_format = world.runner.object_format
        pair = tiers if isinstance(tiers, tuple) else tiers(object_format, world.clock)
        blocks, tails = (TierStack([tier], object_format, worth=known, clock=world.clock) for tier in pair)
        return Tiering(
            world.scheduler.cache,
            blocks=blocks,
            tails=tails,
            object_format=object_format,
            worth=known,
            clock=world.clock,
            mode=mode,
        )

    return World(num_blocks=num_blocks, block_size=4, tiers=make)


def prompt(family: int, length: int = 17) -> list[int]:
    """Return the prompt of a family: no two share a token at the start."""
    return [(family + position * (family + 1)) % 3 if position else family for position in range(length)]


def run(world: World, tokens: list[int], **fields: object) -> Finished:
    """Run one request to its end; every token is checked on the way."""
    key = world.submit(tokens, 2, **fields)
    world.finish()
    ended = world.told[key].terminal
    assert isinstance(ended, Finished)
    return ended


def push_out(world: World) -> None:
    """Fill the device with other things."""
    for family in (3, 4):
        run(world, prompt(family, 21))


@pytest.fixture(params=[host, lasting])
def tiers(request: pytest.FixtureRequest) -> Tiers:
    found: Tiers = request.param
    return found


def test_what_was_pushed_out_comes_back(tiers: Tiers) -> None:
    world = make_world(tiers)
    run(world, prompt(1))
    push_out(world)
    before = world.runner.num_tokens_computed
    again = run(world, prompt(1))
    assert again.usage.restored_tokens == 16
    assert world.runner.num_tokens_computed - before == 1, "only the token that was drawn"
    restore = again.timings.restore
    assert restore is not None
    assert (restore.decision, restore.found_tokens, restore.restored_tokens) == ("fetch", 17, 16)


def test_an_exact_prompt_needs_no_forward_pass_after_a_restart() -> None:
    first = make_world(lasting)
    run(first, prompt(1))
    assert first.tiering is not None
    pair = (first.tiering.blocks.tiers[0], first.tiering.tails.tiers[0])
    assert isinstance(pair[0], HostTier)
    assert isinstance(pair[1], HostTier)

    second = make_world((pair[0], pair[1]))
    again = run(second, prompt(1))
    assert again.usage.computed_prompt_tokens == 0
    assert (again.usage.restored_tokens, again.usage.cached_tail_tokens) == (16, 1)


def test_another_end_shares_what_is_common() -> None:
    first = make_world(lasting)
    run(first, prompt(1))
    assert first.tiering is not None
    pair = (first.tiering.blocks.tiers[0], first.tiering.tails.tiers[0])

    second = make_world(pair)  # type: ignore[arg-type]
    other = run(second, [*prompt(1)[:10], 2, 2, 2, 2])
    assert other.usage.restored_tokens == 8


def test_another_tenant_finds_nothing() -> None:
    world = make_world(lasting)
    run(world, prompt(1), salt="one")
    other = run(world, prompt(1), salt="another")
    assert other.usage.restored_tokens == 0
    assert other.timings.restore is None


def test_private_requests_leave_nothing_below() -> None:
    world = make_world(lasting)
    run(world, prompt(1), write_prefix=False)
    push_out(world)
    assert run(world, prompt(1)).usage.restored_tokens == 0


def test_a_request_that_reads_nothing_restores_nothing() -> None:
    world = make_world(host)
    run(world, prompt(1))
    push_out(world)
    assert run(world, prompt(1), read_prefix=False).usage.restored_tokens == 0


def test_a_failed_step_takes_what_it_was_to_load_out_again() -> None:
    world = make_world(host)
    run(world, prompt(1))
    push_out(world)
    world.submit(prompt(1), 2)
    while (plan := world.step(crash=True)) is None:
        pass
    assert plan.loads
    world.finish()
    again = run(world, prompt(1))
    assert again.usage.restored_tokens == 16, "from the tier, once more"


def test_a_failed_step_hands_nothing_down() -> None:
    world = make_world(host)
    run(world, prompt(1))
    assert world.tiering is not None
    world.submit(prompt(3, 30), 2)
    while True:
        plan = world.step(crash=True)
        if plan is not None and plan.saves:
            break
        world.finish()
        world.submit(prompt(3, 30), 2)
    assert world.tiering.blocks.tiers[0].stats().num_objects == 0


def test_nothing_is_fetched_where_computing_is_faster() -> None:
    worth = Worth()
    world = make_world(host, worth=worth)
    run(world, prompt(1))
    push_out(world)
    for _ in range(50):  # what it came to
        worth.observe_recompute(16, 0, 0.0001)
        worth.observe_fetch("host", 128, 5.0)
    again = run(world, prompt(1))
    assert again.usage.restored_tokens == 0
    restore = again.timings.restore
    assert restore is not None
    assert (restore.decision, restore.found_tokens) == ("recompute", 17)
    assert restore.expected_recompute_s < restore.expected_fetch_s


def test_never_means_never() -> None:
    world = make_world(host, mode="never")
    run(world, prompt(1))
    push_out(world)
    assert run(world, prompt(1)).usage.restored_tokens == 0


def test_a_tier_that_cannot_say_costs_a_moment() -> None:
    world = make_world(undecided)
    began = world.clock.now()
    run(world, prompt(1))
    assert world.clock.now() - began < ASK_S + 0.05


def test_what_is_written_behind_leaves_no_work_undone() -> None:
    world = make_world(lasting)
    run(world, prompt(1))
    assert world.tiering is not None
    assert not world.scheduler.has_work
    # Four full blocks, the end of the prompt and its last logits.
    assert world.tiering.blocks.tiers[0].stats().num_objects == 4
    assert world.tiering.tails.tiers[0].stats().num_objects == 2


def test_lifetimes_go_down_and_come_up_with_their_blocks() -> None:
    world = make_world(lasting)
    run(world, prompt(1), lifetime_s=10.0)
    push_out(world)
    world.clock.advance(8.0)
    again = run(world, prompt(1))
    assert again.usage.restored_tokens == 16
    world.clock.advance(3.0)
    assert run(world, prompt(1)).usage.restored_tokens == 0


def test_a_request_that_leaves_while_its_blocks_come_holds_nothing() -> None:
    world = make_world(host)
    run(world, prompt(1))
    push_out(world)
    key = world.submit(prompt(1), 2)
    assert world.tiering is not None
    world.tiering.restorations.advance(is_computing=False)
    world.cancel(key)
    world.finish()
    assert world.scheduler.idle_wait_s is not None, "somebody has to hear the last of it"
    world.tiering.advance(is_computing=False)
    assert world.tiering.blocks.is_idle
    assert not world.tiering.restorations.is_busy


def test_a_session_is_back_before_it_returns() -> None:
    world = make_world(lasting, num_blocks=64)
    tiering = world.tiering
    assert tiering is not None
    predictor = SessionPredictor(population_minimum=4.0, window_s=30.0)
    tiering.sessions = SessionPrefetch(world.scheduler.cache, tiering.for_sessions, predictor)
    talk = prompt(1, 17)
    others = random.Random(1)
    in_time = 0
    for _ in range(8):
        usage = run(world, talk).usage
        in_time += usage.cached_block_tokens >= 16 and usage.restored_tokens == 0
        talk = [*talk, 1, 2]
        for wait in range(48):  # twelve seconds of thinking, in which others use the device
            world.clock.advance(0.25)
            world.step()
            if wait == 24:
                for _ in range(9):
                    run(world, [others.randrange(3) for _ in range(40)])
    assert in_time > 0
    assert tiering.for_sessions.counters.used_blocks > 0
    assert predictor.counters.in_time > 0
