"""The promise, with tiers below the device: tokens equal ``transformers`` ``generate``, whatever tiers do.

A real model with a device of few blocks, host memory and a real folder, step by step in this process; the
folder's files fail in every way that the disk tier has to live with. The engine's clock is injected: a
pause of ten seconds is ten seconds of that clock, and nobody sleeps. The tiers' threads are real, and every
few turns the clock waits for them: how much comes back does not depend on how fast they are.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedModel

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
from tests.tier_kit import SOON_S, until

HOST_BYTES = 40_000
DISK_BYTES = 8 << 20
TURNS_BETWEEN_RESTS = 3
"""Of 10 ms: less than the 50 ms that the engine gives tiers to say what they have."""
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

    def begin_turn(self, turn: int) -> None:
        """Let tiers finish what they have begun, now and then; in between things are on their way."""
        if turn % TURNS_BETWEEN_RESTS:
            return
        for stack in (self.tiering.blocks, self.tiering.tails):
            until(partial(is_at_rest, stack), "the tiers' rest")

    def close(self) -> None:
        self.tiering.blocks.check_integrity()
        self.tiering.tails.check_integrity()
        self.tiering.close()


def is_at_rest(stack: TierStack) -> bool:
    """Take what tiers have brought; say whether they are still writing or bringing anything."""
    for tier in stack.tiers:
        workers = tier._workers  # type: ignore[attr-defined]
        if workers is not None:
            written = threading.Event()
            assert workers.submit_write(written.set)  # behind all that was handed over
            assert written.wait(SOON_S)
    stack.poll()
    return not stack.arrivals.outstanding_bytes.total()


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint, and what ``transformers`` itself makes of prompts: computed once for every test here."""

    folder: Path
    model: PreTrainedModel
    told: dict[tuple[int, ...], list[int]]

    def reference(self, specs: Iterable[GenerateSpec]) -> dict[tuple[int, ...], list[int]]:
        """Return what it says to these prompts, among others."""
        for spec in specs:
            prompt = tuple(spec.token_ids)
            if prompt not in self.told:
                self.told[prompt] = greedy(self.model, list(prompt), NUM_NEW)
        return self.told


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("model")
    return TinyModel(folder, save_tiny("llama", folder), {})


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
    tiny: TinyModel, executor: str, codec: str, tmp_path: Path
) -> None:
    options = options_for(tiny.folder, executor, "float32")
    runner = ModelRunner.build(options)
    restored = []
    for seed in (0, 0):  # the second one finds what the first one has left
        keeper = Bookkeeper(runner)
        mix = TieredMix(keeper, options, seed, tmp_path / "cache", codec=codec)  # type: ignore[arg-type]
        with closing(mix):
            specs = specs_of(mix)
            mix.run(specs)
            mix.check(tiny.reference(specs))
            restored.append(mix.scheduler.counters.restored_tokens)
    assert keeper.num_loads > 20
    assert restored[1] > 40, restored


def test_bfloat16_blocks_come_back_bit_for_bit(tiny: TinyModel, executor: str, tmp_path: Path) -> None:
    options = options_for(tiny.folder, executor, "bfloat16")
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


@dataclass(frozen=True)
class Left:
    """A runner, and the disk cache of a campaign that went well."""

    options: EngineOptions
    runner: ModelRunner
    folder: Path


def campaign(left: Left, tiny: TinyModel, folder: Path, *, new: int, fault: str | None = None) -> TieredMix:
    """Run the campaign over a folder, with one prompt of its own; return it, closed.

    The fault comes when the folder is open.
    """
    files = FaultyFiles()
    mix = TieredMix(left.runner, left.options, 3, folder, codec="none", files=files)
    if fault is not None:
        FILE_FAULTS[fault](files, folder)
    specs = [*specs_of(mix), GenerateSpec(token_ids=[new] * 20, max_new_tokens=NUM_NEW)]
    with closing(mix):
        mix.run(specs)
        mix.check(tiny.reference(specs))
    return mix


@pytest.fixture(scope="module")
def left(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Left:
    options = options_for(tiny.folder, "transformers", "float32")
    left = Left(options, ModelRunner.build(options), tmp_path_factory.mktemp("left"))
    campaign(left, tiny, left.folder, new=9)
    return left


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_tokens_are_right_whatever_the_disk_does(
    left: Left, tiny: TinyModel, fault: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(left.folder, tmp_path / "cache"))
    mix = campaign(left, tiny, folder, new=10, fault=fault)
    stats = [tier.stats() for s in (mix.tiering.blocks, mix.tiering.tails) for tier in s.tiers]
    troubles = sum(sum(s.failures.values()) + s.store_failures + s.refused_stores for s in stats)
    assert troubles > 0, "it was not even noticed"


def test_a_disk_that_hangs_delays_nobody_for_longer_than_computing_takes(
    left: Left, tiny: TinyModel, tmp_path: Path
) -> None:
    options, runner = left.options, left.runner
    dice = random.Random(5)
    prompt = [dice.randrange(3, VOCAB) for _ in range(33)]
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
    assert second.drawn[1, 0] == tiny.reference([spec])[tuple(prompt)]
    steps_s = 0.01 * (NUM_NEW + 6)
    assert took_s < 2 * RECOMPUTE_S + 0.2 + steps_s, "recomputed after a bounded wait"
    report = second.scheduler.counters
    assert report.restored_tokens == 0
