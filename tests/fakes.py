"""A worker without a model, an engine around it, and an engine process around that.

``python -m tests.fakes --fd N`` is an engine process like ``server.engine_main``, with :class:`FakeRunner` in
the model's place. In a process the test cannot reach the runner, so prompts carry the orders: a prompt that
holds one of the ``Poison`` tokens makes the step that computes it misbehave. ``EngineOptions.model`` decides
about starting: "fake" works, "fake:refuse" raises a typed error, "fake:die" kills itself, "fake:hang" never
becomes ready, "fake:once:PATH" works only as long as there is no file PATH, which it makes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from enum import IntEnum
from pathlib import Path

from kvcore.clock import Clock, MonotonicClock
from server.engine.fake import fake_ready
from server.engine.local import LocalEngine
from server.engine.loop import EngineParts
from server.engine.messages import GenerateSpec
from server.engine.options import EngineOptions
from server.engine.plan import StepPlan, StepResult
from server.engine.scheduler import Scheduler
from server.engine.serve import serve
from tests.chain_runner import ChainRunner, expected_tokens

__all__ = [
    "VOCAB_SIZE",
    "FakeLoadError",
    "FakeRunner",
    "Poison",
    "expected",
    "fake_parts",
    "local_engine",
    "spec_of",
]

VOCAB_SIZE = 1000


class Poison(IntEnum):
    """Tokens that no vocabulary holds, and what computing them does."""

    RAISE = 1_000_001
    KILL = 1_000_002
    HANG = 1_000_003
    NOT_FINITE = 1_000_004
    HANG_HOLDING_ALL = 1_000_005
    """Stop the whole process, heartbeat included."""


class FakeLoadError(Exception):
    """What the stand-in for a model raises when it cannot be loaded."""


class FakeRunner(ChainRunner):
    """A ``StepRunner`` whose tokens prove the scheduling right, and that stops and fails on demand.

    ``hold`` makes each step wait for a ``release``; ``started`` counts steps that have begun, so that tests
    wait for events and not for time.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 4096,
        block_size: int = 16,
        vocab_size: int = VOCAB_SIZE,
        num_logits_slots: int = 64,
    ) -> None:
        super().__init__(
            num_blocks=num_blocks,
            block_size=block_size,
            num_logits_slots=num_logits_slots,
            vocab_size=vocab_size,
        )
        self.started = threading.Semaphore(0)
        self.num_steps = 0
        self.failures: list[Exception] = []
        """Raised by the next steps, one each."""
        self._held = False
        self._gate = threading.Semaphore(0)

    def hold(self) -> None:
        """Let no further step finish until released."""
        self._held = True

    def release(self, num_steps: int = 1) -> None:
        """Let ``num_steps`` of the held steps finish."""
        for _ in range(num_steps):
            self._gate.release()

    def release_all(self) -> None:
        """Hold no longer."""
        self._held = False
        self._gate.release()

    def wait_for_step(self) -> None:
        """Block until one more step has begun."""
        assert self.started.acquire(timeout=10), "no step has begun"

    def run(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        self.started.release()
        if self._held:
            self._gate.acquire()
        if self.failures:
            raise self.failures.pop(0)
        poisons = {
            p.sequence_id: token for p in plan.sequences for token in p.token_ids if token > VOCAB_SIZE
        }
        for poison in poisons.values():
            match poison:
                case Poison.RAISE:
                    raise RuntimeError("poisoned")
                case Poison.KILL:
                    os.kill(os.getpid(), signal.SIGKILL)
                case Poison.HANG:
                    threading.Event().wait()
                case Poison.HANG_HOLDING_ALL:
                    os.kill(os.getpid(), signal.SIGSTOP)
        result = super().run(plan)
        self.plans.clear()
        failed = {key: "not finite" for key, token in poisons.items() if token == Poison.NOT_FINITE}
        return StepResult(plan.step_id, result.sampled, failed)


def fake_parts(
    options: EngineOptions | None = None, *, runner: FakeRunner | None = None, clock: Clock | None = None
) -> EngineParts:
    """Return an engine's parts: the real scheduler over a fake worker."""
    options = options or EngineOptions(model="fake")
    runner = runner or FakeRunner(num_blocks=options.num_blocks or 4096, block_size=options.block_size)
    clock = clock or MonotonicClock()
    scheduler = Scheduler(
        options,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        num_logits_slots=runner.num_logits_slots,
        clock=clock,
    )
    ready = fake_ready(
        vocab_size=runner.vocab_size, block_size=runner.block_size, num_blocks=runner.num_blocks
    )
    return EngineParts(scheduler, runner, ready, clock)


def local_engine(runner: FakeRunner | None = None, **options: object) -> LocalEngine:
    """Return a ``LocalEngine`` over ``runner``; ``options`` are those of ``EngineOptions``."""
    resolved = EngineOptions(model="fake", **options)  # type: ignore[arg-type]
    return LocalEngine(lambda: fake_parts(resolved, runner=runner))


def spec_of(prompt: list[int], max_new_tokens: int = 8, **fields: object) -> GenerateSpec:
    """Return a plain request."""
    return GenerateSpec(token_ids=prompt, max_new_tokens=max_new_tokens, **fields)  # type: ignore[arg-type]


def expected(spec: GenerateSpec, *, sample_index: int = 0) -> list[int]:
    """Return the tokens that :class:`FakeRunner` has to draw for ``spec``, whatever else runs."""
    return expected_tokens(
        spec.token_ids,
        spec.max_new_tokens,
        vocab_size=VOCAB_SIZE,
        seed=spec.seed,
        sample_index=sample_index,
    )


def build(options: EngineOptions) -> EngineParts:
    """Build what ``options.model`` asks for."""
    match options.model.split(":", 2):
        case ["fake", "refuse"]:
            raise FakeLoadError("no such model, try another")
        case ["fake", "die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["fake", "hang"]:
            threading.Event().wait()
        case ["fake", "once", path]:
            if Path(path).exists():
                raise FakeLoadError("it was there only once")
            Path(path).touch()
    return fake_parts(options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    sys.exit(serve(parser.parse_args().fd, build))
