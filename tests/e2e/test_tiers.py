"""Blocks that outlive the device, the process and the server: real servers, real folders, a real Redis.

Every answer is compared, token for token, with that of a server that has no tier at all.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvserve.v1 import cache_admin_pb2 as admin_pb
from kvserve.v1 import cache_admin_pb2_grpc, common_pb2
from kvserve.v1 import generate_pb2 as pb
from tests.e2e.server_process import SMALL, ServerProcess, server
from tests.redis_server import RedisServer, redis_server  # noqa: F401 - a fixture

SYSTEM = "You answer questions about the documents below, briefly and without guessing. " * 12
QUESTIONS = ("What is the first one about?", "Who wrote it?", "When?", "")


@dataclass(frozen=True)
class Answer:
    """What one request gave."""

    token_ids: list[int]
    usage: common_pb2.Usage
    timings: common_pb2.Timings


def ask(process: ServerProcess, text: str, *, max_new_tokens: int = 10) -> Answer:
    request = pb.GenerateRequest(text=text, parameters={"max_new_tokens": max_new_tokens, "ignore_eos": True})
    with process.stub() as stub:
        response = stub.Generate(request, timeout=60)
    usage = response.usage
    cached = usage.cached_block_tokens + usage.cached_partial_tokens + usage.cached_tail_tokens
    assert usage.prompt_tokens == cached + usage.restored_tokens + usage.computed_prompt_tokens
    return Answer(list(response.samples[0].token_ids), usage, response.timings)


def ask_all(process: ServerProcess) -> list[list[int]]:
    return [ask(process, SYSTEM + question).token_ids for question in QUESTIONS]


def stats_of(process: ServerProcess) -> admin_pb.GetStatsResponse:
    with process.channel() as channel:
        stub: Any = cache_admin_pb2_grpc.CacheAdminServiceStub(channel)
        answer: admin_pb.GetStatsResponse = stub.GetStats(admin_pb.GetStatsRequest(), timeout=30)
        return answer


def tier_of(process: ServerProcess, name: str) -> admin_pb.TierStats:
    (found,) = [tier for tier in stats_of(process).tiers if tier.tier == name]
    return found


def start(*arguments: str) -> Any:
    """Run a server that restores what it finds, however busy the machine is: ``auto`` goes by speed."""
    return server("--port", "0", *SMALL, "--restore", "always", *arguments)


def stop(process: ServerProcess) -> None:
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Return the answers of a server that keeps nothing but what is on the device."""
    with start() as process:
        return ask_all(process.wait_ready())


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory, expected: list[list[int]]) -> Path:
    """Return the disk cache of a server that was asked everything and has stopped. Copy it."""
    folder = tmp_path_factory.mktemp("left") / "cache"
    with start("--disk-cache", str(folder)) as process:
        assert ask_all(process.wait_ready()) == expected
        stop(process)
    return folder


@pytest.fixture
def cache(tmp_path: Path, left_behind: Path) -> Path:
    return Path(shutil.copytree(left_behind, tmp_path / "cache"))


def test_a_restart_finds_the_disk_as_it_was_left(cache: Path, expected: list[list[int]]) -> None:
    with start("--disk-cache", str(cache)) as process:
        process.wait_ready()
        first = ask(process, SYSTEM + QUESTIONS[0])
        assert first.token_ids == expected[0]
        assert first.usage.restored_tokens >= 0.9 * first.usage.prompt_tokens
        assert first.usage.computed_prompt_tokens == 0, "its last logits are kept, too"
        restore = first.timings.restore
        assert restore.decision == common_pb2.Restore.FETCH
        assert restore.tier == "disk"
        assert restore.restored_tokens == first.usage.restored_tokens
        assert restore.expected_fetch_s > 0
        assert restore.expected_recompute_s > 0
        assert ask_all(process) == expected
        assert stats_of(process).total.restored_tokens >= restore.restored_tokens
        modes = {path.stat().st_mode & 0o777 for path in cache.rglob("*") if path.is_file()}
        assert modes == {0o600}


