"""Operations on the cache on their way through the engine: loop, shield around the desk, callers."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest

from kvcore.clock import ManualClock
from server.engine.admin_client import MAX_WAITING_EVENTS, AdminClient
from server.engine.admin_desk import MAX_FAILURES_IN_A_ROW, AdminMessage, ShieldedDesk
from server.engine.admin_messages import (
    AdminCall,
    AdminErrorKind,
    AdminProgress,
    AdminRefusal,
    AdminReply,
    CacheEventKind,
    CacheEventNote,
    CacheEvents,
    CacheReport,
    CancelAdmin,
    ClearCache,
    DescribePolicy,
    Evicted,
    ListPrefixes,
    LookUpPrefix,
    PinPrefix,
    PinType,
    PrefixEntry,
    PrefixPage,
    PrefixRef,
    ReadStats,
    SaveSnapshot,
    SnapshotDone,
    Watch,
)
from server.engine.control import FromChild
from server.engine.errors import EngineUnavailableError
from server.engine.fake import FakeEngine
from server.engine.local import LocalEngine
from server.engine.loop import CHECK_INTERVAL_S, EngineLoop, EngineParts, Inbox, Stop
from server.engine.messages import (
    Drain,
    FailureKind,
    FromEngine,
    Outputs,
    Progress,
    Submit,
    ToEngine,
)
from server.engine.options import EngineOptions
from server.process.errors import FrameTooLargeError
from server.process.frames import MAX_FRAME_BYTES, FrameDecoder, encode_frame
from tests.fakes import FakeRunner, fake_parts, spec_of
from tests.small_desk import SmallDesk, engine_with_desk, parts_with_desk

PROMPT = list(range(1, 65))
HERE = PrefixRef(token_ids=PROMPT)


class Engine:
    """A loop with a desk, driven turn by turn, and what it has said."""

    def __init__(self, parts: EngineParts | None = None) -> None:
        self.clock = ManualClock()
        self.runner = FakeRunner(num_blocks=64)
        self.inbox: Inbox = queue.SimpleQueue()
        self.said: list[FromEngine] = []
        self.parts = parts or parts_with_desk(
            EngineOptions(model="fake"), runner=self.runner, clock=self.clock
        )
        self.loop = EngineLoop(self.parts, self.inbox, self)

    def send(self, message: FromEngine) -> None:
        self.said.append(message)

    def turn(self, *messages: ToEngine) -> None:
        for message in messages:
            self.inbox.put(message)
        assert self.loop.receive()
        self.loop.step()

    @property
    def desk(self) -> SmallDesk:
        assert isinstance(self.parts.desk, SmallDesk)
        return self.parts.desk

    def replies(self) -> dict[int, object]:
        return {m.key: m.result for m in self.said if isinstance(m, AdminReply)}


def note(sequence: int) -> CacheEventNote:
    return CacheEventNote(sequence, CacheEventKind.STORED, "0" * 16, "ab", 16, 1, 0.0)


# -- the loop -------------------------------------------------------------------------------------------


def test_an_idle_engine_answers_in_the_same_turn():
    engine = Engine()
    engine.turn(AdminCall(7, ReadStats()))
    assert isinstance(engine.replies()[7], CacheReport)


def test_an_operation_that_comes_during_a_step_is_answered_with_its_end():
    engine = Engine()
    engine.turn(Submit(1, spec_of(PROMPT, 3)))
    run = engine.runner.run

    def busy(plan):
        engine.inbox.put(AdminCall(5, LookUpPrefix(HERE)))
        return run(plan)

    engine.runner.run = busy  # type: ignore[method-assign]
    engine.turn()
    assert engine.replies() == {}
    engine.runner.run = run  # type: ignore[method-assign]
    engine.turn()
    found = engine.replies()[5]
    assert (found.cached_block_tokens, found.is_exact) == (64, True)  # type: ignore[attr-defined]


def test_a_long_operation_advances_once_per_turn_beside_requests():
    engine = Engine()
    engine.turn(Submit(1, spec_of(PROMPT, 40)))
    engine.turn(AdminCall(2, SaveSnapshot("s")))
    num_steps = engine.runner.num_steps
    for _ in range(10):
        engine.turn()
    progress = [m.done_objects for m in engine.said if isinstance(m, AdminProgress)]
    assert progress == [1, 2, 3, 4]
    assert isinstance(engine.replies()[2], SnapshotDone)
    assert engine.runner.num_steps == num_steps + 10


def test_a_long_operation_keeps_an_idle_engine_awake_until_it_is_done():
    engine = Engine()
    engine.turn(Submit(1, spec_of(PROMPT, 1)))
    engine.inbox.put(AdminCall(2, SaveSnapshot("s")))
    engine.inbox.put(Drain())
    engine.loop.run()  # ends by itself, and only after the snapshot
    assert engine.replies()[2] == SnapshotDone(4, 400, 0)


def test_cancelling_stops_a_long_operation():
    engine = Engine()
    engine.turn(AdminCall(2, SaveSnapshot("endless")))
    engine.turn()
    was_busy = engine.desk.is_busy
    engine.turn(CancelAdmin(2), CancelAdmin(99))
    assert (was_busy, engine.desk.is_busy) == (True, False)
    assert engine.desk.cancelled == [2]
    assert engine.replies() == {}


def test_a_fault_in_a_long_operation_refuses_it_and_the_engine_serves_on(
    caplog: pytest.LogCaptureFixture,
):
    engine = Engine()
    engine.turn(Submit(1, spec_of(PROMPT, 1)))
    engine.turn(AdminCall(2, SaveSnapshot("broken")))
    for _ in range(3):
        engine.turn(AdminCall(100, DescribePolicy()))
    refusal = engine.replies()[2]
    assert isinstance(refusal, AdminRefusal)
    assert refusal.kind is AdminErrorKind.FAILED
    assert "/var/secret/path" not in refusal.reason
    assert "/var/secret/path" in caplog.text
    assert not engine.desk.is_busy
    engine.turn(Submit(3, spec_of(PROMPT, 1)))
    assert any(isinstance(m, Outputs) and m.events[0].key == 3 for m in engine.said)


def test_after_a_fault_the_cache_is_checked_at_the_next_idle_moment():
    engine = Engine()
    checks: list[int] = []
    engine.parts.scheduler.check_integrity = lambda: checks.append(1)  # type: ignore[method-assign]
    engine.loop._do_chores()
    engine.clock.advance(CHECK_INTERVAL_S / 2)
    engine.loop._do_chores()
    assert checks == [1]
    engine.turn(Submit(1, spec_of(PROMPT, 1)))
    engine.turn(AdminCall(2, SaveSnapshot("broken")))
    engine.turn()
    engine.loop._do_chores()
    engine.loop._do_chores()
    assert checks == [1, 1]


def test_an_answer_too_large_for_the_link_is_a_refusal():
    engine = Engine()
    send = engine.send

    def narrow(message: FromEngine) -> None:
        if isinstance(message, AdminReply) and isinstance(message.result, CacheReport):
            raise FrameTooLargeError("too large")
        send(message)

    engine.send = narrow  # type: ignore[method-assign]
    engine.turn(AdminCall(1, ReadStats()), AdminCall(2, DescribePolicy()))
    refusal = engine.replies()[1]
    assert isinstance(refusal, AdminRefusal)
    assert refusal.kind is AdminErrorKind.FAILED
    assert not isinstance(engine.replies()[2], AdminRefusal)


def test_without_a_desk_every_operation_is_unsupported():
    clock = ManualClock()
    engine = Engine(fake_parts(clock=clock))
    engine.turn(AdminCall(1, ReadStats()), AdminCall(2, SaveSnapshot("s")), CancelAdmin(2), Watch(is_on=True))
    assert {refusal.kind for refusal in engine.replies().values()} == {AdminErrorKind.UNSUPPORTED}  # type: ignore[attr-defined]


def test_events_come_only_while_somebody_watches_and_after_an_announcement():
    engine = Engine()
    engine.turn(Submit(1, spec_of(PROMPT, 1)))
    engine.turn(AdminCall(2, ClearCache()))
    engine.turn(Watch(is_on=True))
    engine.turn(AdminCall(3, ClearCache()))
    engine.turn(Watch(is_on=False))
    engine.turn(AdminCall(4, ClearCache()))
    messages = [m for m in engine.said if isinstance(m, CacheEvents)]
    assert [[event.sequence for event in m.events] for m in messages] == [[], [2]]
    assert {m.epoch for m in messages} == {engine.desk.epoch}


def test_progress_is_said_once_per_step_until_the_prompt_is_done():
    runner = FakeRunner(num_blocks=64)
    parts = parts_with_desk(EngineOptions(model="fake", max_batch_tokens=16), runner=runner)
    engine = Engine(parts)
    engine.turn(Submit(1, spec_of(PROMPT, 3, report_progress=True, num_samples=2)))
    for _ in range(7):
        engine.turn(AdminCall(100, DescribePolicy()))
    events = [e for m in engine.said if isinstance(m, Outputs) for e in m.events]
    assert [e.num_computed for e in events if isinstance(e, Progress)] == [16, 32, 48, 64]
    engine.turn(Submit(2, spec_of(PROMPT, 3, report_progress=True)))
    events = [e for m in engine.said if isinstance(m, Outputs) for e in m.events]
    assert [e for e in events if isinstance(e, Progress) and e.key == 2] == [Progress(2, 64)]


# -- the shield -----------------------------------------------------------------------------------------


class FaultyDesk:
    """Raises wherever it is told to."""

    def __init__(self, *faults: str) -> None:
        self.faults = set(faults)
        self.epoch = 3
        self.num_advances = 0

    def _do(self, what: str) -> None:
        if what in self.faults:
            raise RuntimeError(what)

    @property
    def is_busy(self) -> bool:
        self._do("is_busy")
        return True

    def handle(self, call: AdminCall) -> None:
        self._do("handle")

    def cancel(self, key: int) -> None:
        self._do("cancel")

    def watch(self, is_on: bool) -> None:
        self._do("watch")

    def advance(self) -> None:
        self.num_advances += 1
        self._do("advance")

    def drain(self) -> list[AdminMessage]:
        self._do("drain")
        return []


@pytest.mark.parametrize("fault", ["handle", "cancel", "watch", "advance", "drain", "is_busy"])
def test_nothing_that_a_desk_raises_gets_out(fault: str, caplog: pytest.LogCaptureFixture):
    shield = ShieldedDesk(FaultyDesk(fault))
    shield.accept(AdminCall(1, ReadStats()))
    shield.accept(Watch(is_on=True))
    shield.advance()
    shield.accept(CancelAdmin(1))
    shield.drain()
    assert shield.has_failed
    assert "administering the cache failed" in caplog.text


def test_a_desk_that_fails_again_and_again_is_left_alone_until_the_next_call():
    desk = FaultyDesk("advance")
    shield = ShieldedDesk(desk)
    shield.accept(AdminCall(1, ReadStats()))
    for _ in range(10):
        shield.advance()
    assert desk.num_advances == MAX_FAILURES_IN_A_ROW
    assert not shield.is_busy
    assert [m.key for m in shield.drain() if isinstance(m, AdminReply)] == [1]
    shield.accept(AdminCall(2, ReadStats()))
    assert shield.is_busy


# -- the callers ----------------------------------------------------------------------------------------


class Wire:
    """What a client sends; its engine is available, or says why not."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.error: EngineUnavailableError | None = None
        self.client = AdminClient(self.sent.append, self.check)

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def wire() -> Wire:
    return Wire()


