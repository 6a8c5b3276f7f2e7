"""Greedy output over paged KV equals transformers' ``generate``, token for token, family by family."""

from __future__ import annotations

import random

import pytest
import torch

from server.engine.options import EngineOptions
from server.worker.attention.grouped import GroupedAttention
from server.worker.attention.reference import ReferenceAttention
from server.worker.runner import ModelRunner
from tests.campaigns import cases
from tests.model.driver import generate
from tests.model.families import CONFIGS, VOCAB, greedy, save_tiny

torch.set_num_threads(2)

NUM_SHARED, NUM_NEW = 19, 12


def prompts_of(seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    shared = [dice.randrange(3, VOCAB) for _ in range(NUM_SHARED)]
    return [shared + [dice.randrange(3, VOCAB) for _ in range(n)] for n in (2, 9, 23)]


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_equals_generate(family, tmp_path):
    model = save_tiny(family, tmp_path)
    options = EngineOptions(
        model=str(tmp_path),
        dtype="float32",
        executor="transformers",
        block_size=4,
        num_blocks=96,
        num_threads=2,
    )
    runner = ModelRunner.build(options)
    assert runner.describe().family == family
    prompts = prompts_of(seed=1)
    expected = [greedy(model, prompt, NUM_NEW) for prompt in prompts]
    assert len({tuple(e) for e in expected}) == 3, "a degenerate model would prove nothing"
    for seed in range(cases(1, full=2)):
        assert generate(runner, prompts, NUM_NEW, num_shared=NUM_SHARED, seed=seed) == expected


@pytest.mark.parametrize("backend", [ReferenceAttention(), GroupedAttention()], ids=lambda b: b.name)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral", "deepseek_v3"])
def test_every_attention_gives_the_same_tokens(family, backend, tmp_path, monkeypatch):
    monkeypatch.setattr("server.worker.executors._choose_attention", lambda *_: (backend, []))
    model = save_tiny(family, tmp_path)
    runner = ModelRunner.build(
        EngineOptions(
            model=str(tmp_path),
            dtype="float32",
            executor="transformers",
            block_size=4,
            num_blocks=96,
            num_threads=2,
        )
    )
    assert runner.describe().attention == backend.name
    prompts = prompts_of(seed=3)
    expected = [greedy(model, prompt, NUM_NEW) for prompt in prompts]
    assert generate(runner, prompts, NUM_NEW, num_shared=NUM_SHARED, seed=4) == expected


def test_attention_that_fails_the_probe_gives_way_to_torch(tmp_path, monkeypatch):
    class Wrong(ReferenceAttention):
        name = "wrong"

        def attend(self, query, memory, batch, spec):
            return super().attend(query, memory, batch, spec) * 0.5

    monkeypatch.setattr("server.worker.executors._choose_attention", lambda *_: (Wrong(), []))
    save_tiny("llama", tmp_path)
    runner = ModelRunner.build(
        EngineOptions(
            model=str(tmp_path), dtype="float32", executor="transformers", num_blocks=8, num_threads=2
        )
    )
    ready = runner.describe()
    assert ready.attention == "torch"
    assert any("wrong failed its check" in note for note in ready.notes)
