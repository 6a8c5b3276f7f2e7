"""The worker as the engine sees it: plans in, tokens out."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from server.engine.options import EngineOptions
from server.engine.plan import BlockCopy, SamplingSpec, SequencePlan, StepPlan
from server.worker.errors import WorkerStartError
from server.worker.runner import ModelRunner, choose_num_threads
from tests.model.driver import generate
from tests.model.families import VOCAB, greedy, save_tiny

torch.set_num_threads(2)

GREEDY = SamplingSpec()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama", folder)
    return folder


@pytest.fixture(scope="module")
def model():
    from tests.model.families import tiny_model

    return tiny_model("llama")


def options(folder, **changes):
    values = {
        "dtype": "float32",
        "executor": "transformers",
        "block_size": 4,
        "num_blocks": 96,
        "num_threads": 2,
    }
    return EngineOptions(model=str(folder), **{**values, **changes})


@pytest.fixture(scope="module")
def runner(folder):
    return ModelRunner.build(options(folder))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, VOCAB) for _ in range(length)]


def run_one(runner, computed, tokens, blocks, **rest):
    plan = StepPlan(7, [SequencePlan(1, computed, tokens, array("i", blocks), **rest)])
    result = runner.run(plan)
    assert result.step_id == 7
    return result


def test_exact_repeat_needs_no_forward(runner, model):
    prompt = prompt_of(10)
    first = run_one(runner, 0, prompt, [3, 4, 5], sampling=GREEDY, save_logits_to=2).sampled[0]
    assert first is not None
    assert first.token_id == greedy(model, prompt, 1)[0]
    calls = []
    forward = runner._executor.forward

    def counted(batch):
        calls.append(batch)
        return forward(batch)

    runner._executor.forward = counted
    try:
        repeat = run_one(runner, 10, [], [3, 4, 5], sampling=GREEDY, logits_from=2)
    finally:
        runner._executor.forward = forward
    assert repeat.sampled == [first]
    assert calls == []


def test_logits_are_saved_before_they_are_drawn_from(runner):
    prompt = prompt_of(6, seed=1)
    plan = StepPlan(
        1,
        [
            SequencePlan(1, 6, [], array("i", [8, 9]), GREEDY, logits_from=5),
            SequencePlan(2, 0, prompt, array("i", [8, 9]), GREEDY, save_logits_to=5),
            SequencePlan(3, 0, prompt[:3], array("i", [7]), None),
        ],
    )
    sampled = runner.run(plan).sampled
    assert sampled[0] is not None
    assert sampled[0] == sampled[1]
    assert sampled[2] is None


def test_copied_partial_block_goes_on_as_if_computed(runner, model):
    prompt = prompt_of(7, seed=2)
    run_one(runner, 0, prompt[:6], [20, 21])
    expected = greedy(model, prompt, 1)[0]
    runner.memory.storage[30] = float("nan")  # left by a request that failed
    plan = StepPlan(
        1,
        [SequencePlan(1, 6, prompt[6:], array("i", [20, 30]), GREEDY)],
        copies=[BlockCopy(21, 30, 2)],
    )
    sampled = runner.run(plan).sampled[0]
    assert sampled is not None
    assert sampled.token_id == expected


def test_block_begun_anew_forgets_what_failed_in_it(runner, model):
    prompt = prompt_of(5, seed=3)
    runner.memory.storage[[40, 41]] = float("nan")
    sampled = run_one(runner, 0, prompt, [40, 41], sampling=GREEDY).sampled[0]
    assert sampled is not None
    assert sampled.token_id == greedy(model, prompt, 1)[0]


def test_sequence_with_broken_kv_fails_alone(runner, model):
    good, bad = prompt_of(9, seed=4), prompt_of(9, seed=5)
    run_one(runner, 0, good[:8], [50, 51])
    run_one(runner, 0, bad[:8], [54, 55])
    runner.memory.storage[54, 0, 1, 2] = float("nan")
    plan = StepPlan(
        1,
        [
            SequencePlan(1, 8, bad[8:], array("i", [54, 55, 56]), GREEDY),
            SequencePlan(2, 8, good[8:], array("i", [50, 51, 52]), GREEDY),
        ],
    )
    result = runner.run(plan)
    assert list(result.failed) == [1]
    assert "not finite" in result.failed[1]
    assert result.sampled[0] is None
    assert result.sampled[1] is not None
    assert result.sampled[1].token_id == greedy(model, good, 1)[0]
    runner.memory.clear([54, 55, 56])


def test_sequence_to_sample_from_nothing_is_the_engines_mistake(runner):
    with pytest.raises(ValueError, match="without tokens"):
        run_one(runner, 4, [], [1], sampling=GREEDY)


def test_timings_and_description(runner):
    result = run_one(runner, 0, prompt_of(3), [1], sampling=GREEDY)
    assert result.forward_s > 0
    assert result.sample_s > 0
    ready = runner.describe()
    assert ready.executor == "transformers"
    assert ready.vocab_size == VOCAB
    assert ready.max_model_length == 256
    assert ready.num_blocks == runner.num_blocks == 96
    assert ready.bytes_per_block == 3 * 2 * 4 * 2 * 8 * 4
    assert ready.num_threads == 2
    assert ready.load_s > 0
    assert runner.num_logits_slots == 1024
    assert runner.eos_token_ids == (1,)


def test_seeded_sampling_does_not_depend_on_the_batch(folder):
    runner = ModelRunner.build(options(folder, executor="auto"))
    spec = SamplingSpec(temperature=1.0, top_p=0.95, seed=9)
    prompts = [prompt_of(n, seed=n) for n in (5, 9, 13)]

    def sampled(*chosen):
        plan = StepPlan(
            1,
            [
                SequencePlan(i, 0, prompts[i], array("i", range(8 * i, 8 * i + 4)), spec, len(prompts[i]))
                for i in chosen
            ],
        )
        return [token.token_id for token in runner.run(plan).sampled if token is not None]

    together = sampled(0, 1, 2)
    assert [*sampled(0), *sampled(1), *sampled(2)] == together
    assert sampled(2, 0) == [together[2], together[0]]


@pytest.mark.parametrize("executor", ["auto", "transformers"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_any_block_size_generates_the_same(folder, model, executor, block_size):
    blocks = 400 if block_size == 1 else 32
    runner = ModelRunner.build(options(folder, executor=executor, block_size=block_size, num_blocks=blocks))
    shared = prompt_of(33)
    prompts = [shared + prompt_of(n, seed=n) for n in (1, 4, 17)]
    expected = [greedy(model, prompt, 8) for prompt in prompts]
    assert generate(runner, prompts, 8, num_shared=33, seed=5) == expected


def test_bfloat16_builds_and_generates(folder):
    runner = ModelRunner.build(options(folder, dtype="bfloat16", executor="auto"))
    assert runner.describe().dtype == "bfloat16"
    (drawn,) = generate(runner, [prompt_of(11)], 6)
    assert len(drawn) == 6


def test_too_few_blocks_are_refused(folder):
    with pytest.raises(WorkerStartError, match="at least 4"):
        ModelRunner.build(options(folder, num_blocks=3))
    with pytest.raises(WorkerStartError, match="at least 4"):
        ModelRunner.build(options(folder, num_blocks=None, kv_memory_bytes=3 * 1536 + 1535))
    runner = ModelRunner.build(options(folder, num_blocks=None, kv_memory_bytes=5 * 1536))
    assert runner.num_blocks == 5


def test_unknown_executor_is_refused(folder):
    with pytest.raises(WorkerStartError, match="not one of"):
        ModelRunner.build(options(folder, executor="warp"))


def test_native_by_name_is_refused_where_it_does_not_know_the_model(tmp_path):
    save_tiny("gpt2", tmp_path)
    with pytest.raises(WorkerStartError, match="native"):
        ModelRunner.build(options(tmp_path, executor="native"))


def test_one_core_is_left_for_the_front_end(monkeypatch):
    assert choose_num_threads(3) == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert choose_num_threads(None) == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert choose_num_threads(None) == 1
