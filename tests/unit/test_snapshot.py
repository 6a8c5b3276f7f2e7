"""Snapshots: all or nothing, in order, checked object by object, and nowhere but under their root."""

from __future__ import annotations

import errno
import json
import stat

import pytest

from kvcore.codec import Int8Codec, ZstdCodec
from kvcore.tiers.errors import SnapshotError
from kvcore.tiers.interface import FetchFailure, ObjectKind
from kvcore.tiers.objects import ObjectError
from kvcore.tiers.snapshot import check_snapshot, read_snapshot, snapshot_path, write_snapshot
from tests.faulty_files import FaultyFiles
from tests.tier_kit import FORMAT, OTHER_NAMESPACE, assert_same, make_chain, make_object

NOW = 1_000_000.0


def write(path, objects, **options):
    return write_snapshot(path, objects, FORMAT, now_unix=NOW, **options)


def read(path, *, now_unix=NOW, object_format=FORMAT, **options):
    return list(read_snapshot(path, object_format, now_unix=now_unix, **options))


@pytest.fixture
def path(tmp_path):
    return snapshot_path(tmp_path / "snapshots", "monday")


@pytest.mark.parametrize("codec", [None, ZstdCodec()])
def test_objects_come_back_in_the_order_of_their_writing(path, codec):
    chain = make_chain(12)
    objects = [
        *chain,
        make_object([7], parent=chain[-1], kind=ObjectKind.PARTIAL),
        make_object([7], parent=chain[-1], kind=ObjectKind.LOGITS),
        make_object(namespace=OTHER_NAMESPACE),
    ]
    steps = []
    info = write(path, iter(objects), codec=codec, num_expected=15, on_progress=lambda *s: steps.append(s))
    assert steps == [(n, 15) for n in range(1, 16)]
    assert check_snapshot(path) == info
    assert (info.num_objects, info.fingerprint, info.created_at_unix) == (15, "model-a", NOW)
    steps.clear()
    for found, stored in zip(read(path, on_progress=lambda *s: steps.append(s)), objects, strict=True):
        assert_same(found, stored)
    assert steps[-1] == (15, 15)


def test_an_empty_snapshot_is_one(path):
    assert write(path, []).num_objects == 0
    assert read(path) == []


def test_it_is_for_its_owner_only(path):
    write(path, make_chain(2))
    for made in [path.parent, path, *path.iterdir()]:
        assert stat.S_IMODE(made.lstat().st_mode) == (0o700 if made.is_dir() else 0o600)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../up", "a/b", "/etc", "a\0b", ".hidden", "-rf", "a" * 129, "a b", "a\n", "ä", "a\\b"],
)
def test_a_name_that_is_not_plain_is_refused(tmp_path, name):
    with pytest.raises(SnapshotError, match="name"):
        snapshot_path(tmp_path, name)


def test_a_link_under_the_root_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match="symbolic link"):
        snapshot_path(tmp_path, "link")


def test_a_name_that_is_taken_is_refused_and_what_was_there_stays(path):
    write(path, make_chain(2))
    with pytest.raises(SnapshotError, match="already"):
        write(path, make_chain(3))
    assert len(read(path)) == 2


def test_a_cancelled_snapshot_leaves_nothing(path):
    asked = iter([False, False, True])
    with pytest.raises(SnapshotError, match="cancelled"):
        write(path, make_chain(5), is_cancelled=lambda: next(asked))
    assert list(path.parent.iterdir()) == []


def test_a_source_that_ended_because_of_the_cancellation_makes_no_snapshot(path):
    cancelled = []

    def objects():
        yield from make_chain(2)
        cancelled.append(True)

    with pytest.raises(SnapshotError, match="cancelled"):
        write(path, objects(), is_cancelled=lambda: bool(cancelled))
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so_without_a_path(path):
    files = FaultyFiles()
    files.write_error = errno.ENOSPC
    with pytest.raises(SnapshotError, match="no space left") as caught:
        write(path, make_chain(5), files=files)
    assert str(path.parent) not in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_an_iterator_that_breaks_leaves_nothing(path):
    def objects():
        yield from make_chain(2)
        raise RuntimeError("the engine stopped")

    with pytest.raises(RuntimeError):
        write(path, objects())
    assert list(path.parent.iterdir()) == []


