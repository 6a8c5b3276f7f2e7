"""Policies on trial in an engine: the shadow caches of ``kvcore.trial``, begun and ended while it serves."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence

from kvcore.keys import NamespaceKey
from kvcore.manager import CacheManager
from kvcore.trial import Trial
from server.engine.admin_messages import TrialReport

__all__ = ["PolicyTrial"]


class PolicyTrial:
    """The trial that is on, if one is. Fed by the scheduler, steered and read by the desk."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        policies: Sequence[str] = (),
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``ValueError`` for a policy that does not exist."""
        self._cache = cache
        self._timer = timer
        self._trial: Trial | None = None
        self.policies: tuple[str, ...] = ()
        """Policies on trial, besides the live one."""
        self.choose(policies)

    @property
    def cost_share(self) -> float:
        """Return the share of the engine's time that the trial has taken."""
        trial = self._trial
        return trial.spent_s / trial.steps_s if trial is not None and trial.steps_s else 0.0

    def choose(self, policies: Sequence[str]) -> None:
        """Try these beside the live policy, from nothing; none: no trial."""
        trial = None
        if policies:
            trial = Trial(
                policies,
                live_policy=self._cache.control.policy.name,
                capacity_blocks=self._cache.pool.num_blocks,
                block_size=self._cache.block_size,
                timer=self._timer,
            )
        self._trial, self.policies = trial, tuple(policies)

    def observe(
        self, namespace: NamespaceKey, prompt: array[int], num_output_tokens: int, now: float
    ) -> None:
        """Note a request that has ended."""
        if self._trial is not None:
            self._trial.observe(hash(namespace), prompt, num_output_tokens, now)

    def step_took(self, seconds: float) -> None:
        """A step has ended: the shadows may catch up for a small part of its time."""
        if self._trial is not None:
            self._trial.step_took(seconds)

    def reports(self) -> list[TrialReport]:
        """Return what each would have hit, the live one's shadow first. Rates are from 0 to 1."""
        if self._trial is None:
            return []
        return [
            TrialReport(
                policy=result.policy,
                token_hit_rate=result.token_hit_rate / 100,
                request_hit_rate=result.request_hit_rate / 100,
                requests=result.num_requests,
                tokens=result.num_tokens,
                sampled_share=result.sampled_share,
                cost_share=result.cost_share,
            )
            for result in self._trial.report()
        ]