async def spin() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_answers_find_their_callers_whatever_their_order(wire: Wire):
    first = asyncio.create_task(wire.client.administer(ReadStats()))
    second = asyncio.create_task(wire.client.administer(ClearCache()))
    await spin()
    keys = [m.key for m in wire.sent if isinstance(m, AdminCall)]
    wire.client.dispatch(AdminReply(keys[1], Evicted(2, 0, 0)))
    wire.client.dispatch(AdminReply(keys[0], Evicted(1, 0, 0)))
    wire.client.dispatch(AdminReply(keys[0], Evicted(9, 0, 0)))
    assert (await first, await second) == (Evicted(1, 0, 0), Evicted(2, 0, 0))
    assert wire.client.num_open == 0
    assert len(wire.sent) == 2


async def test_leaving_early_cancels_the_operation_and_leaves_nothing(wire: Wire):
    call = asyncio.create_task(wire.client.administer(ReadStats()))
    await spin()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert wire.client.num_open == 0
    async with aclosing(wire.client.administer_with_progress(SaveSnapshot("s"))) as messages:
        waiting = asyncio.ensure_future(anext(messages))
        await spin()
        wire.client.dispatch(AdminProgress(2, 1, 9, 0, 0))
        assert isinstance(await waiting, AdminProgress)
    assert [m for m in wire.sent if isinstance(m, CancelAdmin)] == [CancelAdmin(1), CancelAdmin(2)]
    assert wire.client.num_open == 0


