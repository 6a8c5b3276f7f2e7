"""Who is suspected of having killed a process, who waits, who is refused. The process is a dictionary."""

from __future__ import annotations

import hmac
import random

import pytest

from kvcore.clock import ManualClock
from server.process import quarantine as module
from server.process.quarantine import Quarantine, QuarantineCounts, Witness

KEEP_S = 600.0


class World:
    """A quarantine, and the process behind it: the tickets that it holds, by what they ask for."""

    def __init__(self, *, max_held: int = 100, keep_s: float = KEEP_S) -> None:
        self.clock = ManualClock()
        self.inside: dict[int, str] = {}
        self.left_s: dict[int, float | None] = {}
        self.refused: list[str] = []
        self.num_encoded = 0
        self.num_tickets = 0
        self.quarantine: Quarantine[str] = Quarantine(
            "test",
            encode=self._encode,
            send=self._send,
            refuse=lambda _, request: self.refused.append(request),
            keep_s=keep_s,
            max_held=max_held,
            now=self.clock.now,
            key=b"key",
        )

    def _encode(self, request: str) -> bytes:
        self.num_encoded += 1
        return request.encode()

    def _send(self, ticket: int, request: str, left_s: float | None) -> None:
        self.inside[ticket] = request
        self.left_s[ticket] = left_s

    def submit(self, request: str, deadline_s: float | None = None) -> int:
        """As a front end does it."""
        self.num_tickets += 1
        ticket = self.num_tickets
        if self.quarantine.is_active:
            self.quarantine.submit(ticket, request, deadline_s)
        else:
            self._send(ticket, request, deadline_s)
        self.quarantine.check_integrity()
        return ticket

    def answer(self, ticket: int) -> None:
        del self.inside[ticket]
        if self.quarantine.is_active:
            self.quarantine.acquit(ticket)
        self.quarantine.check_integrity()

    def leave(self, ticket: int, request: str) -> None:
        self.quarantine.leave(ticket, request)
        self.quarantine.check_integrity()

    def die(self, *, progress: int = 0) -> None:
        inside, self.inside = self.inside, {}
        self.quarantine.died(Witness(ticket, request, progress) for ticket, request in inside.items())
        self.quarantine.judge()
        self.quarantine.check_integrity()

    def is_inside(self, ticket: int) -> bool:
        return ticket in self.inside


@pytest.fixture
def world() -> World:
    return World()


def test_while_nobody_is_suspected_only_what_is_left_is_digested(world: World) -> None:
    tickets = [world.submit(str(k)) for k in range(100)]
    for ticket in tickets:
        world.answer(ticket)
    assert (world.num_encoded, world.quarantine.is_active) == (0, False)
    world.leave(world.submit("left"), "left")
    world.quarantine.turn_began(10.0)
    assert (world.num_encoded, world.quarantine.is_active) == (1, False)
    assert world.quarantine.counts == QuarantineCounts()


def test_a_request_that_kills_twice_is_refused_the_third_time_and_others_are_not(world: World) -> None:
    world.submit("killer")
    world.die()
    on_probation = world.submit("killer")
    assert world.is_inside(on_probation)
    assert world.quarantine.probationer == on_probation
    world.die()
    world.submit("killer")
    assert world.refused == ["killer"]
    assert world.is_inside(world.submit("another"))
    assert world.quarantine.counts == QuarantineCounts(0, 0, 1, 1, 1)


def test_suspects_go_in_one_by_one_in_order_beside_those_that_nobody_suspects(world: World) -> None:
    for name in "abc":
        world.submit(name)
    world.die()
    first, second, third = (world.submit(name) for name in "cab")
    innocent = world.submit("new")
    assert list(world.inside) == [first, innocent]
    assert world.quarantine.counts.num_waiting == 2
    world.answer(innocent)
    world.answer(first)
    assert list(world.inside) == [second]
    world.answer(second)
    assert list(world.inside) == [third]
    world.answer(third)
    assert not world.quarantine.is_active