def test_a_killed_server_loses_no_more_than_was_not_written(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    arguments = ("--disk-cache", str(tmp_path / "cache"))
    with start(*arguments) as process:
        assert ask_all(process.wait_ready()) == expected
        process.engine().kill()
        process.signal(signal.SIGKILL)
    with start(*arguments) as process:
        assert ask_all(process.wait_ready()) == expected
        assert tier_of(process, "disk").failures == {}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 16
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_damaged_files_cost_a_computation(cache: Path, expected: list[list[int]]) -> None:
    with start("--disk-cache", str(cache)) as process:
        process.wait_ready()
        files = sorted(p for p in cache.rglob("*") if p.is_file() and p.stat().st_size > 1000)
        assert len(files) > 20
        for number, path in enumerate(files):
            (truncate, flip, empty, Path.unlink)[number % 4](path)
        assert ask_all(process) == expected
        assert sum(tier_of(process, "disk").failures.values()) > 0


def test_a_folder_serves_one_server_at_a_time_and_another_models_cache_is_left_alone(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    folder = ("--disk-cache", str(tmp_path / "cache"))
    with server("--port", "0", *SMALL[:-1], "bfloat16", *folder) as process:
        ask_all(process.wait_ready())
        with start(*folder) as second:
            assert second.wait() == 1
            assert "disk tier:" in second.text
            assert "Traceback" not in second.text
        stop(process)
    with start(*folder) as process:
        assert ask_all(process.wait_ready()) == expected
        assert tier_of(process, "disk").fetched == 0
        assert stats_of(process).total.restored_tokens == 0


def test_host_memory_keeps_what_the_device_cannot(expected: list[list[int]]) -> None:
    device = ("--num-blocks", "64", "--threads", "1", "--dtype", "float32")
    with server(
        "--port", "0", *device, "--host-cache", "256MB", "--host-codec", "zstd", "--restore", "always"
    ) as process:
        process.wait_ready()
        assert ask_all(process) == expected
        for number in range(6):  # pushes it all out
            ask(process, f"{number} " + "something else entirely, and long enough to fill blocks " * 20)
        assert ask_all(process) == expected
        stats = stats_of(process)
        assert stats.total.restored_tokens > 100
        assert stats.total.evicted_blocks["capacity"] > 64
        assert tier_of(process, "host").fetched > 0


def test_a_lossy_codec_is_measured(tmp_path: Path) -> None:
    arguments = ("--disk-cache", str(tmp_path / "cache"), "--disk-codec", "int8")
    with start(*arguments) as process:
        ask_all(process.wait_ready())
        stop(process)
    with start(*arguments) as process:
        process.wait_ready()
        answer = ask(
            process, SYSTEM + "Another question that makes blocks of its own, which are written and measured."
        )
        assert answer.usage.restored_tokens > 0
        stop(process)
        assert "over budget" not in process.text


def test_two_servers_share_one_redis_and_its_end_is_noticed_and_nothing_else(
    redis_server: RedisServer,  # noqa: F811
    expected: list[list[int]],
) -> None:
    arguments = ("--redis-url", redis_server.url)
    texts = [f"Part {number}. {SYSTEM}" for number in range(5)]
    with start(*arguments) as one, start(*arguments) as other:
        one.wait_ready()
        other.wait_ready()
        assert ask_all(one) == expected
        told = [ask(one, text) for text in texts]
        stop(one)  # what it computed has been written when it has ended
        answers = [ask(other, text) for text in texts]
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in told]
        # A lookup that Redis has not answered in 40 ms is a recompute: a busy machine may be late.
        assert any(
            answer.usage.restored_tokens >= 0.9 * answer.usage.prompt_tokens
            and answer.timings.restore.tier == "redis"
            for answer in answers
        )
        assert ask_all(other) == expected
        redis_server.stop()
        assert ask_all(other) == expected
        ask(other, "Something new, so that a lookup and a store are tried. " * 8)
        warning = other.wait_for(r"warning tier redis is left alone.*").group()
        assert redis_server.url not in warning


def progress_to_end(stream: Iterator[Any]) -> Any:
    last = None
    for message in stream:
        last = message
    assert last is not None
    assert last.done
    return last


def test_a_snapshot_moves_to_another_server(tmp_path: Path, expected: list[list[int]]) -> None:
    arguments = ("--snapshots", str(tmp_path))
    with start(*arguments) as process, process.wait_ready().channel() as channel:
        stub: Any = cache_admin_pb2_grpc.CacheAdminServiceStub(channel)
        assert ask_all(process) == expected
        saved = progress_to_end(stub.SaveSnapshot(admin_pb.SaveSnapshotRequest(name="monday"), timeout=60))
        assert saved.done_objects > 20
    with start(*arguments) as process, process.wait_ready().channel() as channel:
        stub = cache_admin_pb2_grpc.CacheAdminServiceStub(channel)
        restored = progress_to_end(
            stub.RestoreSnapshot(admin_pb.RestoreSnapshotRequest(name="monday"), timeout=60)
        )
        assert restored.done_objects == saved.done_objects
        assert restored.skipped_objects == 0
        first = ask(process, SYSTEM + QUESTIONS[0])
        assert first.token_ids == expected[0]
        assert first.usage.restored_tokens >= 0.9 * first.usage.prompt_tokens
        assert ask_all(process) == expected
