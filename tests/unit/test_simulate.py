"""The simulator: traces are read with care, figures are right, and the command line says what is wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from kvcore.policies import POLICIES
from kvcore.simulate import Half, TraceError, read_trace, simulate
from kvcore.simulate.__main__ import main

GOOD = {"timestamp": 1000, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]}


def timer():
    ticks = itertools.count()
    return lambda: float(next(ticks))


def write(folder: Path, *requests: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in requests))
    return path


def request(at_ms: int, *ids: int, tokens: int | None = None) -> dict[str, object]:
    length = 512 * len(ids) if tokens is None else tokens
    return {"timestamp": at_ms, "input_length": length, "output_length": 1, "hash_ids": list(ids)}


def test_hits_are_matched_blocks_but_never_more_than_the_prompt(tmp_path):
    path = write(tmp_path, request(0, 1, 2, tokens=600), request(1, 1, 2, tokens=600))
    result = simulate(read_trace(path), "lru", capacity_tokens=5120, timer=timer())
    assert result.token_hit_rate == 50.0
    assert result.request_hit_rate == 50.0
    assert (result.num_tokens, result.num_block_events, result.num_evicted) == (1200, 4, 0)
    assert result.events_per_s == 4.0


def test_the_second_half_is_counted_on_a_warm_cache(tmp_path):
    path = write(tmp_path, request(0, 1), request(1, 2), request(2, 1), request(3, 2))
    trace = read_trace(path)
    rates = [
        simulate(trace, "lru", capacity_tokens=5120, timer=timer(), half=half).token_hit_rate for half in Half
    ]
    assert rates == [50.0, 0.0, 100.0]


def test_a_lifetime_turns_hits_into_misses(tmp_path):
    path = write(tmp_path, request(0, 1), request(9_000, 1), request(11_000, 1))
    trace = read_trace(path)
    result = simulate(trace, "lru", capacity_tokens=5120, timer=timer(), lifetime_s=10.0)
    assert result.request_hit_rate == pytest.approx(100 / 3)
    assert result.num_expired == 1


def test_the_clairvoyant_keeps_what_comes_back_soonest(tmp_path):
    asked = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]
    path = write(tmp_path, *(request(at, block) for at, block in enumerate(asked)))
    trace = read_trace(path)
    rates = {
        name: simulate(trace, name, capacity_tokens=1024, timer=timer()).request_hit_rate
        for name in [*POLICIES, "optimal"]
    }
    assert rates["lru"] == 0.0
    assert rates["optimal"] == pytest.approx(100 * 3 / 11)
    assert max(rates.values()) == rates["optimal"]


def test_requests_out_of_order_are_put_in_order(tmp_path):
    path = write(tmp_path, request(5, 1), request(2, 2), request(9, 3))
    assert [r.blocks for r in read_trace(path).requests] == [(2,), (1,), (3,)]


def session(folder: Path, name: str, **changes: object) -> Path:
    document = {
        "id": name,
        "block_size": 64,
        "requests": [
            {"t": 0.0, "in": 100, "out": 7, "hash_ids": [1, 2]},
            {"t": 1.5, "type": "tool"},
            {"t": 2.0, "in": 200, "hash_ids": [1, 2, 3]},
        ],
        **changes,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


def test_ids_of_agent_sessions_are_their_own(tmp_path):
    one = session(tmp_path, "a")
    session(tmp_path, "b")
    assert len(read_trace(one).requests) == 2
    trace = read_trace(tmp_path)
    assert trace.block_tokens == 64
    assert [r.session for r in trace.requests] == [0, 1, 0, 1]
    assert simulate(trace, "lru", capacity_tokens=6400, timer=timer()).request_hit_rate == 50.0


def test_sessions_with_different_block_sizes_do_not_mix(tmp_path):
    session(tmp_path, "a")
    session(tmp_path, "b", block_size=32)
    with pytest.raises(TraceError, match="block sizes differ"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "not an object"),
        ({k: v for k, v in GOOD.items() if k != "hash_ids"}, "hash_ids is missing"),
        ({k: v for k, v in GOOD.items() if k != "timestamp"}, "timestamp is missing"),
        ({**GOOD, "timestamp": -1}, "timestamp must be finite and not negative"),
        ('{"timestamp": NaN, "input_length": 1, "hash_ids": []}', "timestamp must be finite"),
        ('{"timestamp": 1e999, "input_length": 1, "hash_ids": []}', "timestamp must be finite"),
        ({**GOOD, "timestamp": 10**400}, "timestamp must be finite"),
        ({**GOOD, "timestamp": True}, "timestamp is missing or not a number"),
        ({**GOOD, "input_length": -5}, "input_length must be from 0"),
        ({**GOOD, "input_length": 1 << 60}, "input_length must be from 0"),
        ({**GOOD, "input_length": 1.5}, "input_length is missing or not an integer"),
        ({**GOOD, "output_length": "many"}, "output_length is missing or not an integer"),
        ({**GOOD, "hash_ids": "12"}, "hash_ids is missing or not a list"),
        ({**GOOD, "hash_ids": [1, -2]}, "hash_ids must be integers from 0"),
        ({**GOOD, "hash_ids": [[1]]}, "hash_ids must be integers from 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = write(tmp_path, GOOD, line)
    with pytest.raises(TraceError, match=rf"line 2: {complaint}"):
        read_trace(path)


def test_a_session_with_a_bad_request_names_it(tmp_path):
    path = session(tmp_path, "a", requests=[{"t": 0, "in": 1, "hash_ids": [1]}, 7])
    with pytest.raises(TraceError, match=r"a\.json, request 2: not an object"):
        read_trace(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_an_empty_or_binary_file_is_no_trace(tmp_path, content):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"empty|not a text file"):
        read_trace(path)


def test_the_command_prints_json_with_the_promised_fields(tmp_path, capsys):
    path = write(tmp_path, request(0, 1), request(1, 1))
    assert main([str(path), "--policy", "best", "--capacity-tokens", "5120", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["policy"] == "foresight"
    assert shown["capacity_tokens"] == 5120
    assert shown["token_hit_rate"] == shown["request_hit_rate"] == 50.0
    assert shown["events_per_s"] > 0


def test_several_policies_and_sizes_make_a_table(tmp_path, capsys):
    path = write(tmp_path, request(0, 1), request(1, 1))
    assert main([str(path), "--policy", "lru,optimal", "--capacity-tokens", "512,1_024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["512", "lru", "50.00"],
        ["512", "optimal", "50.00"],
        ["1,024", "lru", "50.00"],
        ["1,024", "optimal", "50.00"],
    ]


def test_list_names_all_policies_with_descriptions(capsys):
    assert main(["--policy", "list", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {*POLICIES, "best", "optimal"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "which trace"),
        (["missing.jsonl"], "No such file"),
        (["TRACE", "--policy", "mru"], "no policy is called 'mru'"),
        (["TRACE", "--capacity-tokens", "0"], "not a number of tokens"),
        (["TRACE", "--capacity-tokens", "nan"], "not a number of tokens"),
        (["TRACE", "--capacity-tokens", "100"], "at least one block"),
        (["TRACE", "--ttl-s", "-1"], "not a number of seconds"),
        (["TRACE", "--half", "third"], "invalid choice"),
        (["TRACE", "--what"], "unrecognized"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_exit_code_2(tmp_path, capsys, arguments, complaint):
    path = write(tmp_path, GOOD)
    with pytest.raises(SystemExit) as caught:
        main([str(path) if argument == "TRACE" else argument for argument in arguments])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert complaint in shown.err.splitlines()[-1]
    assert "Traceback" not in shown.err