async def test_progress_that_is_not_read_is_replaced(wire: Wire):
    messages = wire.client.administer_with_progress(SaveSnapshot("s"))
    first = asyncio.ensure_future(anext(messages))
    await spin()
    for done in range(1, 1000):
        wire.client.dispatch(AdminProgress(1, done, 999, 0, 0))
    wire.client.dispatch(AdminReply(1, SnapshotDone(999, 0, 0)))
    seen = [await first, *[m async for m in messages]]
    assert seen == [AdminProgress(1, 999, 999, 0, 0), SnapshotDone(999, 0, 0)]


async def test_a_lost_engine_fails_what_is_open_and_refuses_what_comes(wire: Wire):
    call = asyncio.create_task(wire.client.administer(ReadStats()))
    await spin()
    wire.client.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")
    with pytest.raises(EngineUnavailableError) as caught:
        await call
    assert caught.value.kind is FailureKind.ENGINE_LOST
    assert not any(isinstance(m, CancelAdmin) for m in wire.sent)
    wire.error = EngineUnavailableError(FailureKind.ENGINE_LOST, "not there")
    with pytest.raises(EngineUnavailableError):
        await wire.client.administer(ReadStats())
    assert wire.client.num_open == 0


async def test_the_engine_is_watched_from_the_first_watcher_to_the_last(wire: Wire):
    first, second = wire.client.watch(), wire.client.watch()
    waiting = [asyncio.ensure_future(anext(watch)) for watch in (first, second)]
    await spin()
    wire.client.dispatch(CacheEvents(1, [note(4)]))  # of an earlier watch
    wire.client.dispatch(CacheEvents(1, []))
    assert [await one for one in waiting] == [CacheEvents(1, [])] * 2
    wire.client.dispatch(CacheEvents(1, [note(5)]))
    assert (await anext(first), await anext(second)) == (CacheEvents(1, [note(5)]),) * 2
    await first.aclose()
    assert Watch(is_on=False) not in wire.sent
    wire.sent.clear()
    wire.client.engine_is_ready()
    assert wire.sent == [Watch(is_on=True)]
    await second.aclose()
    assert wire.sent == [Watch(is_on=True), Watch(is_on=False)]
    wire.client.engine_is_ready()
    assert len(wire.sent) == 2
    assert wire.client.num_watchers == 0


