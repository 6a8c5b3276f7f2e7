"""A scheduler, a chain runner and a front end that remembers what it was told, for random campaigns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvcore.clock import ManualClock
from server.engine.messages import (
    Admitted,
    Cancel,
    Failed,
    FailureKind,
    Finish,
    Finished,
    GenerateSpec,
    Progress,
    Refused,
    Submit,
    Tokens,
)
from server.engine.options import EngineOptions
from server.engine.plan import SequencePlan, StepPlan
from server.engine.scheduler import Scheduler
from server.engine.tiering.tiering import Tiering
from tests.chain_runner import ChainRunner, expected_tokens

__all__ = ["VOCABULARY", "Told", "World"]

VOCABULARY = 3


@dataclass
class Told:
    """What the front end knows of one request."""

    spec: GenerateSpec
    tokens: list[list[int]]
    finishes: list[Finish | None]
    cancelled: set[int] = field(default_factory=set)
    during_step: bool = False
    """It was cancelled while a step ran, whose tokens still come."""
    admitted: bool = False
    terminal: Finished | Refused | Failed | None = None


class World:
    """Drive steps and check every event against the oracle."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_logits_slots: int = 8,
        fails: Callable[[SequencePlan], bool] = lambda part: False,
        tiers: Callable[[World], Tiering] | None = None,
        **options: object,
    ) -> None:
        """``tiers`` makes the tiers of this world, once all else is there."""
        self.clock = ManualClock()
        settings = {"model": "chain", "max_waiting": 1000, "max_batch_tokens": 16, **options}
        self.scheduler = Scheduler(
            EngineOptions(**settings),
            num_blocks=num_blocks,
            block_size=block_size,
            num_logits_slots=num_logits_slots,
            clock=self.clock,
        )
        self.runner = ChainRunner(
            num_blocks=num_blocks,
            block_size=block_size,
            num_logits_slots=num_logits_slots,
            vocab_size=VOCABULARY,
            fails=fails,
        )
        self.told: dict[int, Told] = {}
        self.tiering: Tiering | None = None
        if tiers is not None:
            self.tiering = tiers(self)
            self.scheduler.use_tiers(self.tiering)

    def submit(
        self, prompt: list[int], max_new_tokens: int = 4, *, deadline_s: float | None = None, **fields: object
    ) -> int:
        """Submit a request; return its key."""
        key = len(self.told) + 1
        spec = GenerateSpec(token_ids=list(prompt), max_new_tokens=max_new_tokens, **fields)
        self.told[key] = Told(spec, [[] for _ in range(spec.num_samples)], [None] * spec.num_samples)
        self.scheduler.submit(Submit(key, spec, deadline_s))
        self.hear()
        return key

    def cancel(self, key: int, sample: int | None = None) -> None:
        """Cancel a sample or all."""
        told = self.told[key]
        told.during_step |= bool(self.scheduler._planned)
        told.cancelled |= set(range(told.spec.num_samples)) if sample is None else {sample}
        self.scheduler.cancel(Cancel(key, sample))
        self.hear()

    def step(self, *, crash: bool = False, during: Callable[[], None] | None = None) -> StepPlan | None:
        """Plan, run and apply one step; check all that was said."""
        scheduler = self.scheduler
        plan = scheduler.plan()
        if plan is None and self.tiering is not None and scheduler.has_work:
            assert not len(scheduler._running), "running sequences were not planned"
        elif plan is None:
            assert not scheduler.has_work or not len(scheduler._running), "running sequences were not planned"
            assert not scheduler.has_work, "there is work, nothing runs, and nothing is planned"
        else:
            assert plan.num_tokens <= scheduler.options.max_batch_tokens
            planned = {part.sequence_id for part in plan.sequences}
            assert planned == {s.sequence_id for s in scheduler._running}, "a running sequence stalls"
            if during is not None:
                during()
            if crash:
                scheduler.abort(plan, "crash")
            else:
                scheduler.apply(plan, self.runner.run(plan))
        self.hear()
        scheduler.check_integrity()
        return plan

    def finish(self, max_steps: int = 20_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
            self.clock.advance(0.001)
        raise AssertionError("this never ends")

    def hear(self) -> None:
        """Take the events and check each."""
        for event in self.scheduler.drain_events():
            told = self.told[event.key]
            assert told.terminal is None, "an event after the terminal one"
            if isinstance(event, Tokens):
                self._hear_tokens(told, event)
            elif isinstance(event, Admitted):
                assert not told.admitted
                told.admitted = True
            elif not isinstance(event, Progress):
                told.terminal = event
                self._hear_end(told, event)

    def _hear_tokens(self, told: Told, event: Tokens) -> None:
        sample = event.sample_index
        assert told.admitted
        assert told.finishes[sample] is None
        assert sample not in told.cancelled or told.during_step
        told.tokens[sample] += event.token_ids
        told.finishes[sample] = event.finish
        count = len(told.tokens[sample])
        spec = told.spec
        wanted = expected_tokens(
            spec.token_ids, count, vocab_size=VOCABULARY, seed=spec.seed, sample_index=sample
        )
        assert told.tokens[sample] == wanted
        last = told.tokens[sample][-1]
        if last in spec.eos_token_ids:
            assert event.finish is Finish.EOS
        elif last in spec.stop_token_ids:
            assert event.finish is Finish.STOP_TOKEN
        else:
            assert event.finish is (Finish.LENGTH if count == spec.max_new_tokens else None)

    def _hear_end(self, told: Told, event: Finished | Refused | Failed) -> None:
        if isinstance(event, Refused):
            assert not told.admitted
        elif isinstance(event, Failed):
            assert told.admitted
            assert event.kind in (FailureKind.DEADLINE, FailureKind.INTERNAL, FailureKind.NUMERICAL)
        else:
            usage, spec = event.usage, told.spec
            ended = {i for i, finish in enumerate(told.finishes) if finish is not None}
            assert ended | told.cancelled >= set(range(spec.num_samples))
            cached = usage.cached_block_tokens + usage.cached_partial_tokens + usage.cached_tail_tokens
            cached += usage.restored_tokens
            assert usage.prompt_tokens == len(spec.token_ids) == cached + usage.computed_prompt_tokens
            assert usage.generated_tokens == sum(map(len, told.tokens))
            if not (spec.use_kv_cache and spec.read_prefix):
                assert cached == 0

    def check_end(self) -> None:
        """Check that nothing is left over: every request has its end, and clearing frees every block."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        assert not scheduler.has_work
        assert all(told.terminal is not None for told in self.told.values())
        stats = scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_leased) == (0, 0, 0)
        cached = stats.cached_block_tokens + stats.cached_partial_tokens + stats.cached_tail_tokens
        cached += self.scheduler.counters.restored_tokens
        assert cached + stats.computed_prompt_tokens == stats.prompt_tokens
        cache.clear()
        cache.check_integrity()
        assert cache.pool.num_free == cache.pool.num_blocks
        assert not cache.tree.roots
        assert len(cache.tails) == 0
