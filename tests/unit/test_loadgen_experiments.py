"""The benchmark compares like with like, and says so."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from loadgen.cli import make_parser, make_workload
from loadgen.experiments.figures import Figure, Report, markdown_lines
from loadgen.experiments.plan import PLANS, TARGETS, continuous_candidates, generate_candidates
from loadgen.experiments.shapes import SHAPES, write_model_folder
from loadgen.experiments.throughput import WORKLOADS


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
