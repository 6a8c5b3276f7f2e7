"""The promise, with tiers below the device: tokens equal ``transformers`` ``generate``, whatever tiers do.

A real model with a device of few blocks, host memory and a real folder, step by step in this process; the
folder's files fail in every way that the disk tier has to live with. The engine's clock is injected: a
pause of ten seconds is ten seconds of that clock, and nobody sleeps.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvcore.codec import make_codec
from kvcore.tiers.disk import DiskTier
from kvcore.tiers.disk_files import Files
from kvcore.tiers.host import HostTier
from kvcore.tiers.stack import TierStack
from kvcore.tiers.worth import Worth
from server.engine.messages import GenerateSpec, Submit
from server.engine.options import EngineOptions
from server.engine.plan import KvTarget, StepPlan, StepResult
from server.engine.tiering.tiering import Tiering
from server.worker.runner import ModelRunner
from tests.faulty_files import FAULTS, FaultyFiles
from tests.model.families import VOCAB, greedy, save_tiny
from tests.model.test_exactness import NUM_NEW, Mix

HOST_BYTES = 40_000
DISK_BYTES = 8 << 20
RECOMPUTE_S = 0.5
"""What the engine is told that a prompt takes, so that it is patient enough to restore."""


class TieredMix(Mix):
    """A random campaign over an engine with tiers."""

    def __init__(
        self,
        runner: ModelRunner,
        options: EngineOptions,
        seed: int,
        folder: Path,
        *,
        codec: str,
        files: Files | None = None,
    ) -> None:
        super().__init__(runner, options, seed)
        object_format, worth = runner.object_format, Worth()
        worth.observe_recompute(32, 0, RECOMPUTE_S)

        def stack(part: str) -> TierStack:
            host = HostTier(object_format, HOST_BYTES, codec=make_codec(codec), clock=self.clock)
            disk = DiskTier(
                folder / part,
                object_format,
                DISK_BYTES,
                codec=make_codec(codec),
                clock=self.clock,
                files=files,
                num_readers=1,
            )
            return TierStack([host, disk], object_format, worth=worth, clock=self.clock)

        self.tiering = Tiering(
            self.scheduler.cache,
            blocks=stack("blocks"),
            tails=stack("tails"),
            object_format=object_format,
            worth=worth,
            clock=self.clock,
            mode="always",
        )
        self.scheduler.use_tiers(self.tiering)

    def close(self) -> None:
        self.tiering.blocks.check_integrity()
        self.tiering.tails.check_integrity()
        self.tiering.close()


class Bookkeeper:
    """A runner that remembers every payload that went out, and knows those that come in again."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.gone_out: set[bytes] = set()
        self.num_loads = 0
        self.num_strange = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.runner, name)

    def run(self, plan: StepPlan) -> StepResult:
        for load in plan.loads:
            self.num_loads += 1
            self.num_strange += bytes(load.payload) not in self.gone_out
        result = self.runner.run(plan)
        self.gone_out.update(bytes(payload) for payload in result.saved)
        for load in plan.loads:
            if load.target is KvTarget.BLOCK and not plan.sequences:
                assert self.runner.memory.save(load.index) in self.gone_out
        return result


def options_for(folder: Path, executor: str, dtype: str) -> EngineOptions:
    return EngineOptions(
        model=str(folder), dtype=dtype, device="cpu", executor=executor,
        block_size=4, num_blocks=24, max_batch_tokens=16, max_running=8, num_logits_slots=6, num_threads=1,
    )  # fmt: skip


def specs_of(mix: Mix) -> list[GenerateSpec]:
    """Return a mix that comes twice: what was pushed out in between is asked for again."""
    specs = [
        GenerateSpec(
            token_ids=prompt,
            max_new_tokens=NUM_NEW,
            num_samples=mix.dice.choice([1, 1, 1, 2]),
            use_kv_cache=mix.dice.random() > 0.1,
            read_prefix=mix.dice.random() > 0.1,
            write_prefix=mix.dice.random() > 0.1,
        )
        for prompt in mix.prompts()
    ]
    return specs + mix.dice.sample(specs, len(specs))


@contextmanager
def closing(mix: TieredMix) -> Iterator[TieredMix]:
    try:
        yield mix
    finally:
        mix.close()


