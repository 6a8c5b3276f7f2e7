"""What lossy codecs cost: each block's divergence goes to the risk meter, and a broken budget is an alarm."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvcore.risk import RiskAlarm, RiskBudget, RiskMeter
from kvcore.tiers.stack import TierStack
from server.engine.admin_messages import DivergenceReport

__all__ = ["DivergenceWatch"]

log = logging.getLogger(__name__)

BUDGET = RiskBudget(max_changed=None, max_cosine_distance=0.01, max_l2=0.1)
"""Int8 with a scale per head stays well below on sound KV (docs/cache.md has figures)."""


class DivergenceWatch:
    """One meter for all tiers, by the tier's name."""

    def __init__(self, stacks: Iterable[TierStack]) -> None:
        self._stacks = tuple(stacks)
        self._meter = RiskMeter(BUDGET, on_alarm=self._alarm)

    @property
    def num_alarms(self) -> int:
        """Return how often a budget was broken."""
        return self._meter.num_alarms

    def poll(self) -> None:
        """Take what codecs have measured since the last call."""
        for stack in self._stacks:
            for tier in stack.tiers:
                for _, measured in tier.take_divergences():
                    self._meter.observe(tier.name, 1.0 - measured.cosine_distance, measured.relative_l2, None)

    def report(self, tier: str) -> DivergenceReport | None:
        """Return what is known of a tier; None if nothing was measured."""
        if tier not in self._meter.known_keys():
            return None
        estimate = self._meter.estimate(tier)
        return DivergenceReport(
            measured_blocks=estimate.num_observed,
            cosine_distance=estimate.cosine_distance.estimate,
            cosine_distance_upper=estimate.cosine_distance.upper,
            relative_l2=estimate.l2.estimate,
            relative_l2_upper=estimate.l2.upper,
            is_over_budget=self._meter.is_over_budget(tier),
        )

    def _alarm(self, alarm: RiskAlarm) -> None:
        if alarm.key is not None:
            log.warning(
                "tier %s: its lossy codec is over budget: %s is %.3g, the limit is %.3g",
                alarm.key,
                alarm.measure,
                alarm.interval.estimate,
                alarm.limit,
            )
