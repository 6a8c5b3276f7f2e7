"""Risk meters as reuse needs them: strict enough to be asked after every comparison, of every key."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

from kvcore.risk import Interval, RiskAlarm, RiskBudget, RiskEstimate, RiskMeter
from server.predict.messages import IntervalReport, RiskReport
from server.predict.options import BudgetSpec

__all__ = ["CONFIDENCE", "describe_risk", "interval_report", "make_budget", "make_meter"]

CONFIDENCE = 0.999
"""Of each end of each interval. Asked again after every comparison, it is wrong more often than once in a
thousand: tests and the experiment count how often."""


def make_budget(spec: BudgetSpec) -> RiskBudget:
    """Return it as the meter takes it. Raises ``ValueError`` for limits that cannot be."""
    return RiskBudget(
        max_changed=spec.max_changed,
        max_cosine_distance=spec.max_cosine_distance,
        max_l2=spec.max_l2,
    )


def make_meter(
    budget: RiskBudget,
    *,
    max_keys: int,
    on_alarm: Callable[[RiskAlarm], None] | None = None,
    on_recovery: Callable[[RiskAlarm], None] | None = None,
) -> RiskMeter:
    """Make a meter that remembers no more than it takes to prove reuse safe: drift shows soonest so."""
    return RiskMeter(
        budget,
        confidence=CONFIDENCE,
        half_life=_half_life(budget),
        max_keys=max_keys,
        on_alarm=on_alarm,
        on_recovery=on_recovery,
        share_interval="chernoff",
    )


def describe_risk(meter: RiskMeter, key: Hashable | None = None) -> RiskReport:
    """Return what the meter knows of a key (None: of all)."""
    estimate: RiskEstimate = meter.estimate(key)
    return RiskReport(
        changed=interval_report(estimate.changed),
        cosine_distance=interval_report(estimate.cosine_distance),
        l2=interval_report(estimate.l2),
        num_compared=estimate.num_observed,
        over_budget=meter.is_over_budget(key),
        proven_safe=meter.is_proven_safe(key),
    )


def interval_report(interval: Interval) -> IntervalReport:
    """Return it as a message."""
    return IntervalReport(interval.lower, interval.estimate, interval.upper, interval.weight)


def _half_life(budget: RiskBudget) -> float:
    """Return one with which four times the comparisons count that prove a limit kept, none having been bad.

    That many prove a share of a third of the limit safe. Fewer would prove less, more show drift later.

    With a half-life h at most ``2 h / ln 2`` count. For a share of changes p that takes ``log(1000) / p`` of
    them; for a mean divergence d, by Bernstein's interval, ``7 * 2 * log(2000) / (3 d)``.
    """
    needed = [100.0]
    if budget.max_changed is not None:
        needed.append(math.log(1 / (1 - CONFIDENCE)) / budget.max_changed)
    means = [limit for limit in (budget.max_cosine_distance, budget.max_l2) if limit is not None]
    needed += [14 * math.log(2 / (1 - CONFIDENCE)) / (3 * limit) for limit in means]
    return max(needed) * 2 * math.log(2)
