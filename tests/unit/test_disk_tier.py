"""The disk tier: the contract, restarts, faults planted in front of real files, and files tampered with."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvcore.clock import ManualClock
from kvcore.codec import Codec, Int8Codec, ZstdCodec
from kvcore.tiers.disk import DiskTier
from kvcore.tiers.disk_folder import MAX_QUARANTINED_FILES, name_of_key
from kvcore.tiers.errors import TierStartError
from kvcore.tiers.interface import FetchFailure, ObjectKind, Presence
from kvcore.tiers.objects import HEADER_BYTES
from tests.faulty_files import FAULTS, FaultyFiles
from tests.tier_kit import (
    FORMAT,
    NAMESPACE,
    OTHER_NAMESPACE,
    ROOMY,
    SOON_S,
    TierContract,
    assert_same,
    bring,
    make_chain,
    make_object,
    offer,
    poll_until,
    store,
    until,
)

REPOSITORY = Path(__file__).parents[2]


class TestDiskTierKeepsTheContract(TierContract):
    codec: Codec | None = None

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path):
        self.root = tmp_path / "kv"

    def make_tier(self, *, max_bytes=ROOMY, clock=None, on_ready=None):
        return DiskTier(self.root, FORMAT, max_bytes, codec=self.codec, clock=clock, on_ready=on_ready)


class TestCompressedDiskTierKeepsTheContract(TestDiskTierKeepsTheContract):
    codec = ZstdCodec()


class Disk:
    """A folder, and the tiers opened on it one after the other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tier: DiskTier | None = None

    def open(self, *, object_format=FORMAT, max_bytes=ROOMY, **options) -> DiskTier:
        self.close()
        self.tier = DiskTier(self.root, object_format, max_bytes, **options)
        return self.tier

    def close(self) -> None:
        if self.tier is not None:
            self.tier.close()
            self.tier.check_integrity()
            self.tier = None

    def crash(self) -> None:
        """Let go of the folder as a process that died does: nothing is written at the end."""
        self.tier._contents.save = lambda: None  # type: ignore[method-assign]
        self.close()

    def path(self, stored) -> Path:
        (path,) = self.root.rglob(name_of_key(stored.key))
        return path

    def files(self) -> list[str]:
        return sorted(p.name for p in self.root.rglob("*.block"))


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "kv")
    yield disk
    disk.close()


def is_measured(tier: DiskTier) -> bool:
    """Say whether the probe at the start is over: faults planted now hit the test's objects alone."""
    stats = tier.stats()
    return stats.read_bytes_per_s > 0 and stats.write_bytes_per_s > 0


# -- survival


@pytest.mark.parametrize("end", ["close", "crash"])
def test_objects_survive_a_restart(disk, end):
    chain = make_chain(5)
    tier = disk.open()
    for stored in chain:
        store(tier, stored)
    getattr(disk, end)()
    steps = []
    tier = disk.open(on_progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (5, 5)
    assert set(tier.keys()) == {stored.key for stored in chain}
    for stored in chain:
        assert_same(bring(tier, stored.key).found, stored)


def test_order_of_use_survives_a_restart(disk):
    tier = disk.open()
    first, second, third = (make_object([n] * 4) for n in (1, 2, 3))
    for stored in (first, second, third):
        store(tier, stored)
    bring(tier, first.key)
    tier = disk.open(max_bytes=8192)
    assert set(tier.keys()) == {first.key, third.key}
    assert tier.stats().evicted == 1


def test_a_damaged_index_file_costs_a_scan_and_nothing_else(disk):
    stored = make_object()
    store(disk.open(), stored)
    disk.close()
    (index,) = disk.root.rglob("index")
    data = bytearray(index.read_bytes())
    data[60] ^= 1
    index.write_bytes(data)
    assert_same(bring(disk.open(), stored.key).found, stored)


def test_an_index_row_without_its_file_is_dropped(disk):
    chain = make_chain(2)
    tier = disk.open()
    for stored in chain:
        store(tier, stored)
    disk.close()
    disk.path(chain[1]).unlink()
    tier = disk.open()
    assert tier.lookup(chain[0].key) is Presence.YES
    assert tier.lookup(chain[1].key) is Presence.NO


def test_what_was_being_written_at_a_crash_is_removed(disk):
    store(disk.open(), make_object())
    disk.crash()
    (temporary,) = disk.root.glob("*/tmp")
    (temporary / "123-4").write_bytes(b"half an obj")
    tier = disk.open()
    assert tier.stats().num_objects == 1
    assert not (temporary / "123-4").exists()


WRITER = """
import itertools, sys, time
from kvcore.tiers.disk import DiskTier
from kvcore.tiers.interface import Presence
from tests.tier_kit import FORMAT, make_object, offer
tier = DiskTier(sys.argv[1], FORMAT, 1 << 22, max_pending_bytes=1 << 15)
start, is_told = int(sys.argv[2]), False
for number in itertools.count(start):
    if not offer(tier, make_object([number] * 4)):
        time.sleep(0.001)
    if not is_told and tier.stats().stored >= 50:
        is_told = True
        print("writing", flush=True)
"""


def test_killed_while_writing_every_visible_object_is_whole(disk):
    """A kill -9 in the middle of a write leaves no partial block (three times, on the same folder)."""
    for start in (0, 10_000_000, 20_000_000):
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}"}
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(disk.root), str(start)],
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env=environment,
        )
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        process.stdout.close()
        tier = disk.open(max_bytes=1 << 22)
        keys = list(tier.keys())
        assert len(keys) >= 50
        for key in keys:
            assert bring(tier, key).failure is None
        assert tier.stats().quarantined == 0
        disk.close()


