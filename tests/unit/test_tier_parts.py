"""What tiers are made of: worker threads, the board of fetches, the meter of speeds, the index."""

from __future__ import annotations

import logging
import threading

import pytest

from kvcore.clock import ManualClock
from kvcore.errors import IntegrityError
from kvcore.tiers.fetches import FetchBoard
from kvcore.tiers.index import ForeignFile, IndexEntry, ObjectIndex
from kvcore.tiers.interface import FetchFailure, ObjectKind
from kvcore.tiers.speed import SpeedMeter
from kvcore.tiers.workers import Workers
from tests.tier_kit import NAMESPACE, SOON_S, make_chain, make_object, until

STORED = make_object()


# -- workers


@pytest.fixture
def workers():
    made = Workers("test", num_readers=1, max_queued_reads=3)
    yield made
    assert made.close()


def test_writes_happen_in_the_order_in_which_they_came(workers):
    done = []
    for number in range(100):
        assert workers.submit_write(lambda number=number: done.append(number))
    until(lambda: len(done) == 100)
    assert done == list(range(100))


def test_waiting_reads_go_before_waiting_writes(workers):
    done, go = [], threading.Event()
    workers.submit_write(lambda: go.wait(SOON_S))
    workers.submit_read(lambda: go.wait(SOON_S))
    until(lambda: workers.longest_read_s() > 0)
    workers.submit_write(lambda: done.append("write"))
    for _ in range(3):
        workers.submit_read(lambda: done.append("read"))
    go.set()
    until(lambda: len(done) == 4)
    assert done.index("write") > 0


def test_the_queue_of_reads_is_bounded(workers):
    go = threading.Event()
    workers.submit_read(lambda: go.wait(SOON_S))
    until(lambda: workers.longest_read_s() > 0)
    assert [workers.submit_read(lambda: None) for _ in range(4)] == [True, True, True, False]
    go.set()


def test_a_job_that_raises_is_logged_and_ends_nothing(workers, caplog):
    def fail():
        raise RuntimeError("a bug")

    done = threading.Event()
    with caplog.at_level(logging.ERROR):
        workers.submit_read(fail)
        workers.submit_read(done.set)
        assert done.wait(SOON_S)
    assert "a bug" in caplog.text
    until(lambda: workers.longest_read_s() == 0)


def test_closing_finishes_writes_and_drops_reads():
    workers = Workers("test", num_readers=1)
    go, written, read = threading.Event(), [], []
    workers.submit_read(lambda: go.wait(SOON_S))
    until(lambda: workers.longest_read_s() > 0)
    workers.submit_read(lambda: read.append("never"))
    for number in range(10):
        workers.submit_write(lambda number=number: written.append(number))  # type: ignore[misc]
    assert not workers.close(within_s=0.05)  # one reader hangs
    assert not workers.submit_read(lambda: None)
    assert not workers.submit_write(lambda: None)
    go.set()
    assert workers.close()
    assert read == []
    assert written == list(range(10))


# -- fetches


@pytest.fixture
def clock():
    return ManualClock()


def start(board, *, timeout_s=5.0):
    return board.start(STORED.key, namespace=NAMESPACE, timeout_s=timeout_s)


def test_whoever_ends_a_fetch_first_has_ended_it(clock):
    board = FetchBoard("disk", clock=clock)
    fetch = start(board)
    clock.advance(1.0)
    assert board.fail(fetch, FetchFailure.CORRUPT, num_bytes=7)
    assert not board.succeed(fetch, STORED, num_bytes=7)
    board.cancel([STORED.key])
    clock.advance(9.0)
    assert board.expire() == 0
    (outcome,) = board.take()
    assert (outcome.failure, outcome.seconds, outcome.num_bytes) == (FetchFailure.CORRUPT, 1.0, 7)
    assert (board.fetched, board.failures, len(board)) == (0, {FetchFailure.CORRUPT: 1}, 0)


def test_only_fetches_past_their_timeout_have_timed_out(clock):
    board = FetchBoard("disk", clock=clock)
    short, long = start(board, timeout_s=1.0), start(board, timeout_s=2.0)
    clock.advance(1.0)
    assert board.expire() == 1
    assert (short.is_over, long.is_over) == (True, False)


