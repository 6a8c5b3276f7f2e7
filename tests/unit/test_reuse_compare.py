"""When an answer counts as another one, how long a meter remembers, and what the log is told of it."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from kvcore.risk import RiskBudget
from server.predict.messages import EventKind, IntervalReport, ModelInfo, ReuseEvent, Task
from server.predict.reuse.compare import cosine_and_l2, is_changed, is_other_response
from server.predict.reuse.events import log_event
from server.predict.reuse.meters import make_meter

LABELS = ModelInfo(task=Task.CLASSIFY, family="f", labels=("a", "b", "c"))
SEVERAL = ModelInfo(task=Task.CLASSIFY, family="f", labels=("a", "b", "c"), multi_label=True)
NUMBERS = ModelInfo(task=Task.REGRESS, family="f")


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("reused", "fresh", "changed"),
    [
        (0.2, 0.24, False),
        (0.2, 0.26, True),
        (0.26, 0.2, True),
        (0.49, 0.5, True),
        (0.5, 0.49, True),
        (0.5, 0.54, False),
        (0.9, 0.9, False),
    ],
)
def test_a_prediction_has_changed_across_the_half_or_by_more_than_a_twentieth(
    reused: float, fresh: float, *, changed: bool
) -> None:
    assert is_changed(reused, fresh) is changed


def test_divergence_is_measured_by_angle_and_by_the_fresh_length() -> None:
    assert cosine_and_l2(numbers(3, 4), numbers(3, 4)) == (1.0, 0.0)
    assert cosine_and_l2(numbers(1, 0), numbers(2, 0)) == (1.0, 0.5)
    assert cosine_and_l2(numbers(2, 0), numbers(1, 0)) == (1.0, 1.0)
    cosine, l2 = cosine_and_l2(numbers(0, 5), numbers(3, 4))
    assert cosine == pytest.approx(0.8)
    assert l2 == pytest.approx(math.sqrt(10) / 5)
    assert list(cosine_and_l2(numbers(0.25, 0), numbers(0, 0.25))) == pytest.approx([0.0, math.sqrt(2)])


def test_vectors_without_a_direction_are_far_from_all_but_themselves() -> None:
    nothing, something = numbers(0, 0), numbers(0.5, 0)
    assert cosine_and_l2(nothing, nothing) == (1.0, 0.0)
    assert cosine_and_l2(nothing, something) == (0.0, 1.0)
    assert cosine_and_l2(something, nothing) == (0.0, math.inf)


def test_a_classifier_has_changed_its_mind_when_another_label_is_first() -> None:
    assert not is_other_response(LABELS, numbers(0.6, 0.4, 0), numbers(0.9, 0.05, 0.05))
    assert is_other_response(LABELS, numbers(0.6, 0.4, 0), numbers(0.4, 0.6, 0))


def test_with_several_labels_every_one_of_at_least_a_half_counts() -> None:
    assert not is_other_response(SEVERAL, numbers(0.9, 0.5, 0.1), numbers(0.6, 0.8, 0.4))
    assert is_other_response(SEVERAL, numbers(0.9, 0.5, 0.1), numbers(0.9, 0.49, 0.1))
    assert is_other_response(SEVERAL, numbers(0.9, 0.1, 0.1), numbers(0.9, 0.1, 0.5))


def test_numbers_have_changed_by_more_than_a_twentieth_of_the_largest_or_of_one() -> None:
    assert not is_other_response(NUMBERS, numbers(0.1, 0.0), numbers(0.14, 0.0))
    assert is_other_response(NUMBERS, numbers(0.1, 0.0), numbers(0.16, 0.0))
    assert not is_other_response(NUMBERS, numbers(104.0, -3.0), numbers(100.0, 1.0))
    assert is_other_response(NUMBERS, numbers(100.0, 7.0), numbers(100.0, 1.0))
    assert is_other_response(NUMBERS, numbers(-94.0), numbers(-100.0))
    assert not is_other_response(NUMBERS, numbers(), numbers())


def test_answers_of_different_sizes_are_different_answers() -> None:
    for info in (LABELS, SEVERAL, NUMBERS):
        assert is_other_response(info, numbers(1.0), numbers(1.0, 0.0))


@pytest.mark.parametrize(
    ("budget", "needed"),
    [
        (RiskBudget(max_changed=0.2), 100.0),
        (RiskBudget(max_changed=0.02), math.log(1000) / 0.02),
        (RiskBudget(max_changed=None, max_cosine_distance=0.125), 14 * math.log(2000) / (3 * 0.125)),
        (RiskBudget(max_changed=0.05, max_l2=0.25), 14 * math.log(2000) / (3 * 0.25)),
        (RiskBudget(max_changed=0.02, max_l2=0.5), math.log(1000) / 0.02),
        (RiskBudget(max_changed=None), 100.0),
    ],
)
def test_four_times_what_proves_a_limit_kept_is_remembered(budget: RiskBudget, needed: float) -> None:
    meter = make_meter(budget, max_keys=1)
    for _ in range(int(16 * needed)):
        meter.observe("key", 1.0, 0.0, changed=False)
    assert meter.estimate().changed.weight == pytest.approx(4 * needed, rel=0.02)
    assert meter.is_proven_safe()


def event(kind: EventKind, *, key: str = "", measured: bool = False, lifetime_s: float = 0.0) -> ReuseEvent:
    interval = IntervalReport(0.06, 0.1, 0.2, 50.0) if measured else None
    return ReuseEvent(
        kind=kind,
        model="m",
        version="1",
        policy="main",
        key=key,
        measure="changed" if measured else "",
        interval=interval,
        limit=0.05,
        lifetime_s=lifetime_s,
    )


@pytest.mark.parametrize(
    ("told", "level", "said"),
    [
        (event(EventKind.ALARM, measured=True), logging.WARNING, "m/1 main: changed is 0.1 (0.06 to 0.2)"),
        (event(EventKind.ALARM, key="k", measured=True), logging.INFO, "m/1 main key k: changed is 0.1"),
        (event(EventKind.RECOVERED, measured=True), logging.INFO, "the limit 0.05"),
        (event(EventKind.LIFETIME, lifetime_s=15.0), logging.INFO, "m/1 main: lifetime 15 s"),
        (event(EventKind.LIFETIME, key="k", lifetime_s=15.0), logging.DEBUG, "key k: lifetime 15 s"),
        (event(EventKind.STOPPED), logging.INFO, "lifetime 0 s"),
        (event(EventKind.LIFETIME), logging.INFO, "lifetime without end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_log_warns_of_budgets_broken_by_all_keys_and_of_nothing_else(
    told: ReuseEvent, level: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    log_event(logging.getLogger("reuse.test"), told)
    [record] = caplog.records
    assert (record.levelno, said in record.getMessage()) == (level, True)
    assert f"reuse {told.kind.value}: " in record.getMessage()
