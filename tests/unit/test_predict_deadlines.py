"""Deadlines of the predict process: by key, in order, and nothing kept of what has ended."""

from __future__ import annotations

import random
import weakref

from server.predict.deadlines import SLACK, Deadlines


class Call:
    """Something that takes memory."""


def test_the_due_are_named_once_and_in_order() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for key, deadline_s in ((1, 3.0), (2, 1.0), (3, 2.0)):
        deadlines.add(key, deadline_s)
    assert (deadlines.first(), deadlines.first_s) == (2, 1.0)
    assert deadlines.due(2.0) == [2, 3]
    assert deadlines.due(2.0) == []
    deadlines.discard(1)
    deadlines.discard(1)
    assert (deadlines.first(), deadlines.first_s, len(deadlines)) == (None, None, 0)
    assert deadlines.due(5.0) == []


def test_what_has_ended_is_not_kept_until_its_deadline() -> None:
    """A thousand calls of some megabytes each used to stay, answered long ago, as long as they could take."""
    deadlines: Deadlines[Call] = Deadlines()
    call = Call()
    gone = weakref.ref(call)
    deadlines.add(call, 3600.0)
    deadlines.discard(call)
    del call
    assert gone() is None


def test_key_that_comes_again_has_its_new_deadline() -> None:
    deadlines: Deadlines[int] = Deadlines()
    deadlines.add(1, 1.0)
    deadlines.discard(1)
    deadlines.add(1, 5.0)
    assert deadlines.due(4.0) == []
    assert deadlines.due(5.0) == [1]


def test_deadlines_of_what_has_ended_do_not_pile_up() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for key in range(10_000):
        deadlines.add(key, 1e6)
        deadlines.discard(key)
    assert len(deadlines._heap) <= SLACK + 1


def test_deadlines_that_are_left_after_many_ended_still_come_in_order() -> None:
    """Thinning out must drop the numbers of the others, and leave a heap."""
    deadlines: Deadlines[int] = Deadlines()
    draw = random.Random(0)
    when = {key: draw.random() for key in range(8 * SLACK)}
    for key, deadline_s in when.items():
        deadlines.add(key, deadline_s)
    kept = set(draw.sample(sorted(when), SLACK))
    for key in when.keys() - kept:
        deadlines.discard(key)
    assert len(deadlines) == SLACK
    assert len(deadlines._heap) <= 3 * SLACK
    assert deadlines.first_s == min(when[key] for key in kept)
    half = deadlines.due(0.5)
    assert half == sorted((key for key in kept if when[key] <= 0.5), key=lambda key: when[key])
    assert half + deadlines.due(1.0) == sorted(kept, key=lambda key: when[key])
