"""loadgen's workloads, arrivals, summaries and runner, against a scripted server."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvserve.v1 import common_pb2, generate_pb2, generate_pb2_grpc
from loadgen import cli
from loadgen.arrivals import ClosedLoop, OpenLoop
from loadgen.records import Record
from loadgen.report import summary_lines
from loadgen.runner import run_load
from loadgen.summary import percentile, summarize
from loadgen.workloads import FIRST_TOKEN, exact_repeats, sessions, shared_prefix, unique_prompts


class ScriptedService(generate_pb2_grpc.GenerateServiceServicer):
    """Two tokens a message; refuses prompts that begin with ``refused_token``."""

    refused_token = 499

    def __init__(self):
        self.prompts = []
        self.num_running = 0
        self.most_running = 0

    async def StreamGenerate(self, request, context):
        prompt = list(request.token_ids.ids)
        self.prompts.append(prompt)
        if prompt[0] == self.refused_token:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        assert request.parameters.ignore_eos
        assert request.parameters.temperature == 0.0
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        left = request.parameters.max_new_tokens
        while left > 0:
            count = min(2, left)
            left -= count
            await asyncio.sleep(0.002)
            event = generate_pb2.GenerateEvent(token_ids=[7] * count)
            if left + count == request.parameters.max_new_tokens:
                event.start.CopyFrom(generate_pb2.GenerateStart(request_id="1", model="scripted"))
            if left == 0:
                event.finish_reason = generate_pb2.FINISH_REASON_LENGTH
                usage = common_pb2.Usage(
                    prompt_tokens=len(prompt),
                    computed_prompt_tokens=len(prompt),
                    generated_tokens=request.parameters.max_new_tokens,
                )
                timings = common_pb2.Timings(first_token_s=0.001, total_s=0.002)
                event.summary.CopyFrom(generate_pb2.GenerateSummary(usage=usage, timings=timings))
            yield event
        self.num_running -= 1

    async def GetModelInfo(self, request, context):
        return generate_pb2.ModelInfo(name="scripted", vocab_size=400)


class Healthy(health_pb2_grpc.HealthServicer):
    async def Check(self, request, context):
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Watch(self, request, context):
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
async def service_and_target():
    server = grpc.aio.server()
    service = ScriptedService()
    generate_pb2_grpc.add_GenerateServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(Healthy(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(grace=None)


def test_groups_share_exactly_their_prefix():
    asked = shared_prefix(
        num_groups=3, requests_per_group=4, shared_tokens=20, own_tokens=5, new_tokens=6, vocab_size=900
    )
    prompts = {group: [c.turns[0].token_ids for c in asked if c.group == group] for group in range(3)}
    assert [len(of_group) for of_group in prompts.values()] == [4, 4, 4]
    for of_group in prompts.values():
        assert len({prompt[:20] for prompt in of_group}) == 1
        assert len({prompt[20:] for prompt in of_group}) == 4
        assert {len(prompt) for prompt in of_group} == {25}
    assert len({of_group[0][:20] for of_group in prompts.values()}) == 3
    assert [c.group for c in asked] != sorted(c.group for c in asked)


def test_same_seed_same_prompts_and_special_tokens_stay_out():
    sizes = {"num_requests": 5, "prompt_tokens": 50, "new_tokens": 4, "vocab_size": 40}
    assert unique_prompts(**sizes, seed=3) == unique_prompts(**sizes, seed=3)
    assert unique_prompts(**sizes, seed=3) != unique_prompts(**sizes, seed=4)
    drawn = {token for c in unique_prompts(**sizes) for token in c.turns[0].token_ids}
    assert min(drawn) >= FIRST_TOKEN
    assert max(drawn) < 40


def test_every_prompt_comes_once_before_any_repeats():
    asked = exact_repeats(num_prompts=3, repeats=2, prompt_lengths=(8, 16), new_tokens=1, vocab_size=100)
    prompts = [c.turns[0].token_ids for c in asked]
    assert [len(prompt) for prompt in prompts] == [8, 16, 8] * 3
    assert prompts[:3] == prompts[3:6] == prompts[6:]
    assert len(set(prompts)) == 3


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        unique_prompts(num_requests=1, prompt_tokens=1, new_tokens=1, vocab_size=FIRST_TOKEN)


def test_poisson_arrivals_keep_their_rate_and_seed():
    times = OpenLoop(rate_per_s=50.0, seed=1).times_s(5000)
    assert times == sorted(times)
    assert 5000 / times[-1] == pytest.approx(50.0, rel=0.05)
    assert times == OpenLoop(rate_per_s=50.0, seed=1).times_s(5000)


@pytest.mark.parametrize(
    "make", [lambda: ClosedLoop(0), lambda: OpenLoop(0.0), lambda: OpenLoop(float("nan"))]
)
def test_impossible_arrivals_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


async def test_closed_loop_keeps_its_concurrency_and_measures(service_and_target):
    service, target = service_and_target
    asked = unique_prompts(num_requests=12, prompt_tokens=9, new_tokens=7, vocab_size=400)
    records = await run_load(target, asked, ClosedLoop(4), num_connections=2)
    assert service.most_running <= 4
    assert sorted(service.prompts) == sorted(list(c.turns[0].token_ids) for c in asked)
    for record in records:
        assert record.error is None
        assert record.event_tokens == [2, 2, 2, 1]
        assert record.generated_tokens == 7
        assert record.usage.computed_prompt_tokens == 9
        assert 0 < record.first_token_s < record.total_s
        assert len(record.gaps_s()) == 3
    assert summarize(records).generated_tokens == 84


async def test_open_loop_counts_waiting_from_when_a_request_was_due(service_and_target):
    _, target = service_and_target
    asked = unique_prompts(num_requests=10, prompt_tokens=4, new_tokens=2, vocab_size=400)
    arrivals = OpenLoop(rate_per_s=500.0, seed=2)
    records = await run_load(target, asked, arrivals)
    due = sorted(record.scheduled_at_s for record in records)
    assert due == arrivals.times_s(10)
    assert all(record.started_at_s >= record.scheduled_at_s for record in records)


async def test_a_session_carries_its_answers_into_the_next_prompt(service_and_target):
    service, target = service_and_target
    asked = sessions(
        num_sessions=1, num_turns=3, system_tokens=10, turn_tokens=4, new_tokens=2, vocab_size=400
    )
    records = await run_load(target, asked, ClosedLoop(1))
    assert [record.prompt_tokens for record in records] == [14, 20, 26]
    first, second, third = service.prompts
    assert second[:14] == first
    assert second[14:16] == [7, 7]
    assert third[:20] == second


async def test_a_refusal_is_a_record_and_the_others_go_on(service_and_target):
    service, target = service_and_target
    asked = exact_repeats(num_prompts=2, repeats=0, prompt_lengths=(3,), new_tokens=2, vocab_size=400)
    service.refused_token = asked[0].turns[0].token_ids[0]
    records = sorted(
        await run_load(target, asked, ClosedLoop(2), timeout_s=5.0), key=lambda r: r.conversation
    )
    assert records[0].error.startswith("ResourceExhausted")
    assert records[1].error is None
    summary = summarize(records)
    assert (summary.requests, summary.failed, summary.errors) == (2, 1, {"ResourceExhausted": 1})
    assert summary.first_token_s.count == 1


async def test_the_command_writes_summary_and_records(service_and_target, tmp_path, capsys):
    _, target = service_and_target
    file = tmp_path / "out" / "run.json"
    command = ["run", "--target", target, "--groups", "2", "--requests", "3", "--shared", "16", "--own", "4"]
    status = await asyncio.to_thread(cli.main, [*command, "--new", "5", "--json", str(file)])
    assert status == 0
    report = json.loads(file.read_text())
    assert report["summary"]["requests"] == 6
    assert report["summary"]["generated_tokens"] == 30
    assert report["options"]["groups"] == 2
    assert len(report["records"]) == 6
    assert "6 requests in" in capsys.readouterr().out


def test_percentiles_lie_between_neighbours():
    assert percentile([1.0], 0.99) == 1.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def record_of(*, event_at_s, event_tokens):
    return Record(
        conversation=0,
        turn=0,
        group=0,
        scheduled_at_s=1.0,
        started_at_s=1.5,
        ended_at_s=4.0,
        prompt_tokens=3,
        generated_tokens=sum(event_tokens),
        event_at_s=event_at_s,
        event_tokens=event_tokens,
    )


def test_times_count_from_when_the_request_was_due():
    record = record_of(event_at_s=[2.0, 3.0, 4.0], event_tokens=[1, 4, 1])
    assert record.first_token_s == 1.0
    assert record.time_per_token_s == pytest.approx(0.4)
    assert record.gaps_s() == [1.0, 1.0]
    assert record.total_s == 3.0


def test_a_run_without_answers_still_has_a_summary():
    summary = summarize([record_of(event_at_s=[], event_tokens=[])])
    assert summary.first_token_s is None
    assert summary.time_per_token_s is None
    assert len(list(summary_lines(summary))) == 9
    assert summarize([]).requests == 0