@pytest.fixture(params=["native", "transformers"])
def executor(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        pytest.importorskip("server.worker.native.executor")
    return str(request.param)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_tokens_equal_transformers_with_tiers_and_after_a_restart(
    executor: str, codec: str, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    options = options_for(tmp_path / "model", executor, "float32")
    runner = ModelRunner.build(options)
    reference: dict[tuple[int, ...], list[int]] = {}
    restored = []
    for seed in (0, 0):  # the second one finds what the first one has left
        keeper = Bookkeeper(runner)
        mix = TieredMix(keeper, options, seed, tmp_path / "cache", codec=codec)  # type: ignore[arg-type]
        with closing(mix):
            specs = specs_of(mix)
            for spec in specs:
                key = tuple(spec.token_ids)
                reference.setdefault(key, greedy(model, list(key), NUM_NEW))
            mix.run(specs)
            mix.check(reference)
            restored.append(mix.scheduler.counters.restored_tokens)
    assert keeper.num_loads > 20
    assert restored[1] > 40, restored


def test_bfloat16_blocks_come_back_bit_for_bit(executor: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    options = options_for(tmp_path / "model", executor, "bfloat16")
    keeper = Bookkeeper(ModelRunner.build(options))
    restored = []
    for _ in range(2):  # the second one finds what the first one has left
        mix = TieredMix(keeper, options, 0, tmp_path / "cache", codec="zstd")  # type: ignore[arg-type]
        with closing(mix):
            mix.run(specs_of(mix))
            assert mix.finished == set(mix.specs)
            restored.append(mix.scheduler.counters.restored_tokens)
    assert restored[1] > 40, restored
    assert keeper.num_loads > 20
    assert keeper.num_strange == 0, "every byte that came in had gone out"


def flip(view: memoryview) -> None:
    if len(view):
        view[len(view) // 2] ^= 8


def shorten(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 300:
            os.truncate(path, path.stat().st_size // 2)


def unlink(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 300:
            path.unlink()


def fail_reads(files: FaultyFiles, _: Path) -> None:
    files.read_error = FAULTS["input/output error"]


def fail_writes(files: FaultyFiles, _: Path) -> None:
    files.write_error = FAULTS["disk full"]


def fail_opening(files: FaultyFiles, _: Path) -> None:
    files.open_error = FAULTS["too many open files"]


def damage(files: FaultyFiles, _: Path) -> None:
    files.damage = flip


FILE_FAULTS: dict[str, Callable[[FaultyFiles, Path], None]] = {
    "reads fail": fail_reads,
    "disk full": fail_writes,
    "no descriptors": fail_opening,
    "bit flipped": damage,
    "truncated": lambda _, folder: shorten(folder),
    "missing": lambda _, folder: unlink(folder),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_tokens_are_right_whatever_the_disk_does(fault: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    options = options_for(tmp_path / "model", "transformers", "float32")
    runner = ModelRunner.build(options)
    reference: dict[tuple[int, ...], list[int]] = {}
    for number in range(2):  # sound, then broken; the broken one stores something new, too
        files = FaultyFiles()
        mix = TieredMix(runner, options, 3, tmp_path / "cache", codec="none", files=files)
        new = [[9 + number] * 20]
        with closing(mix):
            specs = specs_of(mix) + [GenerateSpec(token_ids=p, max_new_tokens=NUM_NEW) for p in new]
            for spec in specs:
                key = tuple(spec.token_ids)
                reference.setdefault(key, greedy(model, list(key), NUM_NEW))
            if number == 1:
                FILE_FAULTS[fault](files, tmp_path / "cache")
            mix.run(specs)
            mix.check(reference)
            if number == 1:
                stats = [tier.stats() for s in (mix.tiering.blocks, mix.tiering.tails) for tier in s.tiers]
                troubles = sum(sum(s.failures.values()) + s.store_failures + s.refused_stores for s in stats)
                assert troubles > 0, "it was not even noticed"


def test_a_disk_that_hangs_delays_nobody_for_longer_than_computing_takes(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    options = options_for(tmp_path / "model", "transformers", "float32")
    runner = ModelRunner.build(options)
    dice = random.Random(5)
    prompt = [dice.randrange(3, VOCAB) for _ in range(33)]
    expected = greedy(model, prompt, NUM_NEW)
    spec = GenerateSpec(token_ids=prompt, max_new_tokens=NUM_NEW)
    first = TieredMix(runner, options, 0, tmp_path / "cache", codec="none")
    with closing(first):
        first.run([spec])
    files = FaultyFiles()
    second = TieredMix(runner, options, 0, tmp_path / "cache", codec="none", files=files)
    second.tiering.restorations._mode = "auto"
    files.may_read.clear()
    try:
        second.scheduler.submit(Submit(1, spec))
        began = second.clock.now()
        while second.scheduler.has_work and 1 not in second.finished:
            second.clock.advance(0.01)
            plan = second.scheduler.plan()
            if plan is not None:
                second.scheduler.apply(plan, runner.run(plan))
            second._take_events()
        took_s = second.clock.now() - began
    finally:
        files.may_read.set()
        second.close()
    assert second.drawn[1, 0] == expected
    steps_s = 0.01 * (NUM_NEW + 6)
    assert took_s < 2 * RECOMPUTE_S + 0.2 + steps_s, "recomputed after a bounded wait"
    report = second.scheduler.counters
    assert report.restored_tokens == 0
