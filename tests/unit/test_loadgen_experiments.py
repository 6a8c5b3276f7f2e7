"""The benchmark compares like with like, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen.bench import EXPERIMENTS, LONG_MODEL_LENGTH, Bench
from loadgen.cli import make_parser, make_workload
from loadgen.experiments.asking import draw_tokens
from loadgen.experiments.crossover import (
    ALWAYS,
    NEVER,
    LengthTimes,
    measured_crossover,
    share_decided_right,
)
from loadgen.experiments.figures import Figure, Report, markdown_lines
from loadgen.experiments.machine import Limits
from loadgen.experiments.plan import PLANS, TARGETS, continuous_candidates, generate_candidates
from loadgen.experiments.policies import Simulated, measure_policies, policy_table
from loadgen.experiments.prefetch import replay_sessions
from loadgen.experiments.processes import ProcessFailed
from loadgen.experiments.shapes import SHAPES, write_model_folder
from loadgen.experiments.throughput import WORKLOADS
from loadgen.experiments.tier_places import PLACES, ExperimentSkipped, drop_from_page_cache


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_the_peer_gets_the_very_prompts_that_loadgen_sends(workload):
    shape = SHAPES["smollm2-135m"]
    options = make_parser().parse_args(["run", *workload.arguments(seed=3)])
    sent = [list(c.turns[0].token_ids) for c in make_workload(options, shape.vocab_size)]
    assert workload.prompts(shape, seed=3) == sent
    assert options.concurrency == workload.concurrency
    assert {c.turns[0].max_new_tokens for c in make_workload(options, 1000)} == {workload.new_tokens}


def test_every_repeat_draws_new_prompts():
    workload, shape = WORKLOADS["4 groups x 8 at 8"], SHAPES["smollm2-135m"]
    first, second = ({tuple(p[:512]) for p in workload.prompts(shape, seed)} for seed in (1, 2))
    assert len(first) == len(second) == 4
    assert not first & second


def test_shapes_have_the_weights_of_the_models_they_are_named_after():
    # SmolLM2-135M has 134.5 million parameters, TinyLlama 1,100 million of which the input embedding is
    # only indexed.
    assert SHAPES["smollm2-135m"].weights_read_per_step == pytest.approx(134.5e6, rel=0.001)
    assert SHAPES["tinyllama-1.1b"].weights_read_per_step == pytest.approx(1100e6 - 32000 * 2048, rel=0.001)


def test_a_model_folder_holds_its_configuration(tmp_path):
    folder = write_model_folder(SHAPES["tiny"], tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == 64


@pytest.mark.parametrize("mode", PLANS)
def test_a_plan_names_shapes_and_workloads_that_exist(mode):
    plan = PLANS[mode]
    assert set(plan.shapes) == set(plan.workloads)
    assert set(plan.shapes) <= set(SHAPES)
    assert {name for names in plan.workloads.values() for name in names} <= set(WORKLOADS)
    assert plan.trial_workload in WORKLOADS
    assert set(plan.tiers.places) <= set(PLACES)


def test_every_target_belongs_to_a_workload():
    for by_workload in TARGETS.values():
        assert set(by_workload) <= set(WORKLOADS)


def test_peers_are_tried_in_float32_where_bfloat16_has_no_instructions():
    assert {s.dtype for s in generate_candidates(4, "AVX512")} == {"bfloat16"}
    assert {s.dtype for s in generate_candidates(4, "AVX2")} == {"bfloat16", "float32"}


def test_continuous_batching_is_tried_like_the_best_generate_unless_thorough():
    best = generate_candidates(4, "AVX512")[1]
    quick = continuous_candidates(4, "AVX512", is_thorough=False, like=best)
    assert {s.threads for s in quick} == {best.threads}
    assert {s.attention for s in quick} == {"sdpa", "paged|eager"}
    thorough = continuous_candidates(4, "AVX512", is_thorough=True, like=best)
    assert {s.threads for s in thorough} == {3, 4}
    assert {s.page_size for s in thorough} == {16, 32, 256}
    assert {s.threads for s in generate_candidates(1, "AVX512")} == {1}


def figure(**changes: Any) -> Figure:
    plain = Figure(experiment="e", shape="s", name="n", value=2.0, unit="x")
    return msgspec.structs.replace(plain, **changes)


def test_targets_bound_from_below_or_above():
    assert figure().is_met is None
    assert figure(target=2.0).is_met
    assert not figure(target=2.1).is_met
    assert figure(target=2.0, lower_is_better=True).is_met
    assert not figure(target=1.9, lower_is_better=True).is_met


def test_the_report_says_what_was_missed_and_what_was_not_measured():
    report = Report(
        started_at="today",
        mode="quick",
        machine={"cores": 4},
        figures=[figure(target=3.0, ours=10.0, other=5.0, other_name="tokens/s")],
        problems=["decode: no server"],
    )
    text = "\n".join(markdown_lines(report))
    assert "**missed**" in text
    assert "5 tokens/s" in text
    assert "- decode: no server" in text


def test_what_was_left_out_is_told_apart_from_what_failed():
    report = Report(
        started_at="today",
        mode="quick",
        machine={},
        problems=["decode: no server"],
        skipped=["policies: no trace"],
    )
    lines = list(markdown_lines(report))
    assert lines.index("- decode: no server") < lines.index("Left out:") < lines.index("- policies: no trace")
    assert "Left out:" not in list(markdown_lines(msgspec.structs.replace(report, skipped=[])))


def test_tables_stand_under_their_experiment():
    report = Report(started_at="today", mode="quick", machine={}, tables={"policies": "| a |\n|---|"})
    assert "## policies\n\n| a |\n|---|" in "\n".join(markdown_lines(report))


# ---- tiers ----


def times(*rows: tuple[int, float, float], decisions: tuple[str, ...] = ()) -> list[LengthTimes]:
    return [LengthTimes(length, restore, recompute, decisions) for length, restore, recompute in rows]


def test_the_crossover_lies_between_the_lengths_where_the_faster_way_changes():
    # 1 ms behind at 100 tokens, 3 ms ahead at 500: equal after a quarter of the way.
    assert measured_crossover(times((100, 3.0, 2.0), (500, 5.0, 8.0))) == pytest.approx(200.0)


def test_the_crossover_is_where_restoring_stays_faster():
    lucky_at_first = times((16, 1.0, 2.0), (100, 3.0, 2.0), (300, 4.0, 5.0), (900, 5.0, 9.0))
    assert measured_crossover(lucky_at_first) == pytest.approx(200.0)


def test_a_crossover_outside_of_what_was_measured_has_no_number():
    assert measured_crossover(times((16, 1.0, 2.0), (128, 1.0, 9.0))) == ALWAYS
    assert measured_crossover(times((16, 3.0, 2.0), (128, 19.0, 9.0))) == NEVER


def test_every_length_counts_alike_among_decisions():
    right_half_the_time = times((16, 1.0, 2.0), decisions=("fetch", "recompute"))
    always_right = times((32, 3.0, 2.0), decisions=("recompute",) * 8)
    always_wrong = times((64, 3.0, 4.0), decisions=("recompute",))
    never_asked = times((128, 3.0, 4.0))
    rows = [*right_half_the_time, *always_right, *always_wrong, *never_asked]
    assert share_decided_right(rows) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="nothing was decided"):
        share_decided_right(never_asked)


@pytest.mark.parametrize("mode", PLANS)
def test_prefixes_are_whole_blocks_in_rising_order_and_leave_room_for_a_question(mode):
    lengths = PLANS[mode].tiers.lengths
    assert list(lengths) == sorted(set(lengths))
    assert all(length % 16 == 0 for length in lengths)
    assert lengths[-1] + 256 <= LONG_MODEL_LENGTH


def test_full_mode_covers_what_the_table_promises():
    tiers = PLANS["full"].tiers
    assert {128, 256, 512, 1024, 2048, 4096} <= set(tiers.lengths)
    assert {PLACES[name].tier for name in tiers.places} == {"host", "disk", "redis"}
    assert "zstd" in {PLACES[name].codec for name in tiers.places}
    assert PLANS["full"].restart_tokens == 1024


def test_prompts_repeat_by_their_seed():
    first = draw_tokens(64, vocab_size=512, seed="prefix 64 0")
    assert first == draw_tokens(64, vocab_size=512, seed="prefix 64 0")
    assert first[:16] != draw_tokens(64, vocab_size=512, seed="prefix 64 1")[:16]
    assert all(16 <= token < 512 for token in first)


def test_without_redis_the_experiment_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExperimentSkipped, match="redis-server"), PLACES["redis"].open(tmp_path):
        pass


def test_dropping_files_from_the_page_cache_leaves_them_as_they_are(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "block").write_bytes(b"kv" * 5000)
    drop_from_page_cache(tmp_path)
    assert (tmp_path / "deep" / "block").read_bytes() == b"kv" * 5000


# ---- traces ----


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Sixty requests over ten prefixes, two blocks each."""
    lines = [
        {
            "timestamp": 1000 * number,
            "input_length": 1024,
            "output_length": 8,
            "hash_ids": [number * 7 % 10, 100 + number * 7 % 10],
        }
        for number in range(60)
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_policies_stand_beside_lru_and_the_bound_at_every_size(trace):
    figures, details = measure_policies(trace, capacities=(4096, 1 << 20), timeout_s=60.0)
    table: Any = details["table"]
    assert {"lru", "best", "optimal", "arc", "s3fifo"} <= set(table)
    assert {len(rows) for rows in table.values()} == {2}
    small, large = figures[:2]
    assert small.target == table["lru"][0].token_hit_rate
    assert small.other == table["optimal"][0].token_hit_rate
    # Room for all: ten prefixes are computed once, fifty requests find theirs.
    assert large.value == large.other == large.target == pytest.approx(100 * 50 / 60, abs=0.01)


def test_policies_are_a_table():
    def row(policy: str, size: int, rate: float) -> Simulated:
        return Simulated(
            policy=policy, capacity_tokens=size, token_hit_rate=rate, request_hit_rate=0.0, events_per_s=9e4
        )

    text = policy_table({"lru": [row("lru", 260_000, 12.34), row("lru", 3_000_000, 31.5)]})
    assert text.splitlines()[0] == "| token hit rate, % | 0.26 M | 3.00 M | events/s |"
    assert text.splitlines()[2] == "| lru | 12.3 | 31.5 | 90,000 |"


def test_a_trace_that_cannot_be_read_is_a_failure_with_a_reason(tmp_path):
    with pytest.raises(ProcessFailed, match=r"kvcore\.simulate"):
        measure_policies(tmp_path / "nowhere.jsonl", timeout_s=60.0)


def test_a_folder_without_sessions_is_a_failure_with_a_reason(tmp_path):
    with pytest.raises(ProcessFailed, match="no recorded sessions"):
        replay_sessions(tmp_path, seeds=1)


def test_sessions_that_cannot_be_read_are_a_failure_with_a_reason(tmp_path):
    (tmp_path / "one.json").write_text("not a session")
    with pytest.raises(ProcessFailed, match=r"the replay failed: .+"):
        replay_sessions(tmp_path, seeds=1)


LIMITS = Limits(
    cores=1,
    torch_version="",
    torch_capability="",
    read_bytes_per_s=1.0,
    read_kernel="",
    float32_flops=1.0,
    bfloat16_flops=1.0,
)


def test_without_traces_the_bench_goes_on_and_says_what_it_left_out(tmp_path):
    bench = Bench(PLANS["smoke"], mode="smoke", folder=tmp_path, limits=LIMITS, server_arguments=[])
    bench.run_traces(trace=None, sessions=None, only=set(EXPERIMENTS))
    assert [reason.partition(":")[0] for reason in bench.report.skipped] == [
        "prefetch for sessions, replay",
        "eviction policies",
    ]
    assert not bench.report.problems
    bench.write(tmp_path / "out")
    assert "--trace" in (tmp_path / "out" / "bench.md").read_text()
