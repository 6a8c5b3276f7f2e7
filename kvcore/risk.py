"""What reuse that is not exact costs in correctness: one meter for all kinds of it.

A sampled share of reuses is compared with a fresh computation, and each comparison is observed here: how far
the two are apart, and whether an answer changed. Few comparisons prove little, so a budget is held against
the upper end of a confidence interval when the question is "is this safe?", and against the lower end when it
is "has this gone wrong?"::

    0 ------- estimate ------- 1
         [--------|--------]            safe: the upper end is below the budget
         lower          upper           over: the lower end is above it

Between the two nothing is proved yet: ``is_over_budget`` is False and ``is_proven_safe`` is too.

Observations are forgotten exponentially, so drift shows within a few half-lives, and the number of those that
still count (``weight``) is what the intervals are made of. Intervals: Wilson's for the share of changes;
empirical Bernstein (Maurer and Pontil 2009) for the mean divergence, clipped to a bound, which needs no
assumption about its distribution. Wilson's promises too much of a handful of observations of something rare
(one change in one comparison "proves" a share above 1%); where decisions hang on few, ask for Chernoff's
(the ends are where ``n * KL(estimate || end) = log(1 / (1 - confidence))``), which holds for every number.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

__all__ = ["Interval", "RiskAlarm", "RiskBudget", "RiskEstimate", "RiskMeter"]

RiskKey = Hashable


@dataclass(frozen=True, slots=True)
class RiskBudget:
    """How much reuse may cost. A measure that is None is not limited."""

    max_changed: float | None = 0.01
    """Share of reuses whose answer is another one."""
    max_cosine_distance: float | None = None
    """Mean of 1 - cosine between reused and fresh."""
    max_l2: float | None = None
    """Mean of the relative length of the difference."""

    def __post_init__(self) -> None:
        if self.max_changed is not None and not 0 < self.max_changed < 1:
            raise ValueError("max_changed must be between 0 and 1")
        for name, limit in (("max_cosine_distance", self.max_cosine_distance), ("max_l2", self.max_l2)):
            if limit is not None and not 0 < limit < DIVERGENCE_BOUND:
                raise ValueError(f"{name} must be between 0 and {DIVERGENCE_BOUND:g}: no more is measured")

    def limit(self, measure: str) -> float | None:
        return {
            CHANGED: self.max_changed,
            COSINE: self.max_cosine_distance,
            L2: self.max_l2,
        }[measure]


DIVERGENCE_BOUND = 2.0
"""Divergences are clipped to it; limits lie below, or an alarm could never fire."""

CHANGED, COSINE, L2 = "changed", "cosine_distance", "l2"


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and between what the truth lies with the meter's confidence."""

    lower: float
    estimate: float
    upper: float
    weight: float
    """Observations that it rests on, after forgetting. 0: nothing is known."""


@dataclass(frozen=True, slots=True)
class RiskEstimate:
    """What is known of one key, or of all."""

    changed: Interval
    cosine_distance: Interval
    l2: Interval
    num_observed: int

    def measure(self, name: str) -> Interval:
        return {CHANGED: self.changed, COSINE: self.cosine_distance, L2: self.l2}[name]


@dataclass(frozen=True, slots=True)
class RiskAlarm:
    """A budget was crossed. Told once; again only after the measure has come back below."""

    key: RiskKey | None
    """None: the sum over all keys."""
    measure: str
    interval: Interval
    limit: float


class _Mean:
    """Weighted mean and variance of a bounded quantity, older observations fading."""

    __slots__ = ("square_sum", "total", "weight", "weight_squares")

    def __init__(self) -> None:
        self.weight = self.weight_squares = self.total = self.square_sum = 0.0

    def add(self, value: float, fade: float) -> None:
        self.weight = fade * self.weight + 1.0
        self.weight_squares = fade * fade * self.weight_squares + 1.0
        self.total = fade * self.total + value
        self.square_sum = fade * self.square_sum + value * value

    @property
    def effective(self) -> float:
        """Return the number of equally weighted observations that would tell as much (Kish)."""
        return self.weight * self.weight / self.weight_squares if self.weight_squares else 0.0

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    @property
    def variance(self) -> float:
        """Return the unbiased sample variance; nothing is known of it below two observations."""
        n = self.effective
        if n < 1.001:
            return math.inf
        return max(0.0, self.square_sum / self.weight - self.mean**2) * n / (n - 1)


