"""Quarantine against what may be said of it whatever happens, in any order."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcore.clock import ManualClock
from server.process.quarantine import LEFT_SLACK_S, MAX_LEFT, Quarantine, Witness

KEEP_S = 100.0
requests = st.sampled_from("abcdef")


class QuarantineMachine(RuleBasedStateMachine):
    """Every ticket is in one place: inside, gone from its caller, waiting, refused, or ended."""

    @initialize(max_held=st.sampled_from([1, 3, 100]))
    def begin(self, max_held: int) -> None:
        self.clock = ManualClock()
        self.tickets: dict[int, str] = {}
        """Open ones."""
        self.inside: list[int] = []
        self.gone: dict[int, tuple[str, float]] = {}
        """In the process still, and since when without a caller."""
        self.refused: set[int] = set()
        self.seen_deaths: Counter[str] = Counter()
        self.died_on_probation: set[str] = set()
        self.waited: list[int] = []
        """In the order of their coming."""
        self.last_ticket = 0
        self.quarantine: Quarantine[str] = Quarantine(
            "test",
            encode=str.encode,
            send=self.send,
            refuse=self.refuse,
            keep_s=KEEP_S,
            max_held=max_held,
            now=self.clock.now,
        )

    def send(self, ticket: int, request: str, left_s: float | None) -> None:
        assert self.tickets[ticket] == request
        assert ticket not in self.inside
        self.inside.append(ticket)
        if ticket in self.waited:
            # Whoever goes on probation is the first that still waits.
            if self.quarantine.probationer == ticket:
                assert ticket == self.waited[0]
            self.waited.remove(ticket)

    def refuse(self, ticket: int, request: str) -> None:
        assert request in self.died_on_probation
        assert self.seen_deaths[request] >= 2
        self.refused.add(ticket)
        del self.tickets[ticket]

    @rule(request=requests)
    def submit(self, request: str) -> None:
        self.last_ticket += 1
        ticket = self.last_ticket
        self.tickets[ticket] = request
        if not self.quarantine.is_active:
            self.inside.append(ticket)
            return
        self.quarantine.submit(ticket, request, None)
        if self.quarantine.is_waiting(ticket):
            self.waited.append(ticket)
        else:
            assert (ticket in self.inside) != (ticket in self.refused)

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), is_proof=st.booleans())
    def end(self, data: st.DataObject, is_proof: bool) -> None:
        ticket = data.draw(st.sampled_from(self.inside))
        self.inside.remove(ticket)
        del self.tickets[ticket]
        if self.quarantine.is_active:
            (self.quarantine.acquit if is_proof else self.quarantine.release)(ticket)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.tickets)))
        request = self.tickets.pop(ticket)
        if ticket in self.inside:
            self.inside.remove(ticket)
            self.gone[ticket] = request, self.clock.now()
        else:
            self.waited.remove(ticket)
        self.quarantine.leave(ticket, request)

    @precondition(lambda self: self.quarantine.probationer is not None)
    @rule(progress=st.sampled_from([1, 50, 200]))
    def advance(self, progress: int) -> None:
        assert self.quarantine.probationer is not None
        self.quarantine.advance(self.quarantine.probationer, progress)

    @rule(seconds=st.sampled_from([0.5, 2.0, 60.0]))
    def go_on(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.quarantine.turn_began(self.clock.now())
        end_s = self.clock.now() - LEFT_SLACK_S
        self.gone = {ticket: gone for ticket, gone in self.gone.items() if gone[1] > end_s}

    @rule(progress=st.sampled_from([0, 100]))
    def die(self, progress: int) -> None:
        present = {ticket: request for ticket, (request, _) in self.gone.items()}
        present |= {ticket: self.tickets[ticket] for ticket in self.inside}
        if self.quarantine.probationer is not None:
            self.died_on_probation.add(present[self.quarantine.probationer])
        self.seen_deaths.update(set(present.values()))
        self.quarantine.died(
            Witness(ticket, request, progress) for ticket, request in list(self.tickets.items())
        )
        assert not any(map(self.quarantine.is_waiting, self.tickets))
        self.tickets, self.inside, self.gone, self.waited = {}, [], {}, []
        self.quarantine.judge()
        if present:
            assert self.quarantine.is_active

    @invariant()
    def nothing_is_out_of_place(self) -> None:
        if not hasattr(self, "quarantine"):
            return
        self.quarantine.check_integrity()
        counts = self.quarantine.counts
        assert counts.num_waiting == len(self.waited)
        assert counts.num_refused == len(self.refused)
        assert counts.num_suspects + counts.num_in_quarantine <= 6
        assert set(self.inside) | set(self.waited) == set(self.tickets)
        assert len(self.gone) <= MAX_LEFT
        probationer = self.quarantine.probationer
        assert probationer is None or probationer in self.inside or probationer in self.gone


TestQuarantine = QuarantineMachine.TestCase
TestQuarantine.settings = settings(max_examples=150, stateful_step_count=40)