def test_every_outcome_wakes_the_engine_and_a_retracted_fetch_has_none(clock):
    woken = []
    board = FetchBoard("disk", clock=clock, on_ready=lambda: woken.append(1))
    board.retract(start(board))
    assert (woken, board.take()) == ([], [])
    start(board)
    start(board)
    board.cancel_all()
    assert len(woken) == len(board.take()) == 2


# -- speeds


def test_a_meter_tells_latency_from_rate():
    meter = SpeedMeter()
    assert (meter.latency_s, meter.bytes_per_s) == (0.0, 0.0)
    for num_bytes in (1000, 1_000_000, 4_000_000) * 50:
        meter.observe(num_bytes, 0.002 + (num_bytes / 1e9 if num_bytes > 1000 else 0))
    assert meter.latency_s == pytest.approx(0.002, rel=0.3)
    assert meter.bytes_per_s == pytest.approx(1e9, rel=0.4)


def test_a_meter_follows_a_disk_that_becomes_slow():
    meter = SpeedMeter()
    meter.observe(1 << 20, 0.001)
    before = meter.bytes_per_s
    for _ in range(40):
        meter.observe(1 << 20, 0.1)
    assert meter.bytes_per_s < before / 50


# -- the index


def load(index, key, num_bytes, *, used_at=0.0, parent=None):
    entry = IndexEntry(key, num_bytes, used_at=used_at)
    if parent is not None:
        entry.parent = parent
    index.load(entry)
    return entry


def test_room_that_cannot_be_made_evicts_nothing():
    index = ObjectIndex(100)
    load(index, STORED.key, 60)
    assert index.reserve(make_object([9] * 4).key, 101) is None
    assert index.num_bytes == 60
    index.check_integrity()


def test_the_start_of_a_prefix_stays_even_if_it_was_used_longer_ago_than_anything():
    index = ObjectIndex(100)
    chain = make_chain(3)
    for age, stored in enumerate(chain):
        load(index, stored.key, 20, used_at=float(age), parent=stored.parent)
    load(index, make_object([9] * 4).key, 20, used_at=1.5)
    evicted = index.make_room(80)
    names = [entry.key for entry in evicted]
    assert names == [make_object([9] * 4).key, chain[2].key, chain[1].key]
    assert index.get(chain[0].key) is not None
    index.check_integrity()


def test_logits_hang_below_the_block_that_has_their_digest():
    index = ObjectIndex(100)
    block = make_object()
    bare = make_object([], parent=block, kind=ObjectKind.LOGITS)
    load(index, block.key, 50, used_at=0.0, parent=block.parent)
    load(index, bare.key, 50, used_at=9.0, parent=bare.parent)
    assert [entry.key for entry in index.make_room(10)] == [bare.key]


def test_the_deeper_of_two_that_were_used_at_once_leaves_first():
    index = ObjectIndex(100)
    shallow, deep = (IndexEntry(make_object([n] * 4).key, 50, used_at=1.0, depth=n) for n in (1, 2))
    index.load(shallow)
    index.load(deep)
    assert index.make_room(1) == [deep]


def test_foreign_files_count_and_leave_but_are_no_objects():
    index = ObjectIndex(100)
    foreign = load(index, ForeignFile("x/y"), 90)
    assert (index.num_objects, index.num_bytes) == (0, 90)
    assert index.select(None) == []
    reservation = index.reserve(STORED.key, 50)
    assert reservation.evicted == [foreign]


def test_a_list_of_leaves_does_not_grow_with_use():
    index = ObjectIndex(1000)
    entries = [load(index, make_object([n] * 4).key, 10) for n in range(10)]
    for turn in range(10_000):
        index.touch(entries[turn % 10], float(turn))
    assert len(index._leaves) < 200
    index.check_integrity()


def test_a_miscount_is_noticed():
    index = ObjectIndex(100)
    load(index, STORED.key, 10)
    index.num_bytes += 1
    with pytest.raises(IntegrityError):
        index.check_integrity()
