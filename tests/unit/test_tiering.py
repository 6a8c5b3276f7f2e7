"""Blocks between the device and the tiers, step by step, on a worker whose "KV" proves what it was given."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvcore.clock import Clock
from kvcore.index import digest_of
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.node import NodeState
from kvcore.prefetch import SessionPredictor
from kvcore.tiers.host import HostTier
from kvcore.tiers.interface import Fetched, ObjectFormat, ObjectKey, ObjectKind, Presence, StoreTicket
from kvcore.tiers.stack import TierStack
from kvcore.tiers.worth import Worth
from server.engine.cache_ops.interface import OperationRefused
from server.engine.messages import Failed, Finished
from server.engine.options import TierOptions
from server.engine.tiering.offload import BUSY_ENTRIES_PER_STEP, PATIENCE_S
from server.engine.tiering.restorations import ASK_S, LOOKUPS_PER_STEP, MAX_ASK_HOLD_S
from server.engine.tiering.sessions import SessionPrefetch
from server.engine.tiering.snapshots import Snapshots, _Writer
from server.engine.tiering.tiering import Tiering
from server.engine.tiering.view import EngineTierView
from server.engine.tiering.wanted import block_object
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
    predictor = SessionPredictor(population_minimum=4.0, window_s=30.0, max_waste=0.4)
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


class LossyTier(LastingTier):
    """Says of all that it went through a lossy codec; gives the same bits, so that tokens are right."""

    @property
    def is_lossy(self) -> bool:
        return True

    def poll(self) -> list[Fetched]:
        return [replace(fetched, is_lossy=True) for fetched in super().poll()]


class StalledTier(LastingTier):
    """Takes whatever it is asked for, and never answers."""

    is_stalled = False

    def poll(self) -> list[Fetched]:
        return [] if self.is_stalled else super().poll()


class UnwillingTier(LastingTier):
    """Has no room, ever; counts who asks."""

    num_asked = 0

    def prepare(self, key: ObjectKey, num_bytes: int) -> StoreTicket | None:
        self.num_asked += 1
        return None


def pair_of(made: type[HostTier]) -> Tiers:
    return lambda object_format, clock: (
        made(object_format, MANY, clock=clock),
        made(object_format, MANY, clock=clock),
    )


def tiers_of(world: World) -> tuple[HostTier, HostTier]:
    assert world.tiering is not None
    blocks, tails = world.tiering.blocks.tiers[0], world.tiering.tails.tiers[0]
    assert isinstance(blocks, HostTier)
    assert isinstance(tails, HostTier)
    return blocks, tails


def test_what_came_back_lossy_never_goes_down_as_exact() -> None:
    first = make_world(pair_of(LossyTier))
    run(first, prompt(1))
    lossy_blocks, lossy_tails = tiers_of(first)
    exact: list[HostTier] = []

    def make(world: World) -> Tiering:
        object_format, worth = world.runner.object_format, Worth()

        def stack(below: HostTier) -> TierStack:
            exact.append(HostTier(object_format, MANY, clock=world.clock))
            return TierStack([exact[-1], below], object_format, worth=worth, clock=world.clock)

        return Tiering(
            world.scheduler.cache,
            blocks=stack(lossy_blocks),
            tails=stack(lossy_tails),
            object_format=object_format,
            worth=worth,
            clock=world.clock,
        )

    second = World(num_blocks=8, block_size=4, tiers=make)
    longer = [*prompt(1), 2, 1, 2, 0, 0, 1, 1]
    again = run(second, longer)
    assert again.usage.restored_tokens == 16
    restored = second.scheduler.cache.control.path_of(NamespaceKey(""), pack_tokens(longer))
    names = [ObjectKey(digest_of(node), ObjectKind.BLOCK) for node in restored]
    assert len(names) == 6
    assert all(node.is_lossy for node in restored), "what was computed from them, too"
    push_out(second)
    assert [exact[0].lookup(name) for name in names] == [Presence.NO] * 6
    assert [lossy_blocks.lookup(name) for name in names] == [Presence.YES] * 6
    assert exact[0].stats().num_objects > 0, "the others are exact"
    ends = {bytes(name.digest) for name in names}
    for tails in (exact[1], lossy_tails):
        assert not [key for key in list(tails.keys()) if key.kind is ObjectKind.LOGITS and key.digest in ends]
    new_tails = [key for key in list(lossy_tails.keys()) if key.kind is ObjectKind.LOGITS]
    assert len(new_tails) == 1 + 2, "that of the first server, and those of what pushed it out"


def test_a_tier_that_never_answers_delays_nobody_for_longer_than_computing_takes() -> None:
    worth = Worth()
    world = make_world(pair_of(StalledTier), worth=worth)
    run(world, prompt(1))
    push_out(world)
    for _ in range(50):
        worth.observe_recompute(16, 0, 0.4)
        worth.observe_fetch("disk", 512, 0.001)
    for tier in tiers_of(world):
        assert isinstance(tier, StalledTier)
        tier.is_stalled = True
    began = world.clock.now()
    again = run(world, prompt(1))
    assert again.usage.restored_tokens == 0
    assert again.timings.restore is not None
    assert again.timings.restore.decision == "fetch"
    assert world.clock.now() - began < 0.4 + MAX_ASK_HOLD_S + 0.05
    assert world.tiering is not None
    assert not world.tiering.restorations.is_busy


def test_even_an_endless_batch_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    worth = Worth()
    world = make_world(pair_of(StalledTier), worth=worth)
    run(world, prompt(1))
    push_out(world)
    for _ in range(50):
        worth.observe_recompute(16, 0, 0.4)
    for tier in tiers_of(world):
        assert isinstance(tier, StalledTier)
        tier.is_stalled = True
    assert world.tiering is not None
    fetch = world.tiering.blocks.fetch
    monkeypatch.setattr(world.tiering.blocks, "fetch", lambda *a, **k: fetch(*a, **{**k, "timeout_s": 1e9}))
    began = world.clock.now()
    run(world, prompt(1))
    assert world.clock.now() - began < 0.4 + MAX_ASK_HOLD_S + 0.05


def test_what_was_removed_while_it_was_coming_up_stays_away() -> None:
    for remove in ("all", "namespace", "digests"):
        world = make_world(host)
        run(world, prompt(1))
        push_out(world)
        tiering = world.tiering
        assert tiering is not None
        world.submit(prompt(1), 2)
        assert not tiering.restorations.advance(is_computing=False), "asked for, and not taken yet"
        assert not tiering.blocks.is_idle
        view = EngineTierView(
            tiering, Snapshots(None, tiering.cache, tiering, object_format=world.runner.object_format),
            options=TierOptions(host_bytes=MANY), object_format=world.runner.object_format,
        )  # fmt: skip
        seed = NamespaceKey("").seed()
        (waiting,) = tiering.restorations._active
        if remove == "all":
            view.remove()
        elif remove == "namespace":
            view.remove(namespace=seed)
        else:
            view.remove(digests=[waiting.digests[1]])
        world.finish()
        assert world.scheduler.counters.restored_tokens == 0, remove
        tiering.advance(is_computing=False)
        assert tiering.blocks.is_idle


def test_what_a_failed_request_entered_is_taken_back_from_tiers() -> None:
    failing: list[bool] = []

    def make(world: World) -> Tiering:
        blocks, tails = lasting(world.runner.object_format, world.clock)
        object_format, worth = world.runner.object_format, Worth()
        return Tiering(
            world.scheduler.cache,
            blocks=TierStack([blocks], object_format, worth=worth, clock=world.clock),
            tails=TierStack([tails], object_format, worth=worth, clock=world.clock),
            object_format=object_format,
            worth=worth,
            clock=world.clock,
        )

    world = World(num_blocks=32, block_size=4, tiers=make, fails=lambda part: bool(failing))
    run(world, prompt(2))
    before = tiers_of(world)[0].stats().num_objects
    key = world.submit(prompt(1, 41), 20)
    while not world.told[key].tokens[0]:
        world.step()
    for _ in range(4):
        world.step()
    assert tiers_of(world)[0].stats().num_objects > before + 8, "written behind while it runs"
    failing.append(True)
    world.finish()
    assert isinstance(world.told[key].terminal, Failed)
    assert tiers_of(world)[0].stats().num_objects == before
    failing.clear()
    assert run(world, prompt(1, 41)).usage.restored_tokens == 0


def test_a_lifetime_runs_on_while_an_object_is_on_its_way() -> None:
    world = make_world(pair_of(StalledTier), mode="always")
    born = world.clock.now()
    run(world, prompt(1), lifetime_s=10.0)
    push_out(world)
    world.clock.advance(6.0)
    world.submit(prompt(1), 2)
    for tier in tiers_of(world):
        assert isinstance(tier, StalledTier)
        tier.is_stalled = True
    world.step()
    world.clock.advance(3.0)
    for tier in tiers_of(world):
        assert isinstance(tier, StalledTier)
        tier.is_stalled = False
    world.finish()
    assert world.scheduler.counters.restored_tokens == 16
    restored = world.scheduler.cache.control.path_of(NamespaceKey(""), pack_tokens(prompt(1)))
    lives = [node.expires_at for node in restored[:4]]
    assert all(end is not None and end <= born + 10.1 for end in lives), lives


def test_write_behind_that_nobody_takes_costs_a_bounded_part_of_a_step() -> None:
    world = make_world(pair_of(UnwillingTier), num_blocks=2000)
    assert world.tiering is not None
    offloader = world.tiering.offloader
    run(world, prompt(1))
    nodes = [node for node in world.scheduler.cache.tree.iterate() if node.state is NodeState.READY]
    for _ in range(2000):
        offloader.stored(nodes)
    blocks, _ = tiers_of(world)
    assert isinstance(blocks, UnwillingTier)
    world.clock.advance(PATIENCE_S)
    offloader.collect(is_computing=True)
    world.clock.advance(PATIENCE_S)
    blocks.num_asked = 0
    offloader.collect(is_computing=True)
    assert 0 < blocks.num_asked <= BUSY_ENTRIES_PER_STEP
    for _ in range(200):
        world.clock.advance(0.01)
        offloader.collect(is_computing=False)
    assert not offloader.has_work, "given up in the end"


def test_looking_into_tiers_costs_a_bounded_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(lasting, num_blocks=2000)
    long = [random.Random(0).randrange(3) for _ in range(1)] + [1, 2, 0] * 900
    run(world, long)
    second = make_world(tiers_of(world), num_blocks=2000)
    looked: list[int] = []
    blocks, _ = tiers_of(second)
    lookup = blocks.lookup

    def count(key: ObjectKey) -> Presence:
        looked.append(1)
        return lookup(key)

    monkeypatch.setattr(blocks, "lookup", count)
    for number in range(40):
        second.submit([*long, number % 3, number // 3 % 3, number // 9 % 3], 1)
    most = 0
    while second.scheduler.has_work:
        looked.clear()
        plan = second.scheduler.plan()
        most = max(most, len(looked))
        if plan is not None:
            second.scheduler.apply(plan, second.runner.run(plan))
        second.hear()
        second.clock.advance(0.001)
    assert second.scheduler.counters.restored_tokens > 2000
    # Two budgets of lookups, what fetches ask again, and what is written behind.
    assert most < 2 * LOOKUPS_PER_STEP + 2 * 64 + 3 * 64


def test_waiting_prompts_are_not_copied_for_tiers() -> None:
    world = make_world(host)
    key = world.submit(prompt(1), 2)
    (sequence,) = world.scheduler._book.requests[key].sequences
    assert sequence.restoration is not None
    assert sequence.restoration.tokens is sequence.tokens


def test_who_left_before_anybody_looked_is_forgotten_at_once() -> None:
    world = make_world(host)
    keys = [world.submit(prompt(1), 2) for _ in range(100)]
    for key in keys:
        world.cancel(key)
    assert world.tiering is not None
    assert not world.tiering.restorations.is_busy


def test_a_snapshot_whose_disk_is_stuck_does_not_stop_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()

    def stuck(*_: object, **__: object) -> None:
        assert may_go_on.wait(60)

    monkeypatch.setattr("server.engine.tiering.snapshots.write_snapshot", stuck)
    world = make_world(host, num_blocks=64)
    run(world, prompt(1, 200))
    assert world.tiering is not None
    snapshots = Snapshots(
        tmp_path, world.scheduler.cache, world.tiering, object_format=world.runner.object_format
    )
    work = snapshots.save("monday", namespace=None, replace=False)
    try:
        for _ in range(20):
            next(work)
            world.step()
        began = time.monotonic()
        work.close()
        assert time.monotonic() - began < 5, "the thread is left behind"
        with pytest.raises(OperationRefused, match="still being ended"):
            snapshots.save("monday", namespace=None, replace=False)
    finally:
        may_go_on.set()


def test_a_snapshot_whose_thread_breaks_ends_with_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("server.engine.tiering.snapshots.write_snapshot", broken)
    world = make_world(host, num_blocks=64)
    run(world, prompt(1, 200))
    assert world.tiering is not None
    snapshots = Snapshots(
        tmp_path, world.scheduler.cache, world.tiering, object_format=world.runner.object_format
    )
    work = snapshots.save("monday", namespace=None, replace=False)

    def go_on() -> None:
        for _ in range(1000):
            next(work)
            world.step()

    with pytest.raises(OperationRefused):
        go_on()


def test_the_end_of_a_snapshot_is_said_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    monkeypatch.setattr("server.engine.tiering.snapshots.write_snapshot", lambda *_, **__: may_go_on.wait(60))
    world = make_world(host)
    run(world, prompt(1))
    assert world.tiering is not None
    node = next(n for n in world.scheduler.cache.tree.iterate() if n.state is NodeState.READY)
    stored = block_object(node).with_payload(bytes(world.runner.object_format.bytes_per_block), 0.0)
    writer = _Writer(tmp_path / "x", world.runner.object_format, 1, 0.0)
    try:
        while writer.has_room:
            writer.put(stored)
        assert not writer.finish(), "and the engine goes on meanwhile"
    finally:
        may_go_on.set()
        writer.stop()


def test_a_new_lifetime_is_written_to_the_copies_too() -> None:
    world = make_world(lasting)
    run(world, prompt(1))
    tiering = world.tiering
    assert tiering is not None
    tier = tiering.blocks.tiers[0]
    nodes = [node for node in world.scheduler.cache.tree.iterate() if node.state is NodeState.READY]
    before = tier.stats().num_objects
    assert before == len(nodes) == 4
    for node in nodes:
        node.limit_life(world.clock.now() + 5.0)
    view = EngineTierView(
        tiering,
        Snapshots(None, world.scheduler.cache, tiering, object_format=world.runner.object_format),
        options=TierOptions(),
        object_format=world.runner.object_format,
    )
    view.renew(nodes)
    assert tier.stats().num_objects == 0
    world.finish()
    assert tier.stats().num_objects == before
    world.clock.advance(6.0)
    assert tier.stats().num_objects == 0
