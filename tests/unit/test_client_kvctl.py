"""What ``kvctl`` writes, and how errors turn into exit codes."""

import argparse
import io
from dataclasses import replace

import pytest

import kvserve
from kvserve._cli.confirm import confirm
from kvserve._cli.exits import exit_code_of
from kvserve._cli.output import describe_error, say, stats_line, table
from kvserve._cli.steps import follow
from kvserve._cli.units import seconds, show_bytes, show_seconds
from kvserve.testing import MockTransport
from kvserve.v1 import cache_admin_pb2 as pb


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_generated_text_cannot_steer_the_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    say("a\x1b[31mb\tc\x9b2J")
    assert terminal.getvalue() == "a\N{REPLACEMENT CHARACTER}[31mb\tc\N{REPLACEMENT CHARACTER}2J\n"


def test_a_pipe_gets_the_text_as_it_is(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    say("a\x1b[31m", end="")
    assert pipe.getvalue() == "a\x1b[31m"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (kvserve.Internal("x"), 1),
        (kvserve.NotFound("x"), 1),
        (kvserve.InvalidArgument("x"), 2),
        (kvserve.Unavailable("x"), 3),
        (kvserve.ResourceExhausted("x"), 3),
        (kvserve.Unauthenticated("x"), 4),
        (kvserve.PermissionDenied("x"), 4),
        (kvserve.DeadlineExceeded("x"), 5),
    ],
)
def test_exit_codes(error, code):
    assert exit_code_of(error) == code


def test_errors_are_described_with_all_their_fields():
    violations = [
        kvserve.FieldViolation("parameters.top_p", "must be in (0, 1]"),
        kvserve.FieldViolation("parameters.n", "must be at least 1"),
    ]
    error = kvserve.InvalidArgument("parameters.top_p: must be in (0, 1]", violations=violations)
    assert describe_error(error, target=None) == (
        "parameters.top_p: must be in (0, 1]; parameters.n: must be at least 1"
    )
    full = kvserve.ResourceExhausted("the queue is full", retry_after_s=1.5)
    assert describe_error(full, target=None) == "the queue is full (try again in 1.5 s)"
    gone = kvserve.Unavailable("connection refused")
    assert describe_error(gone, target="models:1") == "models:1 is unavailable: connection refused"


def test_statistics_of_an_answer():
    result = kvserve.GenerateResult(
        request_id="r",
        model="m",
        seed=0,
        samples=(kvserve.Sample(0, "x", (1,), (), kvserve.FinishReason.EOS),),
        usage=kvserve.Usage(100, 64, 8, 4, 24, 11),
        timings=kvserve.Timings(0, 0, 0, 0, 0.004, 0, 0),
    )
    assert stats_line(result, first_token_s=0.005, elapsed_s=0.105) == (
        "[prompt 100 tokens, 76 cached | first token 5.0 ms (server 4.0 ms) | 11 tokens at 100.0/s | eos]"
    )


def test_restored_tokens_are_part_of_the_statistics():
    fetched = kvserve.Restore(kvserve.RestoreDecision.FETCH, "disk", 96, 64, 0.003, 0.05, 0.004, 0.001)
    result = kvserve.GenerateResult(
        request_id="r",
        model="m",
        seed=0,
        samples=(kvserve.Sample(0, "x", (1,), (), kvserve.FinishReason.EOS),),
        usage=kvserve.Usage(100, 16, 0, 0, 20, 1, restored_tokens=64),
        timings=kvserve.Timings(0, 0, 0, 0, 0.004, 0, 0, restore=fetched),
    )
    assert stats_line(result, first_token_s=None, elapsed_s=1) == (
        "[prompt 100 tokens, 80 cached (64 restored) | restored 64 of 96 tokens from disk in 4.0 ms"
        " (1.0 ms of it waited for; expected 3.0 ms, computing 50.0 ms) | eos]"
    )
    for wait_s, text in (
        (0.006, "in 4.0 ms (4.0 ms of it waited for;"),
        (0.0, "in 4.0 ms (none of it waited"),
    ):
        timings = replace(result.timings, restore=replace(fetched, wait_s=wait_s))
        line = stats_line(replace(result, timings=timings), first_token_s=None, elapsed_s=1)
        assert text in line
    left = replace(fetched, decision=kvserve.RestoreDecision.RECOMPUTE, restored_tokens=0)
    result = replace(
        result,
        usage=kvserve.Usage(100, 16, 0, 0, 84, 1),
        timings=replace(result.timings, restore=left),
    )
    assert "| 96 tokens in disk left there: expected 3.0 ms, computing 50.0 ms |" in stats_line(
        result, first_token_s=None, elapsed_s=1
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", 90),
        ("10m", 600),
        ("2h", 7200),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("7d", 604800),
        ("3", 3),
        (" 2 m", 120),
    ],
)
def test_times_are_read_as_in_the_servers_flags(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "-5s", "1e3", "5 parsecs", "nan", "1h30m"])
def test_times_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="30s, 10m or 2h"):
        seconds(text)


def test_times_and_sizes_are_written_short():
    times = [None, 0.0, 0.25, 1.25, 59.4, 60, 3599, 3600, 86400, 200_000]
    assert [show_seconds(each) for each in times] == [
        "-", "0ms", "250ms", "1.2s", "59s", "1m00s", "59m59s", "1h00m", "24h00m", "2d07h",
    ]  # fmt: skip
    assert [show_bytes(each) for each in (0, 1023, 1536, 200 * 1024, 5 * 2**30, 3 * 2**50)] == [
        "0 B", "1023 B", "1.5 KiB", "200 KiB", "5.0 GiB", "3072.0 TiB",
    ]  # fmt: skip


def test_a_table_keeps_foreign_text_on_its_line():
    lines = table(("NAME", ">N"), [("a\nb\x1b[1m", "1"), ("c", "20")]).splitlines()
    assert lines == ["NAME      N", "a b\N{REPLACEMENT CHARACTER}[1m   1", "c        20"]


@pytest.mark.parametrize(
    ("typed", "expected"), [("y\n", True), ("YES\n", True), ("\n", False), ("no\n", False), ("", False)]
)
def test_a_terminal_is_asked(monkeypatch, typed, expected):
    shown = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    monkeypatch.setattr("sys.stderr", shown)
    assert confirm(argparse.Namespace(yes=False), "Evict everything?") is expected
    assert shown.getvalue() == "Evict everything? [y/N] "


def test_nobody_is_asked_without_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match="--yes"):
        confirm(argparse.Namespace(yes=False), "Evict everything?")
    assert confirm(argparse.Namespace(yes=True), "Evict everything?")


def warming():
    steps = [
        pb.WarmPrefixProgress(num_tokens=8),
        pb.WarmPrefixProgress(num_tokens=8, computed_tokens=8, done=True),
    ]
    return kvserve.Client(transport=MockTransport(lambda method, request: steps))


def test_progress_is_shown_on_a_terminal_and_leaves_nothing_behind(monkeypatch, capsys):
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    with warming() as client:
        done = follow(client.cache.warm("x"), lambda step: f"{step.computed_tokens} of 8", as_json=False)
    assert done.computed_tokens == 8
    assert shown.getvalue() == "\r\x1b[K0 of 8\r\x1b[K8 of 8\r\x1b[K"
    assert capsys.readouterr().out == ""


def test_progress_is_not_shown_in_a_pipe(capsys):
    with warming() as client:
        follow(client.cache.warm("x"), lambda step: "never", as_json=False)
    assert capsys.readouterr() == ("", "")