def test_a_read_that_hangs_does_not_keep_the_process_from_ending(disk):
    script = """
import sys, threading
from kvcore.tiers.disk import DiskTier
from tests.faulty_files import FaultyFiles
from tests.tier_kit import FORMAT, NAMESPACE, make_object, store, until
files = FaultyFiles()
tier = DiskTier(sys.argv[1], FORMAT, 1 << 20, files=files)
stored = make_object()
store(tier, stored)
until(lambda: tier.stats().read_bytes_per_s > 0)
files.may_read.clear()
tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=100)
until(lambda: files.num_waiting)
tier.close()
print("closed", tier.poll()[0].failure.value)
"""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}"}
    command = [sys.executable, "-c", script, str(disk.root)]
    done = subprocess.run(command, capture_output=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert (done.returncode, done.stdout) == (0, b"closed cancelled\n"), done.stderr


# -- lifetimes and clocks


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_wall_clock_that_jumps_expires_nothing_in_a_running_server(disk, jump_s):
    wall = [1_000_000.0]
    tier = disk.open(clock=ManualClock(5.0), wall_clock=lambda: wall[0])
    stored = make_object(expires_in_s=600.0)
    store(tier, stored)
    wall[0] += jump_s
    assert tier.lookup(stored.key) is Presence.YES
    assert bring(tier, stored.key).found.expires_in_s == pytest.approx(600.0)


@pytest.mark.parametrize("end", ["close", "crash"])
def test_what_is_left_of_a_lifetime_survives_a_restart_on_another_monotonic_clock(disk, end):
    wall = [1_000_000.0]
    tier = disk.open(clock=ManualClock(5.0), wall_clock=lambda: wall[0])
    short, long = make_object([1] * 4, expires_in_s=60.0), make_object([2] * 4, expires_in_s=600.0)
    store(tier, short)
    store(tier, long)
    getattr(disk, end)()
    wall[0] += 100.0
    tier = disk.open(clock=ManualClock(777.0), wall_clock=lambda: wall[0])
    assert tier.lookup(short.key) is Presence.NO
    assert tier.stats().expired == 1
    until(lambda: len(disk.files()) == 1, "removing the expired file")
    assert bring(tier, long.key).found.expires_in_s == pytest.approx(500.0)


def test_a_clock_set_back_between_runs_lengthens_no_lifetime(disk):
    wall = [1_000_000.0]
    tier = disk.open(wall_clock=lambda: wall[0])
    stored = make_object(expires_in_s=60.0)
    store(tier, stored)
    disk.crash()
    wall[0] -= 86_400
    tier = disk.open(wall_clock=lambda: wall[0])
    assert bring(tier, stored.key).found.expires_in_s <= 60.0


# -- the folder


def test_everything_in_the_folder_is_for_its_owner_only(disk):
    store(disk.open(), make_object())
    disk.close()
    for path in [disk.root, *disk.root.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_second_server_on_the_same_folder_is_told_so(disk):
    disk.open()
    with pytest.raises(TierStartError, match="in use by another server"):
        DiskTier(disk.root, FORMAT, ROOMY)
    disk.close()
    disk.open()


def test_a_link_instead_of_the_folder_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(TierStartError, match="symbolic link"):
        DiskTier(tmp_path / "link", FORMAT, ROOMY)


def test_a_folder_that_others_can_write_to_is_refused(tmp_path):
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(0o777)
    with pytest.raises(TierStartError, match="others can write"):
        DiskTier(tmp_path / "kv", FORMAT, ROOMY)


def test_a_file_instead_of_the_folder_is_refused(tmp_path):
    (tmp_path / "kv").write_text("")
    with pytest.raises(TierStartError, match="not a folder"):
        DiskTier(tmp_path / "kv", FORMAT, ROOMY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "kv").mkdir(mode=0o700)
    os.chown(tmp_path / "kv", 65534, 65534)
    with pytest.raises(TierStartError, match="another user"):
        DiskTier(tmp_path / "kv", FORMAT, ROOMY)


def test_another_models_objects_are_left_alone_while_there_is_room(disk):
    other = replace(FORMAT, fingerprint="model-b")
    stored = make_object()
    store(disk.open(), stored)
    theirs = make_object([5, 6, 7, 8], object_format=other)
    tier = disk.open(object_format=other)
    assert tier.lookup(stored.key) is Presence.NO
    assert list(tier.keys()) == []
    assert tier.stats().num_bytes == 4096  # it counts
    store(tier, theirs)
    tier = disk.open()
    assert_same(bring(tier, stored.key).found, stored)
    assert tier.stats().num_objects == 1


def test_another_models_objects_leave_first_when_they_are_older(disk):
    old = make_object()
    store(disk.open(), old)
    path = disk.path(old)
    os.utime(path, (1_000_000, 1_000_000))
    tier = disk.open(object_format=replace(FORMAT, fingerprint="model-b"), max_bytes=8192)
    for number in (1, 2):
        store(tier, make_object([number] * 4))
    assert tier.stats().evicted == 1
    until(lambda: not path.exists(), "the eviction")
    assert tier.stats().num_objects == 2


# -- faults (G12)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_is_counted_and_tried_again_after_the_back_off(disk, fault, caplog):
    caplog.set_level(logging.INFO, "kvcore.tiers")
    clock, files = ManualClock(), FaultyFiles()
    tier = disk.open(clock=clock, files=files)
    kept = make_object()
    store(tier, kept)
    files.write_error = FAULTS[fault]
    lost = make_object([2] * 4)
    assert offer(tier, lost)
    until(lambda: tier.stats().store_failures == 1, "the failure")
    stats = tier.stats()
    assert not stats.is_available
    assert str(disk.root) not in stats.last_fault
    assert tier.lookup(lost.key) is Presence.NO
    assert not offer(tier, lost)
    assert tier.stats().refused_stores == 1
    assert_same(bring(tier, kept.key).found, kept)  # reading goes on
    files.write_error = None
    clock.advance(1.0)
    store(tier, lost)
    assert tier.stats().is_available
    assert [record.getMessage() for record in caplog.records if "tier disk is" in record.getMessage()] == [
        f"tier disk is left alone for a while (writing): {stats.last_fault}",
        "tier disk is back (writing)",
    ]
    assert list(disk.root.glob("*/tmp/*")) == []
    assert disk.files() == sorted([name_of_key(kept.key), name_of_key(lost.key)])


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_read_that_fails_is_an_outcome_and_the_tier_is_left_alone_for_a_while(disk, number):
    clock, files = ManualClock(), FaultyFiles()
    tier = disk.open(clock=clock, files=files)
    chain = make_chain(2)
    for stored in chain:
        store(tier, stored)
    until(lambda: is_measured(tier))
    files.open_error = number
    assert bring(tier, chain[1].key).failure is FetchFailure.UNREACHABLE
    assert tier.lookup(chain[0].key) is Presence.NO
    assert not tier.fetch(chain[0].key, namespace=NAMESPACE, timeout_s=SOON_S)
    assert not tier.stats().is_available
    clock.advance(1.0)
    assert bring(tier, chain[0].key).failure is FetchFailure.UNREACHABLE  # the one retry
    clock.advance(0.5)
    assert not tier.fetch(chain[0].key, namespace=NAMESPACE, timeout_s=SOON_S)  # twice as long
    files.open_error = None
    clock.advance(1.0)
    if number == errno.EIO:  # the medium under these two files is bad: they were given up
        assert list(tier.keys()) == []
        store(tier, chain[0])
    assert_same(bring(tier, chain[0].key).found, chain[0])
    assert tier.stats().is_available
    assert tier.stats().failures == {FetchFailure.UNREACHABLE: 2}


def test_a_read_that_hangs_is_a_timeout_and_makes_the_tier_back_off(disk):
    clock, files = ManualClock(), FaultyFiles()
    tier = disk.open(clock=clock, files=files, stuck_after_s=-1.0)
    chain = make_chain(5)
    for stored in chain:
        store(tier, stored)
    until(lambda: is_measured(tier))
    files.may_read.clear()
    for stored in chain:
        assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=10.0)
    until(lambda: files.num_waiting == 2, "both readers to hang")
    assert tier.poll() == []
    clock.advance(10.0)
    outcomes = tier.poll()
    assert [outcome.failure for outcome in outcomes] == [FetchFailure.TIMEOUT] * 5
    assert tier.lookup(chain[0].key) is Presence.NO
    assert not tier.stats().is_available
    files.may_read.set()
    clock.advance(1.0)
    assert_same(bring(tier, chain[0].key).found, chain[0])  # what came too late was dropped
    assert tier.stats().is_available


def test_a_retry_that_nobody_waits_for_any_more_counts_as_failed(disk):
    clock, files = ManualClock(), FaultyFiles()
    tier = disk.open(clock=clock, files=files)
    stored = make_object()
    store(tier, stored)
    until(lambda: is_measured(tier))
    files.open_error = errno.EMFILE
    bring(tier, stored.key)
    files.open_error = None
    clock.advance(1.0)
    files.may_read.clear()
    assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
    tier.cancel([stored.key])
    (outcome,) = tier.poll()
    assert outcome.failure is FetchFailure.CANCELLED
    assert tier.lookup(stored.key) is Presence.NO
    files.may_read.set()
    clock.advance(3.0)
    assert_same(bring(tier, stored.key).found, stored)


def test_more_fetches_than_the_queue_takes_are_turned_away(disk):
    files = FaultyFiles()
    tier = disk.open(files=files, max_queued_reads=3, num_readers=1)
    chain = make_chain(6)
    for stored in chain:
        store(tier, stored)
    until(lambda: is_measured(tier))
    files.may_read.clear()
    assert tier.fetch(chain[0].key, namespace=NAMESPACE, timeout_s=SOON_S)
    until(lambda: files.num_waiting == 1)
    taken = [tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S) for stored in chain[1:]]
    assert taken == [True, True, True, False, False]
    files.may_read.set()
    assert len(poll_until(tier, 4)) == 4


