"""The order of admission."""

from __future__ import annotations

from kvcore.keys import NamespaceKey
from server.engine.messages import GenerateSpec
from server.engine.queue import SLACK, WaitingQueue
from server.engine.request import Request, Sequence


class Line:
    """A queue of sequences whose needs are given."""

    def __init__(self, *, waiting_bound_s: float = 30.0) -> None:
        self.needs: dict[Sequence, int] = {}
        self.queue = WaitingQueue(self.needs.__getitem__, waiting_bound_s=waiting_bound_s)
        self.names: dict[Sequence, str] = {}

    def add(self, name: str, need: int, *, at: float = 0.0, priority: int = 0) -> Sequence:
        spec = GenerateSpec(token_ids=[1], max_new_tokens=1, priority=priority)
        sequence = Sequence(Request(len(self.names), spec, NamespaceKey(""), now=at, deadline=None), 0, 0)
        self.needs[sequence], self.names[sequence] = need, name
        self.queue.add(sequence)
        return sequence

    def order(self, now: float = 0.0, *, limit: int = 100, largest: int | None = None) -> str:
        """Return the names in the order of admission; overdue ones in capitals."""
        chosen = self.queue.candidates(now, limit=limit, largest=largest)
        return " ".join(self.names[s].upper() if overdue else self.names[s] for s, overdue in chosen)


def test_equal_needs_go_by_arrival():
    line = Line()
    for name in "abc":
        line.add(name, 100)
    assert line.order() == "a b c"


def test_less_to_compute_goes_first_once_all_have_waited():
    line = Line()
    line.add("long", 4000)
    line.add("short", 10)
    assert line.order(1.0) == "short long"


def test_long_work_overtakes_in_the_end():
    line = Line()
    line.add("long", 1000)
    line.add("short", 10, at=20.0)
    assert line.order(20.1) == "long short"


def test_priority_comes_before_everything_but_the_bound():
    line = Line(waiting_bound_s=10.0)
    line.add("low", 10)
    line.add("high", 1000, at=5.0, priority=1)
    assert line.order(9.0) == "high low"
    assert line.order(10.1) == "LOW high"


def test_overdue_ones_go_by_arrival_whatever_they_need():
    line = Line(waiting_bound_s=10.0)
    line.add("a", 4000)
    line.add("b", 10)
    line.add("c", 500)
    line.add("d", 1, at=5.0)
    assert line.order(10.1) == "A B C d"


def test_looking_at_candidates_keeps_their_places():
    line = Line()
    for name in "abc":
        line.add(name, 100)
    assert line.order(limit=2) == "a b"
    assert line.order() == "a b c"


def test_those_admitted_while_looking_leave():
    line = Line()
    for name in "abc":
        line.add(name, 100)
    for sequence, _ in line.queue.candidates(0.0, limit=2):
        line.queue.remove(sequence)
    assert line.order() == "c"
    assert len(line.queue) == 1


def test_a_preempted_sequence_keeps_its_place():
    line = Line()
    first, _ = line.add("a", 100), line.add("b", 100)
    line.queue.remove(first)
    line.queue.add(first)
    assert line.order() == "a b"


def test_more_cached_moves_a_sequence_ahead():
    line = Line()
    line.add("a", 500)
    b = line.add("b", 500)
    line.needs[b] = 10
    line.queue.update(b)
    assert line.order(1.0) == "b a"


def test_a_need_that_grew_unnoticed_is_corrected_when_it_surfaces():
    line = Line()
    a = line.add("a", 10)
    line.add("b", 100)
    line.needs[a] = 4000
    assert line.order(1.0) == "b a"


def test_coming_back_to_an_old_bucket_names_a_sequence_once():
    # It was named twice: the entry left behind counted again.
    line = Line()
    a = line.add("a", 500)
    for need in (10, 500, 10, 500):
        line.needs[a] = need
        line.queue.update(a)
    assert line.order() == "a"


def test_what_cannot_fit_is_left_out_unless_overdue():
    line = Line(waiting_bound_s=10.0)
    line.add("long", 1000)
    line.add("short", 10, at=5.0)
    assert line.order(6.0, largest=64) == "short"
    assert line.order(11.0, largest=64) == "LONG short"


def test_the_smallest_need_is_an_upper_bound_for_its_size_class():
    line = Line()
    assert line.queue.smallest_need() == (0, 0)
    line.add("a", 1000)
    b = line.add("b", 20)
    line.add("c", 17)
    assert line.queue.smallest_need() == (31, 2)
    line.queue.remove(b)
    assert line.queue.smallest_need()[0] == 31


def test_dead_entries_do_not_pile_up():
    line = Line()
    moving, _ = line.add("a", 500), line.add("b", 7)
    for number in range(20_000):
        line.needs[moving] = 500 if number % 2 else 1000
        line.queue.update(moving)
    assert line.queue._num_entries <= 2 * 2 + SLACK + 1
    assert line.order(1.0) == "b a"


def test_a_bucket_of_dead_entries_is_dropped_at_once():
    line = Line()
    many = [line.add(str(n), 100) for n in range(5000)]
    last = line.add("last", 100)
    for sequence in many:
        line.queue.remove(sequence)
    assert line.order() == "last"
    line.queue.remove(last)
    assert line.order() == ""
    assert line.queue._num_entries == 0
