"""The engine's driver, turn by turn, with the real scheduler and no threads but the test's own."""

from __future__ import annotations

import queue
import threading

import pytest

from kvcore.clock import ManualClock
from kvcore.errors import IntegrityError
from server.engine.errors import EngineBrokenError
from server.engine.loop import (
    CHECK_INTERVAL_S,
    FAILURE_REASON,
    MAX_FAILURES_IN_A_ROW,
    STATS_INTERVAL_S,
    EngineLoop,
    Inbox,
    Stop,
)
from server.engine.messages import (
    Admitted,
    Cancel,
    Drain,
    EngineStats,
    Failed,
    FailureKind,
    Finished,
    FromEngine,
    Outputs,
    Refused,
    Submit,
    Tokens,
)
from server.engine.options import EngineOptions
from tests.fakes import FakeRunner, Poison, expected, fake_parts, spec_of


class Engine:
    """A loop, and what it has said."""

    def __init__(self, **options: object) -> None:
        self.clock = ManualClock()
        self.runner = FakeRunner(num_blocks=64)
        self.inbox: Inbox = queue.SimpleQueue()
        self.said: list[FromEngine] = []
        resolved = EngineOptions(model="fake", **options)  # type: ignore[arg-type]
        self.parts = fake_parts(resolved, runner=self.runner, clock=self.clock)
        self.loop = EngineLoop(self.parts, self.inbox, self)

    def send(self, message: FromEngine) -> None:
        self.said.append(message)

    def turn(self) -> bool:
        go_on = self.loop.receive()
        if go_on:
            self.loop.step()
        return go_on

    @property
    def events(self) -> list[object]:
        return [event for message in self.said if isinstance(message, Outputs) for event in message.events]

    @property
    def stats(self) -> list[EngineStats]:
        return [message for message in self.said if isinstance(message, EngineStats)]

    def tokens(self, key: int) -> list[int]:
        return [t for e in self.events if isinstance(e, Tokens) and e.key == key for t in e.token_ids]

    def drain(self) -> None:
        self.inbox.put(Drain())
        self.loop.run()


def test_a_request_is_admitted_computed_and_finished():
    engine = Engine()
    spec = spec_of([1, 2, 3], 4)
    engine.inbox.put(Submit(1, spec))
    engine.drain()
    assert [type(e) for e in engine.events] == [Admitted, Tokens, Tokens, Tokens, Tokens, Finished]
    assert engine.tokens(1) == expected(spec)
    assert engine.runner.num_steps == 4


def test_a_step_says_everything_in_one_message():
    engine = Engine()
    for key in range(1, 9):
        engine.inbox.put(Submit(key, spec_of([key] * 5, 3)))
    engine.turn()
    engine.said.clear()
    engine.turn()
    [outputs] = [m for m in engine.said if isinstance(m, Outputs)]
    assert sorted(event.key for event in outputs.events) == list(range(1, 9))


def test_refusals_and_admissions_leave_before_the_step_is_computed():
    engine = Engine(max_waiting=1)
    seen: list[object] = []
    run = engine.runner.run

    def spy(plan):
        seen.extend(engine.events)
        return run(plan)

    engine.runner.run = spy  # type: ignore[method-assign]
    engine.inbox.put(Submit(1, spec_of([1, 2], 1)))
    engine.inbox.put(Submit(2, spec_of([3, 4], 1)))
    engine.turn()
    assert [type(event) for event in seen] == [Refused, Admitted]


def test_cancelling_while_queued_and_while_running_ends_within_a_turn():
    engine = Engine()
    engine.inbox.put(Submit(1, spec_of([1, 2, 3], 100)))
    engine.inbox.put(Submit(2, spec_of([4, 5, 6], 100)))
    engine.inbox.put(Cancel(2))
    engine.turn()
    engine.inbox.put(Cancel(1))
    engine.turn()
    assert [e.key for e in engine.events if isinstance(e, Finished)] == [2, 1]
    stats = engine.parts.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_leased) == (0, 0, 0)


def test_cancelling_what_has_gone_is_ignored():
    engine = Engine()
    engine.inbox.put(Cancel(99))
    engine.drain()
    assert engine.events == []


def test_a_step_that_raises_fails_its_requests_and_no_others():
    engine = Engine()
    engine.inbox.put(Submit(1, spec_of([1, Poison.RAISE], 3)))
    engine.turn()
    spec = spec_of([4, 5, 6], 3)
    engine.inbox.put(Submit(2, spec))
    engine.drain()
    assert [e for e in engine.events if isinstance(e, Failed)] == [
        Failed(1, FailureKind.INTERNAL, FAILURE_REASON)
    ]
    assert engine.tokens(2) == expected(spec)
    assert engine.loop.num_failed_steps == 1


def test_a_step_that_runs_out_of_memory_says_so():
    engine = Engine()
    engine.runner.failures.append(MemoryError())
    engine.inbox.put(Submit(1, spec_of([1, 2], 3)))
    engine.turn()
    failed = [e for e in engine.events if isinstance(e, Failed)]
    assert failed == [Failed(1, FailureKind.OUT_OF_MEMORY, FAILURE_REASON)]


