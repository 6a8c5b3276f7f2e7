"""The promise: greedy float32 output equals ``transformers`` ``generate``, whatever cache and scheduler did.

A real model and the real scheduler, step by step in this process, over random mixes: prompts that are shared,
nested, repeated and unique, arrivals in between, small budgets that cut prompts into chunks, pools so small
that sequences are preempted and blocks evicted, cancellations, several samples, cache options.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from kvcore.clock import ManualClock
from server.engine.messages import Cancel, Finished, GenerateSpec, Submit, Tokens
from server.engine.options import EngineOptions
from server.engine.scheduler import Scheduler
from server.worker.runner import ModelRunner
from tests.model.families import VOCAB, greedy, save_tiny

FAMILIES = ["llama", "qwen3", "gemma3_text", "mistral", "gpt2", "phi3"]
NUM_NEW = 12
NUM_REQUESTS = 24


class Mix:
    """One random campaign over one engine."""

    def __init__(self, runner: ModelRunner, options: EngineOptions, seed: int) -> None:
        self.runner = runner
        self.clock = ManualClock()
        self.scheduler = Scheduler(
            options,
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
            num_logits_slots=runner.num_logits_slots,
            clock=self.clock,
        )
        self.dice = random.Random(seed)
        self.specs: dict[int, GenerateSpec] = {}
        self.drawn: dict[tuple[int, int], list[int]] = {}
        self.finished: set[int] = set()
        self.cancelled: set[int] = set()

    def prompts(self) -> list[list[int]]:
        """Return prompts in the relations that traffic has."""
        dice = self.dice
        shared = [dice.randrange(3, VOCAB) for _ in range(21)]
        nested = shared + [dice.randrange(3, VOCAB) for _ in range(9)]
        made: list[list[int]] = []
        for _ in range(NUM_REQUESTS):
            kind = dice.choice(["shared", "nested", "repeated", "unique", "cut"])
            own = [dice.randrange(3, VOCAB) for _ in range(dice.randint(1, 9))]
            if kind == "repeated" and made:
                made.append(list(dice.choice(made)))
            elif kind == "cut" and made:
                made.append((source := dice.choice(made))[: dice.randint(1, len(source))])
            else:
                made.append({"shared": shared + own, "nested": nested + own}.get(kind, own * 2))
        return made

    def run(self, specs: list[GenerateSpec]) -> None:
        """Submit over time, cancel now and then, and step until everything has ended."""
        waiting = list(enumerate(specs, start=1))
        for turn in range(4000):
            self.clock.advance(0.01)
            self.begin_turn(turn)
            while waiting and self.dice.random() < 0.5:
                key, spec = waiting.pop(0)
                self.specs[key] = spec
                self.scheduler.submit(Submit(key, spec))
            if self.specs and self.dice.random() < 0.03:
                key = self.dice.choice(list(self.specs))
                self.cancelled.add(key)
                self.scheduler.cancel(Cancel(key))
            plan = self.scheduler.plan()
            if plan is not None:
                self.scheduler.apply(plan, self.runner.run(plan))
            self._take_events()
            if not waiting and not self.scheduler.has_work:
                break
        self.scheduler.check_integrity()

    def begin_turn(self, turn: int) -> None:
        """Do what is to be done before each step, beyond moving the clock: nothing here."""

    def _take_events(self) -> None:
        for event in self.scheduler.drain_events():
            if isinstance(event, Tokens):
                self.drawn.setdefault((event.key, event.sample_index), []).extend(event.token_ids)
            elif isinstance(event, Finished):
                self.finished.add(event.key)

    def check(self, reference: dict[tuple[int, ...], list[int]]) -> None:
        """Compare every token drawn, of cancelled requests too."""
        assert self.finished == set(self.specs)
        for key, spec in self.specs.items():
            expected = reference[tuple(spec.token_ids)]
            for sample in range(spec.num_samples):
                drawn = self.drawn.get((key, sample), [])
                assert drawn == expected[: len(drawn)], f"request {key}, sample {sample}"
                assert key in self.cancelled or len(drawn) == NUM_NEW
        stats = self.scheduler.stats()
        assert stats.num_blocks_leased == 0


def _reference(model: PreTrainedModel, prompts: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    return {tuple(p): greedy(model, p, NUM_NEW) for p in prompts}


def _executors(family: str) -> list[str]:
    return ["native", "transformers"] if family in ("llama", "qwen3", "mistral") else ["transformers"]


@pytest.mark.parametrize(("family", "executor"), [(f, e) for f in FAMILIES for e in _executors(f)])
def test_greedy_equals_transformers_over_random_mixes(family: str, executor: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path, **({"head_dim": 16} if family == "qwen3" else {}))
    if executor == "native":
        pytest.importorskip("server.worker.native.executor")
    options = EngineOptions(
        model=str(tmp_path), dtype="float32", device="cpu", executor=executor,
        block_size=4, num_blocks=24, max_batch_tokens=16, max_running=8, num_logits_slots=6, num_threads=1,
    )  # fmt: skip
    runner = ModelRunner.build(options)
    preemptions = evictions = tails = grouped = 0
    for seed in range(2):
        mix = Mix(runner, options, seed)
        prompts = mix.prompts()
        specs = [
            GenerateSpec(
                token_ids=prompt,
                max_new_tokens=NUM_NEW,
                num_samples=mix.dice.choice([1, 1, 1, 2]),
                use_kv_cache=mix.dice.random() > 0.1,
                read_prefix=mix.dice.random() > 0.1,
                write_prefix=mix.dice.random() > 0.1,
            )
            for prompt in prompts
        ]
        mix.run(specs)
        mix.check(_reference(model, prompts))
        stats = mix.scheduler.stats()
        preemptions += stats.preemptions
        evictions += stats.evicted_blocks
        tails += stats.cached_tail_tokens
        grouped += stats.grouped_tokens
    exercised = {"preemptions": preemptions, "evictions": evictions, "tails": tails, "grouped": grouped}
    assert all(exercised.values()), exercised


def test_seeded_sampling_is_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    options = EngineOptions(
        model=str(tmp_path),
        dtype="float32",
        device="cpu",
        block_size=4,
        num_blocks=200,
        max_batch_tokens=32,
        num_threads=1,
    )
    runner = ModelRunner.build(options)
    specs = [
        GenerateSpec(
            token_ids=[5, 6, 7, 8, 9, 10][: 3 + index % 4],
            max_new_tokens=NUM_NEW,
            num_samples=1 + index % 2,
            temperature=0.8,
            top_p=0.9,
            top_k=40,
            repetition_penalty=1.1,
            seed=index,
        )
        for index in range(12)
    ]
    together = Mix(runner, options, seed=0)
    together.dice = random.Random(7)
    for key, spec in enumerate(specs, start=1):
        together.scheduler.submit(Submit(key, spec))
    while (plan := together.scheduler.plan()) is not None:
        together.scheduler.apply(plan, runner.run(plan))
        together._take_events()
    for key, spec in enumerate(specs, start=1):
        alone = Mix(runner, options, seed=0)
        alone.scheduler.submit(Submit(key, spec))
        while (plan := alone.scheduler.plan()) is not None:
            alone.scheduler.apply(plan, runner.run(plan))
            alone._take_events()
        assert {s: t for (k, s), t in together.drawn.items() if k == key} == {
            s: t for (_, s), t in alone.drawn.items()
        }
    assert len({tuple(t) for t in together.drawn.values()}) > 6, "sampling hardly varied"