def test_what_waits_to_be_written_is_bounded(disk):
    tier = disk.open(max_pending_bytes=9000)
    first, second, third = (make_object([n] * 4) for n in (1, 2, 3))
    tickets = [tier.prepare(stored.key, 1024) for stored in (first, second)]
    assert None not in tickets
    assert tier.prepare(third.key, 1024) is None
    for ticket in tickets:
        tier.abandon(ticket)
    store(tier, third)


def test_a_folder_that_disappears_costs_a_recompute(disk):
    clock = ManualClock()
    tier = disk.open(clock=clock)
    stored = make_object()
    store(tier, stored)
    until(lambda: is_measured(tier))
    gone = disk.root.rename(disk.root.with_name("elsewhere"))
    assert bring(tier, stored.key).failure is FetchFailure.MISSING
    assert offer(tier, stored)
    until(lambda: tier.stats().store_failures == 1)
    assert tier.stats().last_fault == "the folder is missing"
    gone.rename(disk.root)
    clock.advance(1.0)
    store(tier, stored)
    assert_same(bring(tier, stored.key).found, stored)


# -- files tampered with (G13)

BIT_REGIONS = {
    "magic": 3,
    "version": 8,
    "shape": 20,
    "expiry": 52,
    "fingerprint": 85,
    "namespace": 120,
    "parent": 150,
    "digest": 190,
    "padding": HEADER_BYTES - 2,
    "tokens": HEADER_BYTES + 3,
    "payload": HEADER_BYTES + 16 + 500,
    "checksum": -5,
}