def test_a_sequence_that_is_not_finite_fails_alone():
    engine = Engine()
    spec = spec_of([4, 5, 6], 3)
    engine.inbox.put(Submit(1, spec_of([1, Poison.NOT_FINITE], 3)))
    engine.inbox.put(Submit(2, spec))
    engine.drain()
    assert [e for e in engine.events if isinstance(e, Failed)] == [
        Failed(1, FailureKind.NUMERICAL, "not finite")
    ]
    assert engine.tokens(2) == expected(spec)


def test_failures_in_a_row_end_the_loop_after_everybody_was_told():
    engine = Engine()
    for key in range(1, MAX_FAILURES_IN_A_ROW):
        engine.inbox.put(Submit(key, spec_of([Poison.RAISE], 1)))
        engine.turn()
    engine.inbox.put(Submit(50, spec_of([1], 1)))
    engine.turn()
    for key in range(100, 100 + MAX_FAILURES_IN_A_ROW):
        engine.inbox.put(Submit(key, spec_of([Poison.RAISE], 1)))
        if key == 99 + MAX_FAILURES_IN_A_ROW:
            with pytest.raises(EngineBrokenError, match="RuntimeError"):
                engine.turn()
        else:
            engine.turn()
    failed = [e.key for e in engine.events if isinstance(e, Failed)]
    assert failed == [*range(1, MAX_FAILURES_IN_A_ROW), *range(100, 100 + MAX_FAILURES_IN_A_ROW)]
    assert engine.loop.num_failed_steps == len(failed)


def test_draining_finishes_what_runs_and_refuses_what_comes():
    engine = Engine()
    spec = spec_of([1, 2, 3], 4)
    engine.inbox.put(Submit(1, spec))
    engine.inbox.put(Drain())
    engine.inbox.put(Submit(2, spec_of([1], 1)))
    engine.loop.run()
    assert engine.tokens(1) == expected(spec)
    assert [e.kind for e in engine.events if isinstance(e, Refused)] == [FailureKind.DRAINING]
    assert isinstance(engine.said[-1], EngineStats)


def test_stopping_leaves_at_once():
    engine = Engine()
    engine.inbox.put(Submit(1, spec_of([1, 2, 3], 1000)))
    engine.turn()
    engine.inbox.put(Stop())
    assert not engine.turn()
    assert engine.runner.num_steps == 1


def test_statistics_come_at_most_four_times_a_second():
    engine = Engine()
    engine.inbox.put(Submit(1, spec_of([1, 2, 3], 41)))
    for _ in range(41):
        engine.turn()
        engine.clock.advance(STATS_INTERVAL_S / 10)
    assert 4 <= len(engine.stats) <= 6


def test_steps_are_timed():
    engine = Engine()
    run = engine.runner.run

    def slow(plan):
        engine.clock.advance(0.5)
        return run(plan)

    engine.runner.run = slow  # type: ignore[method-assign]
    engine.inbox.put(Submit(1, spec_of([1], 2)))
    engine.drain()
    assert engine.stats[-1].step_s == pytest.approx(1.0)


def test_a_deadline_ends_a_running_request():
    engine = Engine()
    engine.inbox.put(Submit(1, spec_of([1], 1000), 5.0))
    engine.turn()
    engine.clock.advance(6.0)
    engine.turn()
    assert engine.events[-1] == Failed(1, FailureKind.DEADLINE, "the deadline passed")
    assert not engine.parts.scheduler.has_work


def in_thread(engine: Engine) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            engine.loop.run()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def test_an_idle_engine_says_its_statistics_once_and_then_sleeps():
    engine = Engine()
    idle = threading.Event()
    send = engine.send

    def note(message: FromEngine) -> None:
        send(message)
        if isinstance(message, EngineStats) and message.generated_tokens == 2 and not message.num_running:
            idle.set()

    engine.send = note  # type: ignore[method-assign]
    checks = []
    engine.parts.scheduler.check_integrity = lambda: checks.append(1)  # type: ignore[method-assign]
    thread, errors = in_thread(engine)
    engine.inbox.put(Submit(1, spec_of([1], 2)))
    assert idle.wait(10)
    said = len(engine.said)
    thread.join(0.2)
    assert thread.is_alive()
    assert len(engine.said) == said
    assert engine.loop.turn_started is None
    assert checks == [1]
    engine.inbox.put(Stop())
    thread.join(60)
    assert not errors


def test_integrity_is_checked_when_idle_but_not_all_the_time():
    engine = Engine()
    checks = []
    engine.parts.scheduler.check_integrity = lambda: checks.append(1)  # type: ignore[method-assign]
    for _ in range(5):
        engine.loop._do_chores()
    assert checks == [1]
    engine.clock.advance(CHECK_INTERVAL_S)
    engine.loop._do_chores()
    assert checks == [1, 1]


def test_a_broken_invariant_ends_the_loop():
    engine = Engine()

    def broken() -> None:
        raise IntegrityError("leaked")

    engine.parts.scheduler.check_integrity = broken  # type: ignore[method-assign]
    thread, errors = in_thread(engine)
    thread.join(60)
    assert [str(error) for error in errors] == ["leaked"]


def test_the_turn_of_a_stuck_step_can_be_seen_from_outside():
    engine = Engine()
    engine.runner.hold()
    thread, errors = in_thread(engine)
    engine.inbox.put(Submit(1, spec_of([1], 1)))
    engine.runner.wait_for_step()
    assert engine.loop.turn_started == 0.0
    engine.inbox.put(Drain())
    engine.runner.release_all()
    thread.join(60)
    assert not thread.is_alive()
    assert not errors
