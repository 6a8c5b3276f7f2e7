"""What the engine counts. All run from its start; ``cached + restored + computed = prompt`` always holds."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from server.engine.messages import EngineStats
from server.engine.plan import PrefixGroup, StepPlan
from server.engine.request import Request

__all__ = ["EngineCounters"]


@dataclass(slots=True)
class EngineCounters:
    """See ``EngineStats`` for the meaning of each."""

    steps: int = 0
    step_s: float = 0.0
    plan_s: float = 0.0
    recent_step_s: float = 0.0
    """Moving average."""
    prompt_tokens: int = 0
    cached_block_tokens: int = 0
    cached_partial_tokens: int = 0
    cached_tail_tokens: int = 0
    restored_tokens: int = 0
    computed_prompt_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    requests_finished: int = 0
    requests_failed: int = 0
    preemptions: int = 0
    grouped_tokens: int = 0

    def add_prompt(self, request: Request) -> None:
        """Count a prompt on its admission."""
        usage = request.usage()
        self.prompt_tokens += usage.prompt_tokens
        self.cached_block_tokens += usage.cached_block_tokens
        self.cached_partial_tokens += usage.cached_partial_tokens
        self.cached_tail_tokens += usage.cached_tail_tokens
        self.restored_tokens += usage.restored_tokens
        self.computed_prompt_tokens += usage.computed_prompt_tokens

    def add_step(self, plan: StepPlan) -> None:
        """Count a step that ran."""
        if plan.sequences:
            self.steps += 1

    def add_times(self, *, plan_s: float, step_s: float) -> None:
        """Add what the driver measured for one step, planning included in ``step_s``."""
        self.plan_s += plan_s
        self.step_s += step_s
        self.recent_step_s += 0.1 * (step_s - self.recent_step_s) if self.recent_step_s else step_s

    def add_groups(self, groups: Seq[PrefixGroup], query_lens: Seq[int]) -> None:
        """Count query tokens that share at least one block's attention with another sequence."""
        covered = 0
        for group in groups:
            if group.start >= covered:  # outermost groups are disjoint and come in order
                self.grouped_tokens += sum(query_lens[group.start : group.stop])
                covered = group.stop

    def snapshot(
        self,
        *,
        num_running: int,
        num_waiting: int,
        num_blocks: int,
        num_blocks_leased: int,
        num_blocks_cached: int,
        num_blocks_free: int,
        evicted_blocks: int,
        expired_blocks: int,
    ) -> EngineStats:
        """Return the counters beside the gauges given."""
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            num_blocks=num_blocks,
            num_blocks_leased=num_blocks_leased,
            num_blocks_cached=num_blocks_cached,
            num_blocks_free=num_blocks_free,
            steps=self.steps,
            step_s=self.step_s,
            plan_s=self.plan_s,
            prompt_tokens=self.prompt_tokens,
            cached_block_tokens=self.cached_block_tokens,
            cached_partial_tokens=self.cached_partial_tokens,
            cached_tail_tokens=self.cached_tail_tokens,
            restored_tokens=self.restored_tokens,
            computed_prompt_tokens=self.computed_prompt_tokens,
            recomputed_tokens=self.recomputed_tokens,
            generated_tokens=self.generated_tokens,
            requests_finished=self.requests_finished,
            requests_failed=self.requests_failed,
            preemptions=self.preemptions,
            evicted_blocks=evicted_blocks,
            expired_blocks=expired_blocks,
            grouped_tokens=self.grouped_tokens,
        )
