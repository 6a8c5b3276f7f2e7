"""The compiled kernels' cache, what happens without a compiler, and the small tools."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from server.worker.native import NativeTools, NativeUnavailable
from server.worker.native.build import build, default_cache_dir, find_compiler
from tests.model.native_support import skip_without_compiler

skip_without_compiler()


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that counts its runs and writes a line."""
    script = tmp_path / "fakecc"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo fake 1; exit 0; fi\n'
        f'echo run >> "{tmp_path}/runs"\n'
        'for last; do :; done\necho library > "$last"\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path / "runs"


def test_second_build_takes_the_first_ones_file(tmp_path: Path, fake_compiler: Path) -> None:
    folder = tmp_path / "cache" / "native"
    first = build(folder)
    assert build(folder) == first
    assert fake_compiler.read_text() == "run\n"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.name for p in folder.iterdir()] == [first.name]


def test_another_compiler_version_is_another_file(tmp_path: Path, fake_compiler: Path) -> None:
    folder = tmp_path / "cache" / "native"
    first = build(folder)
    script = tmp_path / "fakecc"
    script.write_text(script.read_text().replace("fake 1", "fake 2"))
    assert build(folder) != first


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, fake_compiler: Path, mode: int) -> None:
    folder = tmp_path / "cache" / "native"
    build(folder)
    folder.chmod(mode)
    with pytest.raises(NativeUnavailable, match="native in the kernel cache is writable by others"):
        build(folder)


def test_a_file_that_others_can_write_is_refused(tmp_path: Path, fake_compiler: Path) -> None:
    folder = tmp_path / "cache" / "native"
    build(folder).chmod(0o722)
    with pytest.raises(NativeUnavailable, match="writable by others"):
        build(folder)


def test_links_are_refused(tmp_path: Path, fake_compiler: Path) -> None:
    folder = tmp_path / "cache" / "native"
    library = build(folder)
    elsewhere = tmp_path / "elsewhere.so"
    library.rename(elsewhere)
    library.symlink_to(elsewhere)
    with pytest.raises(NativeUnavailable, match="not what it should be"):
        build(folder)


def test_another_owner_is_refused(
    tmp_path: Path, fake_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "native"
    build(folder)
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(NativeUnavailable, match="another user"):
        build(folder)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler"):
        build(tmp_path / "cache" / "native")
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(NativeUnavailable, match="no-such-compiler"):
        find_compiler()


def test_a_failing_compiler_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "badcc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.h:1: error: no" >&2\nexit 1\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    folder = tmp_path / "cache" / "native"
    with pytest.raises(NativeUnavailable, match="error: no"):
        build(folder)
    assert list(folder.iterdir()) == []


def test_the_cache_is_this_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/kvserve/native")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "kvserve" / "native"


@pytest.mark.parametrize("vocab", [1, 5, 16, 1003])
def test_argmax_takes_the_first_largest_and_logsumexp_is_exact(vocab: int) -> None:
    tools = NativeTools(3)
    logits = torch.randn(7, vocab)
    logits[2] = 1.5
    logits[3, vocab // 2] = float("-inf")
    ids, sums = tools.argmax_and_logsumexp(logits)
    assert ids.tolist() == [row.tolist().index(max(row.tolist())) for row in logits]
    torch.testing.assert_close(sums, logits.logsumexp(1), atol=1e-5, rtol=1e-5)
    logits[4, vocab - 1] = float("nan")
    ids, sums = tools.argmax_and_logsumexp(logits)
    assert ids[4] == -1
    assert sums[4].isnan()
    assert tools.argmax(logits[:0]).shape == (0,)


def test_measured_limits_are_plausible() -> None:
    tools = NativeTools(1)
    assert 1e8 < tools.measure_read_bandwidth(1 << 24, repeats=2) < 1e12
    assert 1e8 < tools.measure_multiply_rate(repeats=1) < 1e12
    assert "vector" in tools.describe()