def test_a_suspect_that_is_answered_clears_all_who_ask_the_same(world: World) -> None:
    world.submit("same")
    world.submit("other")
    world.die()
    copies = [world.submit("same") for _ in range(50)]
    other = world.submit("other")
    assert list(world.inside) == copies[:1]
    world.answer(copies[0])
    assert list(world.inside) == [*copies[1:], other]


def test_many_who_ask_for_the_same_kill_once_more_and_are_all_refused(world: World) -> None:
    for _ in range(50):
        world.submit("killer")
    world.die()
    for _ in range(50):
        world.submit("killer")
    assert len(world.inside) == 1
    world.die()
    for _ in range(50):
        world.submit("killer")
    assert (len(world.inside), world.refused) == (0, ["killer"] * 50)
    assert world.quarantine.counts.num_quarantined == 1


def test_who_waited_when_the_process_died_is_suspected_no_more_than_before(world: World) -> None:
    world.submit("killer")
    world.submit("bystander")
    world.die()
    world.submit("killer")
    world.submit("bystander")  # waits
    world.die()
    again, other = world.submit("bystander"), world.submit("bystander")
    assert world.is_inside(again)
    world.quarantine.advance(again, 100)  # as only those may who have seen one death
    assert world.is_inside(other)


def test_an_end_that_proves_nothing_only_makes_room(world: World) -> None:
    for name in "ab":
        world.submit(name)
    world.die()
    first, second = world.submit("a"), world.submit("b")
    world.inside.pop(first)
    world.quarantine.release(first)
    assert list(world.inside) == [second]
    assert world.quarantine.counts.num_suspects == 2


def test_a_caller_that_goes_frees_the_turn_once_the_process_has_gone_on(world: World) -> None:
    for name in "ab":
        world.submit(name)
    world.die()
    first, second = world.submit("a"), world.submit("b")
    world.leave(first, "a")
    world.quarantine.turn_began(world.clock.now())  # in the same turn still
    assert not world.is_inside(second)
    world.clock.advance(5)
    world.quarantine.turn_began(world.clock.now())
    assert world.is_inside(second)


def test_a_caller_that_does_not_wait_for_the_watchdog_is_found_out_all_the_same(world: World) -> None:
    for _ in range(2):
        world.leave(world.submit("hangs"), "hangs")
        world.clock.advance(60)
        world.inside.clear()
        world.die()
    world.submit("hangs")
    assert world.refused == ["hangs"]


def test_a_caller_that_goes_while_it_waits_is_forgotten(world: World) -> None:
    for name in "abc":
        world.submit(name)
    world.die()
    first, second, third = (world.submit(name) for name in "abc")
    world.leave(second, "b")
    assert not world.quarantine.is_waiting(second)
    world.answer(first)
    assert list(world.inside) == [third]


def test_suspicion_and_quarantine_end_with_time(world: World) -> None:
    world.submit("suspect")
    world.submit("killer")
    world.die()
    world.submit("killer")
    world.clock.advance(1)
    world.die()
    world.clock.advance(KEEP_S - 1)
    assert world.quarantine.counts.num_suspects == 1
    world.quarantine.turn_began(world.clock.now())
    assert world.quarantine.counts.num_suspects == 0
    world.submit("killer")
    assert world.refused == ["killer"]
    world.clock.advance(1)
    world.quarantine.turn_began(world.clock.now())
    assert not world.quarantine.is_active
    assert world.is_inside(world.submit("killer"))


def test_the_deadline_goes_on_while_a_request_waits(world: World) -> None:
    for name in "abc":
        world.submit(name)
    world.die()
    first, second, third = world.submit("a"), world.submit("b", 10.0), world.submit("c", 10.0)
    world.clock.advance(4)
    world.answer(first)
    assert world.left_s[second] == 6.0
    world.clock.advance(8)
    world.answer(second)
    assert world.left_s[third] == 0.0


def test_of_a_crowd_only_the_first_are_tried_one_by_one_until_the_second_death() -> None:
    world = World(max_held=2)
    names = [f"{k}" for k in range(10)]
    for name in names:
        world.submit(name)
    world.die()
    for name in names:
        world.submit(name)
    assert list(world.inside.values()) == ["0", "2", "3", "4", "5", "6", "7", "8", "9"]
    world.die()  # "0" was on probation, but any of the others may have done it
    assert world.quarantine.counts.num_quarantined == 0
    for name in names:
        world.submit(name)
    assert len(world.inside) == 1