def bit_flipper(position):
    def tamper(path, other):
        data = bytearray(path.read_bytes())
        data[position] ^= 0x10
        path.write_bytes(data)

    return tamper


def make_sparse(path, other):
    with path.open("r+b") as file:
        file.truncate(512 << 20)


def link_elsewhere(path, other):
    path.unlink()
    path.symlink_to(other)


def link_to_a_copy(path, other):
    path.rename(path.parents[3] / "copy")  # the very object, but in a place that somebody else may write to
    path.symlink_to(path.parents[3] / "copy")


def become_a_folder(path, other):
    path.unlink()
    path.mkdir()


def become_a_fifo(path, other):
    path.unlink()
    os.mkfifo(path)


TAMPERING = {
    **{f"bit flip in {region}": bit_flipper(at) for region, at in BIT_REGIONS.items()},
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-100]),
    "header only": lambda path, other: path.write_bytes(path.read_bytes()[:HEADER_BYTES]),
    "empty": lambda path, other: path.write_bytes(b""),
    "bytes added": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "pickle": lambda path, other: path.write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR." * 60),
    "swapped": lambda path, other: path.write_bytes(other.read_bytes()),
    "old version": lambda path, other: path.write_bytes(
        path.read_bytes()[:8] + b"\0\0" + path.read_bytes()[10:]
    ),
    "512 MB": make_sparse,
    "symlink": link_elsewhere,
    "symlink to a copy": link_to_a_copy,
    "folder": become_a_folder,
    "fifo": become_a_fifo,
}