async def test_a_watcher_that_does_not_read_stays_small(wire: Wire):
    watch = wire.client.watch()
    waiting = asyncio.ensure_future(anext(watch))
    await spin()
    wire.client.dispatch(CacheEvents(1, []))
    await waiting
    for start in range(0, 20 * MAX_WAITING_EVENTS, 1000):
        wire.client.dispatch(CacheEvents(1, [note(start + i) for i in range(1000)]))
    wire.client.close()
    kept = [event.sequence for message in [m async for m in watch] for event in message.events]
    assert len(kept) == MAX_WAITING_EVENTS
    assert kept[-1] == 20 * MAX_WAITING_EVENTS - 1  # the gap is at the beginning, where it shows
    assert [m async for m in wire.client.watch()] == []


# -- together -------------------------------------------------------------------------------------------


@pytest.fixture
async def engine() -> AsyncIterator[LocalEngine]:
    engine, _ = engine_with_desk()
    await engine.start()
    yield engine
    await engine.stop(grace_s=5)
    assert engine._desk.admin.num_open == 0
    assert "engine" not in {thread.name for thread in threading.enumerate()}


async def compute(engine: LocalEngine | FakeEngine, prompt: list[int]) -> None:
    async for _ in engine.submit(spec_of(prompt, 1)):
        pass


