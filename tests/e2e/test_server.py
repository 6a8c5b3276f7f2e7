"""One ``kvserve serve`` on the built-in model, from outside: what it says, streams, counts and refuses."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import grpc
import pytest

from kvserve.v1 import generate_pb2 as pb
from tests.e2e.server_process import SMALL, ServerProcess, server


@pytest.fixture(scope="module")
def running() -> Iterator[ServerProcess]:
    with server("--port", "0", "--metrics-port", "0", *SMALL) as process:
        yield process.wait_ready()


def test_it_says_what_it_loaded(running: ServerProcess) -> None:
    text = running.text
    assert "loading builtin" in text
    assert "builtin: llama, 3.57 M parameters, 3072 tokens, length 4096" in text
    assert "cpu, float32" in text
    assert "1 threads" in text
    assert "256 blocks of 16 tokens (4096 tokens, " in text
    assert "policy    foresight\n" in text
    assert "(plaintext, no keys)" in text


def test_it_streams_text(running: ServerProcess) -> None:
    wanted = pb.GenerateRequest(
        text="The function returns", parameters={"max_new_tokens": 24, "ignore_eos": True}
    )
    with running.stub() as stub:
        events = list(stub.StreamGenerate(wanted, timeout=60))
        unary = stub.Generate(wanted, timeout=60)
    token_ids = [token_id for event in events for token_id in event.token_ids]
    assert len(token_ids) == 24
    assert list(unary.samples[0].token_ids) == token_ids
    assert unary.samples[0].text == "".join(event.text for event in events)
    usage, timings = events[-1].summary.usage, events[-1].summary.timings
    parts = (
        usage.cached_block_tokens
        + usage.cached_partial_tokens
        + usage.cached_tail_tokens
        + usage.computed_prompt_tokens
    )
    assert usage.prompt_tokens == parts == events[0].start.prompt_tokens
    assert usage.generated_tokens == 24
    assert 0 < timings.first_token_s <= timings.total_s
    assert timings.tokenize_s + timings.queue_s + timings.prefill_s <= timings.total_s


def test_a_repeated_prompt_is_computed_once(running: ServerProcess) -> None:
    wanted = pb.GenerateRequest(
        token_ids={"ids": list(range(100, 200))}, parameters={"max_new_tokens": 4, "ignore_eos": True}
    )
    with running.stub() as stub:
        first = stub.Generate(wanted, timeout=60)
        second = stub.Generate(wanted, timeout=60)
    assert first.usage.computed_prompt_tokens == 100
    assert second.usage.computed_prompt_tokens == 0
    assert second.samples[0].token_ids == first.samples[0].token_ids


def test_a_chat_is_answered(running: ServerProcess) -> None:
    with running.stub() as stub:
        answer = stub.Generate(
            pb.GenerateRequest(
                chat={"messages": [{"role": "user", "content": "What does os.path.join do?"}]},
                parameters={"max_new_tokens": 8, "n": 2, "temperature": 1.0, "seed": 1},
            ),
            timeout=60,
        )
    assert [sample.index for sample in answer.samples] == [0, 1]


def test_bad_requests_are_refused_and_the_neighbour_goes_on(running: ServerProcess) -> None:
    with running.stub() as stub:
        wanted = pb.GenerateRequest(
            token_ids={"ids": [7, 8, 9]}, parameters={"max_new_tokens": 64, "ignore_eos": True}
        )
        alone = stub.Generate(wanted, timeout=60)
        stream = stub.StreamGenerate(wanted, timeout=60)
        given = list(next(stream).token_ids)
        for bad in (
            pb.GenerateRequest(token_ids={"ids": [3072]}),
            pb.GenerateRequest(text="x", parameters={"top_p": float("nan")}),
            pb.GenerateRequest(text="x", parameters={"max_new_tokens": 5000}),
            pb.GenerateRequest(),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(bad, timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        given += [token_id for event in stream for token_id in event.token_ids]
    assert given == list(alone.samples[0].token_ids)


def test_what_can_never_fit_is_refused_at_once(running: ServerProcess) -> None:
    # 256 blocks of 16 tokens hold exactly the model's length, so that nothing within it is too large.
    with running.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(token_ids={"ids": [5] * 4096}), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_metrics_are_served(running: ServerProcess) -> None:
    address = running.wait_for(r"^metrics\s+(http://\S+)").group(1)
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    assert 'kvserve_engine_up{model_name="builtin"} 1.0' in text
    assert "kvserve_time_to_first_token_seconds_bucket" in text
    assert "kvserve_event_loop_lag_seconds_bucket" in text
    assert "kvserve_cache_config_info" in text


def test_second_server_on_the_same_port_says_so_and_ends(running: ServerProcess) -> None:
    with server("--port", str(running.port), *SMALL) as second:
        assert second.wait() == 1
        assert second.lines == [
            f"kvserve: error: cannot listen on 127.0.0.1:{running.port}: Address already in use"
        ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port", "many"], 2, "kvserve: error: --port: must be a whole number, not 'many'"),
        (["--block-sise", "16"], 2, "unrecognized arguments: --block-sise"),
        (["--config", "/nowhere.yaml"], 2, "kvserve: error: /nowhere.yaml: No such file or directory"),
        (["./no-such-folder", "--port", "0"], 1, "no-such-folder: no such folder"),
    ],
)
def test_wrong_command_lines_end_with_a_message_and_no_traceback(
    arguments: list[str], code: int, message: str
) -> None:
    with server(*arguments) as process:
        assert process.wait() == code
        assert message in process.text
        assert "Traceback" not in process.text


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("kvserve ")