@dataclass(slots=True)
class _Account:
    """What is remembered of one key."""

    measures: dict[str, _Mean] = field(
        default_factory=lambda: {CHANGED: _Mean(), COSINE: _Mean(), L2: _Mean()}
    )
    num_observed: int = 0
    over: set[str] = field(default_factory=set)


class RiskMeter:
    """See the module's text. One thread, or a lock around it."""

    def __init__(
        self,
        budget: RiskBudget,
        *,
        confidence: float = 0.95,
        half_life: float = 500.0,
        max_keys: int = 1_000,
        on_alarm: Callable[[RiskAlarm], None] | None = None,
        on_recovery: Callable[[RiskAlarm], None] | None = None,
        share_interval: Literal["wilson", "chernoff"] = "wilson",
    ) -> None:
        """Know nothing yet.

        ``half_life``: after so many observations of a key one of its observations counts half. ``on_alarm``
        is called from ``observe``, once for each crossing of each measure of each key, and of the sum;
        ``on_recovery`` when the estimate is back within the limit.

        Raises ``ValueError`` for a limit that could not be proved exceeded even if every comparison were the
        worst there is, because too few are remembered.
        """
        if not 0.5 < confidence < 1 or half_life <= 0 or max_keys < 1:
            raise ValueError("0.5 < confidence < 1, half_life > 0, max_keys >= 1")
        self.budget = budget
        self._fade = 0.5 ** (1 / half_life)
        self._z = NormalDist().inv_cdf(confidence)  # one-sided: each end is asked about by itself
        self._log_term = math.log(2 / (1 - confidence))
        self._log_odds = -math.log(1 - confidence)
        self._is_chernoff = share_interval == "chernoff"
        self._check_that_alarms_can_fire()
        self._max_keys = max_keys
        self._on_alarm = on_alarm
        self._on_recovery = on_recovery
        self._all = _Account()
        self._accounts: OrderedDict[RiskKey, _Account] = OrderedDict()
        self.num_alarms = 0
        self.num_invalid = 0
        """Observations that were not numbers: counted as the worst there is."""

    def __len__(self) -> int:
        return len(self._accounts)

    def observe(self, key: RiskKey, cosine: float, l2: float, changed: bool | None) -> None:
        """Note one comparison of reused with fresh.

        ``cosine``: similarity, 1 for the same direction. ``l2``: length of the difference over that of the
        fresh one. ``changed``: whether the answer is another one; None where nobody looked. Not a number
        counts as the worst.
        """
        account = self._account(key)
        distance = 1.0 - cosine
        if not (math.isfinite(distance) and math.isfinite(l2)):
            self.num_invalid += 1
        values = {COSINE: _clip(distance), L2: _clip(l2)}
        if changed is not None:
            values[CHANGED] = float(changed)
        for who, each in ((key, account), (None, self._all)):
            each.num_observed += 1
            for measure, value in values.items():
                each.measures[measure].add(value, self._fade)
            self._judge(who, each, values)

    def estimate(self, key: RiskKey | None = None) -> RiskEstimate:
        """Return what is known of a key (None: of all). An unknown key: nothing, between 0 and the bound."""
        account = self._all if key is None else self._accounts.get(key, _Account())
        return RiskEstimate(
            changed=self._interval(account, CHANGED),
            cosine_distance=self._interval(account, COSINE),
            l2=self._interval(account, L2),
            num_observed=account.num_observed,
        )

    def is_over_budget(self, key: RiskKey | None = None) -> bool:
        """Say whether it is proved, at the meter's confidence, that a limit is exceeded."""
        account = self._all if key is None else self._accounts.get(key)
        return account is not None and any(self._is_over(account, measure) for measure in account.measures)

    def is_proven_safe(self, key: RiskKey | None = None) -> bool:
        """Say whether it is proved that every limit is kept."""
        account = self._all if key is None else self._accounts.get(key, _Account())
        for measure in account.measures:
            limit = self.budget.limit(measure)
            if limit is not None and not self._proves(account, measure, limit, above=False):
                return False
        return True

    def known_keys(self) -> list[RiskKey]:
        """Return the keys that are remembered, the latest observed last."""
        return list(self._accounts)

    def forget(self, key: RiskKey) -> None:
        """Drop what is known of a key: what it names is not reused any more."""
        self._accounts.pop(key, None)

    def _check_that_alarms_can_fire(self) -> None:
        most = (1 + self._fade) / (1 - self._fade)
        for measure in (CHANGED, COSINE, L2):
            limit = self.budget.limit(measure)
            worst = _Mean()
            worst.weight, worst.weight_squares = most, most  # so that ``effective`` is what it tends to
            worst.total = most * _bound(measure)
            worst.square_sum = most * _bound(measure) ** 2
            share = measure == CHANGED
            interval = self._of_share(worst) if share else self._bernstein(worst, _bound(measure))
            if limit is not None and interval.lower <= limit:
                raise ValueError(f"the limit of {measure} could never be proved exceeded with this half-life")

    def _account(self, key: RiskKey) -> _Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account()
            if len(self._accounts) > self._max_keys:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(key)
        return account

    def _judge(self, key: RiskKey | None, account: _Account, measures: dict[str, float]) -> None:
        for measure in measures:
            limit = self.budget.limit(measure)
            if limit is None:
                continue
            if measure in account.over:
                # The estimate, not the lower end: one lucky comparison must not re-arm the alarm.
                if account.measures[measure].mean <= limit:
                    account.over.discard(measure)
                    if self._on_recovery is not None:
                        self._on_recovery(RiskAlarm(key, measure, self._interval(account, measure), limit))
            elif self._proves(account, measure, limit, above=True):
                account.over.add(measure)
                self.num_alarms += 1
                if self._on_alarm is not None:
                    self._on_alarm(RiskAlarm(key, measure, self._interval(account, measure), limit))

    def _is_over(self, account: _Account, measure: str) -> bool:
        limit = self.budget.limit(measure)
        return limit is not None and self._proves(account, measure, limit, above=True)

    def _proves(self, account: _Account, measure: str, limit: float, *, above: bool) -> bool:
        """Say whether the interval lies above the limit (below: not above it), without finding its ends."""
        mean = account.measures[measure]
        if mean.weight == 0 or (mean.mean > limit) != above:
            return False
        if measure == CHANGED and self._is_chernoff:
            return _divergence(mean.mean, limit) * mean.effective > self._log_odds
        interval = self._interval(account, measure)
        return interval.lower > limit if above else interval.upper <= limit

    def _interval(self, account: _Account, measure: str) -> Interval:
        mean = account.measures[measure]
        bound = _bound(measure)
        if mean.weight == 0:
            return Interval(0.0, 0.0, bound, 0.0)
        if measure == CHANGED:
            return self._of_share(mean)
        return self._bernstein(mean, bound)

    def _of_share(self, mean: _Mean) -> Interval:
        return self._chernoff(mean) if self._is_chernoff else self._wilson(mean)

    def _wilson(self, mean: _Mean) -> Interval:
        n, share, z2 = mean.effective, mean.mean, self._z * self._z
        center = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = self._z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        # Rounding leaves the ends just beyond an estimate of 0 or 1.
        return Interval(min(max(0.0, center - half), share), share, max(min(1.0, center + half), share), n)

    def _chernoff(self, mean: _Mean) -> Interval:
        n, share = mean.effective, mean.mean
        reach = self._log_odds / n
        lower = _end(share, 0.0, lambda end: _divergence(share, end) <= reach) if share > 0 else 0.0
        upper = _end(share, 1.0, lambda end: _divergence(share, end) <= reach) if share < 1 else 1.0
        return Interval(lower, share, upper, n)

    def _bernstein(self, mean: _Mean, bound: float) -> Interval:
        n = mean.effective
        if n < 2:
            return Interval(0.0, mean.mean, bound, n)
        half = math.sqrt(2 * mean.variance * self._log_term / n) + 7 * bound * self._log_term / (3 * (n - 1))
        return Interval(max(0.0, mean.mean - half), mean.mean, min(bound, mean.mean + half), n)


def _bound(measure: str) -> float:
    """Return the worst value that a measure can have."""
    return 1.0 if measure == CHANGED else DIVERGENCE_BOUND


def _divergence(share: float, other: float) -> float:
    """Return the Kullback-Leibler divergence of two coins."""
    if not 0 < other < 1:
        return 0.0 if share == other else math.inf
    first = share * math.log(share / other) if share > 0 else 0.0
    return first + ((1 - share) * math.log((1 - share) / (1 - other)) if share < 1 else 0.0)


def _end(inside: float, outside: float, is_inside: Callable[[float], bool]) -> float:
    """Return where an interval ends, rounded outwards by less than a millionth."""
    for _ in range(20):
        middle = (inside + outside) / 2
        if is_inside(middle):
            inside = middle
        else:
            outside = middle
    return outside


def _clip(divergence: float) -> float:
    if not math.isfinite(divergence):
        return DIVERGENCE_BOUND
    return min(max(0.0, divergence), DIVERGENCE_BOUND)
