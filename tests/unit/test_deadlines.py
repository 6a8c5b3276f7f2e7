"""Deadlines by request."""

from __future__ import annotations

from server.engine.deadlines import SLACK, Deadlines


def test_the_due_are_named_once_and_in_order():
    deadlines = Deadlines()
    for key, deadline in ((1, 3.0), (2, 1.0), (3, 2.0)):
        deadlines.add(key, deadline)
    assert deadlines.due(0.9) == []
    assert deadlines.due(2.0) == [2, 3]
    assert deadlines.due(2.0) == []
    assert len(deadlines) == 1


def test_a_request_that_ended_is_never_due():
    deadlines = Deadlines()
    deadlines.add(1, 1.0)
    deadlines.discard(1)
    deadlines.discard(1)
    assert deadlines.due(5.0) == []


def test_deadlines_of_ended_requests_do_not_pile_up():
    deadlines = Deadlines()
    for key in range(10_000):
        deadlines.add(key, 1e6)
        deadlines.discard(key)
    assert len(deadlines._heap) <= SLACK + 1