@pytest.mark.parametrize("when", ["while running", "found by the index", "found by a scan"])
@pytest.mark.parametrize("what", TAMPERING)
def test_a_file_tampered_with_costs_a_recompute_and_is_quarantined(disk, what, when):
    tier = disk.open()
    stored, other = make_object(), make_object(namespace=OTHER_NAMESPACE)
    store(tier, stored)
    store(tier, other)
    path, other_path = disk.path(stored), disk.path(other)
    if when != "while running":
        disk.close() if when == "found by the index" else disk.crash()
    TAMPERING[what](path, other_path)
    if when != "while running":
        tier = disk.open()
    if tier.lookup(stored.key) is Presence.YES:
        outcome = bring(tier, stored.key)
        assert outcome.found is None
        assert outcome.failure in {FetchFailure.CORRUPT, FetchFailure.MISMATCH}
    until(lambda: tier.stats().quarantined == 1, "the quarantine")
    assert tier.lookup(stored.key) is Presence.NO
    assert not os.path.lexists(path)
    num_kept = 0 if what == "512 MB" else 1  # too large to keep
    assert len(list((disk.root / "quarantine").iterdir())) == num_kept
    assert_same(bring(tier, other.key, namespace=OTHER_NAMESPACE).found, other)
    store(tier, stored)  # computed again
    assert_same(bring(tier, stored.key).found, stored)


def test_the_quarantine_is_bounded(disk):
    tier = disk.open()
    for number in range(MAX_QUARANTINED_FILES + 5):
        stored = make_object([number] * 4)
        store(tier, stored)
        disk.path(stored).write_bytes(b"x" * 300)
        assert bring(tier, stored.key).failure is FetchFailure.CORRUPT
    until(lambda: tier.stats().quarantined == MAX_QUARANTINED_FILES + 5)
    assert len(list((disk.root / "quarantine").iterdir())) == MAX_QUARANTINED_FILES


def test_a_bit_flipped_on_the_way_is_caught(disk):
    files = FaultyFiles()
    tier = disk.open(files=files)
    stored = make_object()
    store(tier, stored)
    until(lambda: is_measured(tier))

    def flip(view):
        view[700] ^= 1

    files.damage = flip
    assert bring(tier, stored.key).failure is FetchFailure.CORRUPT


def test_a_file_removed_by_somebody_is_missing(disk):
    tier = disk.open()
    stored = make_object()
    store(tier, stored)
    disk.path(stored).unlink()
    assert bring(tier, stored.key).failure is FetchFailure.MISSING
    assert tier.lookup(stored.key) is Presence.NO
    store(tier, stored)


# -- codecs


def test_objects_are_read_whatever_codec_wrote_them_but_lossy_ones_only_where_that_is_on(disk):
    plain, packed, lossy = (make_object([n] * 4) for n in (1, 2, 3))
    store(disk.open(), plain)
    store(disk.open(codec=ZstdCodec()), packed)
    tier = disk.open(codec=Int8Codec())
    store(tier, lossy)
    assert [key for key, _ in tier.take_divergences()] == [lossy.key]
    assert bring(tier, lossy.key).is_lossy
    tier = disk.open()
    for stored in (plain, packed):
        assert_same(bring(tier, stored.key).found, stored)
    assert bring(tier, lossy.key).failure is FetchFailure.MISMATCH


def test_logits_are_exact_even_where_blocks_are_lossy(disk):
    tier = disk.open(codec=Int8Codec())
    logits = make_object([5], kind=ObjectKind.LOGITS)
    store(tier, logits)
    assert_same(bring(tier, logits.key).found, logits)
