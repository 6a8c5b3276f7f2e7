"""What ``kvctl`` writes, and how errors turn into exit codes."""

import io

import pytest

import kvserve
from kvserve._cli.exits import exit_code_of
from kvserve._cli.output import describe_error, say, stats_line


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