def test_reading_can_be_cancelled(path):
    write(path, make_chain(3))
    reading = read_snapshot(path, FORMAT, now_unix=NOW, is_cancelled=lambda: True)
    with pytest.raises(SnapshotError, match="cancelled"):
        next(reading)


def test_a_damaged_object_is_reported_in_its_place(path):
    chain = make_chain(3)
    write(path, chain)
    damaged = sorted(path.glob("*.block"))[1]
    data = bytearray(damaged.read_bytes())
    data[-100] ^= 4
    damaged.write_bytes(data)
    first, second, third = read(path)
    assert_same(first, chain[0])
    assert isinstance(second, ObjectError)
    assert second.failure is FetchFailure.CORRUPT
    assert_same(third, chain[2])


def test_objects_that_changed_names_are_reported(path):
    write(path, make_chain(2))
    first, second = sorted(path.glob("*.block"))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    assert [found.failure for found in read(path)] == [FetchFailure.MISMATCH] * 2


def test_a_snapshot_that_lost_objects_is_refused(path):
    write(path, make_chain(2))
    sorted(path.glob("*.block"))[1].unlink()
    with pytest.raises(SnapshotError, match="1 of 2 objects"):
        read(path)


def test_a_snapshot_of_another_model_is_refused(path):
    from dataclasses import replace

    write(path, make_chain(2))
    for other in (replace(FORMAT, fingerprint="model-b"), replace(FORMAT, vocab_size=51)):
        with pytest.raises(SnapshotError, match="another model"):
            read(path, object_format=other)


@pytest.mark.parametrize(
    "manifest",
    ["", "{}", "[]", "null", "[" * 50_000, '{"version": 1}', "\xff", "9" * 5000],
)
def test_a_manifest_that_makes_no_sense_is_refused(path, manifest):
    write(path, make_chain(1))
    (path / "manifest.json").write_bytes(manifest.encode("latin-1"))
    with pytest.raises(SnapshotError, match="makes no sense"):
        check_snapshot(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_objects", "1"), ("num_objects", True), ("block_shape", [1, 2]), ("fingerprint", 7), ("x", 1)],
)
def test_a_manifest_with_a_field_of_a_wrong_type_is_refused(path, name, value):
    write(path, make_chain(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, name: value}))
    with pytest.raises(SnapshotError, match="makes no sense"):
        check_snapshot(path)


@pytest.mark.parametrize("name", ["version", "object_version", "layout_version"])
def test_a_snapshot_of_another_version_is_refused(path, name):
    write(path, make_chain(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, name: 99}))
    with pytest.raises(SnapshotError, match="another version"):
        check_snapshot(path)


def test_what_is_not_there_is_no_snapshot(tmp_path):
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        check_snapshot(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="not a folder"):
        check_snapshot(tmp_path / "file")


def test_a_lifetime_goes_on_while_a_snapshot_lies_on_the_shelf(path):
    write(path, [make_object([1] * 4, expires_in_s=60.0), make_object([2] * 4)])
    first, second = read(path, now_unix=NOW + 20)
    assert first.expires_in_s == pytest.approx(40.0)
    assert second.expires_in_s is None
    first, _ = read(path, now_unix=NOW + 61)
    assert first.failure is FetchFailure.EXPIRED


def test_a_lossy_snapshot_is_read_only_where_that_is_accepted(path):
    write(path, make_chain(1), codec=Int8Codec())
    assert [found.failure for found in read(path)] == [FetchFailure.MISMATCH]
    (found,) = read(path, accept_lossy=True)
    assert found.key == make_chain(1)[0].key
