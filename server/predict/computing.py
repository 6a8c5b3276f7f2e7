"""Let a model compute a batch; when it fails, find out whose fault it was.

A batch that fails is tried once more in parts: each call's inputs by themselves and, where those fail too,
input by input up to the first that does. So a call fails only for an input of its own, and the failure names
it. Numbers that are not finite need no second try: outputs do not depend on what else was in the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from server.predict.errors import ComputeError
from server.predict.messages import Output
from server.predict.model import PredictModel, Prepared

__all__ = ["BatchResult", "Culprit", "compute_groups"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Culprit:
    """Why a group has no outputs. ``position`` in the group; None: not known."""

    error: Exception
    position: int | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """For each group its outputs, or what went wrong."""

    outcomes: list[Sequence[Output] | Culprit]
    is_clean: bool
    """The batch was computed in one go: the time that it took says something."""


def compute_groups(
    model: PredictModel, groups: Sequence[Sequence[Prepared]], *, is_wanted: Callable[[int], bool]
) -> BatchResult:
    """Compute groups of inputs, each of one call, as one batch.

    ``is_wanted`` says whether anybody still waits for a group; asked before it is tried again. Raises nothing
    that is an ``Exception``. The compute thread.
    """
    try:
        outputs = _run(model, list(chain.from_iterable(groups)))
    except Exception as error:  # noqa: BLE001 - whatever a model raises; told below
        log.warning("a batch of %d failed: %s", sum(map(len, groups)), type(error).__name__)
        gone = Culprit(ComputeError("the batch failed"))
        tried = [_try_again(model, group) if is_wanted(i) else gone for i, group in enumerate(groups)]
        return BatchResult(tried, is_clean=False)
    if _are_finite(outputs) and len(groups) == len(outputs):
        return BatchResult([(output,) for output in outputs], is_clean=True)
    outcomes: list[Sequence[Output] | Culprit] = []
    start = 0
    for group in groups:
        outcomes.append(_checked(outputs[start : start + len(group)]))
        start += len(group)
    return BatchResult(outcomes, is_clean=True)


def _try_again(model: PredictModel, group: Sequence[Prepared]) -> Sequence[Output] | Culprit:
    if len(group) > 1:
        try:
            return _checked(_run(model, group))
        except Exception as error:  # noqa: BLE001 - found out below
            log.debug("a call's part of a batch failed: %s", type(error).__name__)
    outputs: list[Output] = []
    for position, item in enumerate(group):
        try:
            outputs += _run(model, [item])
        except Exception as error:  # noqa: BLE001 - told to the caller
            return Culprit(error, position)
    return _checked(outputs)


def _run(model: PredictModel, items: Sequence[Prepared]) -> list[Output]:
    outputs = model.run(items)
    if len(outputs) != len(items):
        raise RuntimeError(f"the model gave {len(outputs)} outputs for {len(items)} inputs")
    return outputs


def _checked(outputs: Sequence[Output]) -> Sequence[Output] | Culprit:
    if _are_finite(outputs):
        return outputs
    position = next(i for i, output in enumerate(outputs) if not _are_finite([output]))
    return Culprit(ComputeError("the model gave numbers that are not finite"), position)


def _are_finite(outputs: Sequence[Output]) -> bool:
    values = np.frombuffer(b"".join([output.values for output in outputs]), dtype="<f4")
    return int(np.count_nonzero(np.isfinite(values))) == len(values)