async def test_an_engine_in_a_thread_carries_operations_out(engine: LocalEngine):
    await compute(engine, PROMPT)
    found = await engine.administer(LookUpPrefix(HERE))
    assert found.cached_block_tokens == 64  # type: ignore[union-attr]
    pinned = await engine.administer(PinPrefix(HERE, PinType.HARD))
    assert pinned.num_blocks == 4  # type: ignore[union-attr]
    messages = [m async for m in engine.administer_with_progress(SaveSnapshot("s"))]
    assert messages[-1] == SnapshotDone(4, 400, 0)
    assert isinstance(messages[0], AdminProgress)


async def test_50_operations_beside_running_requests_are_all_answered(engine: LocalEngine):
    requests = [compute(engine, [k] * 40) for k in range(1, 20)]
    calls = [
        engine.administer(op) for op in (ReadStats(), ListPrefixes(), DescribePolicy()) for _ in range(17)
    ]
    results = await asyncio.gather(*calls, *requests)
    assert not any(isinstance(result, AdminRefusal) for result in results)


async def test_an_operation_in_flight_when_the_engine_stops_is_told(engine: LocalEngine):
    call = asyncio.create_task(engine.administer(SaveSnapshot("endless")))
    await spin()
    await engine.stop(grace_s=0)
    with pytest.raises(EngineUnavailableError) as caught:
        await call
    assert caught.value.kind is FailureKind.DRAINING
    with pytest.raises(EngineUnavailableError):
        await engine.administer(ReadStats())
    assert [m async for m in engine.watch()] == []


async def test_the_engine_that_only_pretends_has_no_cache():
    engine = FakeEngine()
    await engine.start()
    refusal = await engine.administer(ReadStats())
    assert refusal == AdminRefusal(AdminErrorKind.UNSUPPORTED, "this engine has no cache to administer")
    watch = engine.watch()
    assert await anext(watch) == CacheEvents(0, [])
    await watch.aclose()
    await engine.stop(grace_s=0)


def test_a_full_page_fits_the_link_many_times_over():
    entry = PrefixEntry(
        prefix_id="f" * 64,
        parent_id="e" * 64,
        namespace="a" * 16,
        salt="b" * 64,
        num_tokens=2**31 - 1,
        own_tokens=2**31 - 1,
        own_blocks=2**31 - 1,
        hits=2**62,
        age_s=1e9,
        idle_s=1e9,
        expires_in_s=1e9,
        pin=PinType.SOFT,
        pin_expires_in_s=1e9,
        in_use=True,
        has_last_logits=True,
        num_children=2**31 - 1,
        tiers={"host": 2**31 - 1, "disk": 2**31 - 1, "redis": 2**31 - 1},
        value=1e9,
        preview=[200_000] * 256,
    )
    frame = encode_frame(AdminReply(1, PrefixPage([entry] * 1000, "t" * 512, 2**31 - 1)))
    assert len(frame) < MAX_FRAME_BYTES / 16
    decoder: FrameDecoder[FromChild] = FrameDecoder(FromChild)
    [reply] = decoder.feed(frame)
    assert isinstance(reply, AdminReply)
    assert msgspec.to_builtins(reply.result)["entries"][999]["salt"] == "b" * 64


def test_stopping_does_not_wait_for_a_long_operation():
    engine = Engine()
    engine.turn(AdminCall(1, SaveSnapshot("endless")))
    engine.inbox.put(Stop())
    assert not engine.loop.receive()