def test_a_suspect_that_comes_past_its_point_makes_room_but_only_once(world: World) -> None:
    for name in ("late killer", "innocent"):
        world.submit(name)
    world.die(progress=100)
    killer, innocent = world.submit("late killer"), world.submit("innocent")
    world.quarantine.advance(killer, 110)
    assert not world.is_inside(innocent)
    world.quarantine.advance(killer, 120)
    assert world.quarantine.probationer == innocent
    world.die(progress=500)  # nobody can say of which of the two
    assert world.quarantine.counts.num_quarantined == 0
    killer, innocent = world.submit("late killer"), world.submit("innocent")
    world.quarantine.advance(killer, 10_000)
    assert world.quarantine.probationer == killer
    world.die(progress=500)
    world.submit("late killer")
    assert world.refused == ["late killer"]
    innocent = world.submit("innocent")
    assert world.quarantine.probationer == innocent


def test_tables_are_bounded_and_the_latest_stay() -> None:
    world = World(max_held=10**6)
    for death in range(3):
        for k in range(2000):
            world.submit(f"{death}.{k}")
        world.die()
        assert world.quarantine.counts.num_suspects == module.MAX_REMEMBERED
    world.submit("2.0")
    assert world.quarantine.counts.num_suspects == module.MAX_REMEMBERED
    assert world.quarantine.probationer is not None
    for k in range(1000):
        world.leave(world.submit(f"left {k}"), f"left {k}")


def test_one_that_leaves_on_probation_among_very_many_does_not_block_the_turn_for_ever(world: World) -> None:
    for name in "ab":
        world.submit(name)
    world.die()
    first, second = world.submit("a"), world.submit("b")
    world.leave(first, "a")
    for k in range(module.MAX_LEFT):
        world.leave(world.submit(f"left {k}"), f"left {k}")
    assert world.is_inside(second)


def test_switched_off_it_suspects_nobody() -> None:
    world = World(keep_s=0.0)
    for _ in range(5):
        world.leave(world.submit("left"), "left")
        world.submit("killer")
        world.die()
    assert (world.refused, world.num_encoded, world.quarantine.is_active) == ([], 0, False)


def test_closing_forgets_everything(world: World) -> None:
    world.submit("killer")
    world.die()
    first, second = world.submit("killer"), world.submit("killer")
    world.quarantine.close()
    world.quarantine.check_integrity()
    assert not world.quarantine.is_active
    world.answer(first)
    assert not world.is_inside(second)


def test_the_log_names_requests_without_telling_anything_of_them(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        world.submit("a secret")
        world.die()
    said = caplog.text
    assert "a request is quarantined for 600 s" in said
    assert "secret" not in said
    assert hmac.digest(b"key", b"a secret", "sha256").hex()[:12] in said


@pytest.mark.parametrize("seed", range(30))
def test_whoever_kills_is_found_within_three_deaths_and_everybody_else_is_answered(seed: int) -> None:
    draw = random.Random(seed)
    world = World(max_held=draw.choice([1, 4, 1000]))
    wanted = [f"{k}" for k in range(60)]
    killers = set(draw.sample(wanted, draw.choice([1, 1, 3])))
    num_deaths, answered = 0, set()
    for _ in range(40):  # rounds of callers who try again
        draw.shuffle(wanted)
        tickets = {world.submit(name): name for name in wanted}
        while world.inside:
            ticket = draw.choice(list(world.inside))
            if world.inside[ticket] in killers:
                num_deaths += 1
                world.die()
                break
            answered.add(tickets[ticket])
            world.answer(ticket)
        wanted = [name for name in wanted if name not in answered and name not in world.refused]
    assert num_deaths <= 3 * len(killers)
    assert not wanted
    if len(killers) == 1:  # of several, one can die in the place of another
        assert set(world.refused) == killers
        assert answered == {f"{k}" for k in range(60)} - killers
