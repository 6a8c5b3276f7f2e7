"""What is compared of reused and fresh, and when an answer counts as another one."""

from __future__ import annotations

import numpy as np

from server.predict.messages import ModelInfo, Task
from server.predict.reuse.predictor import Floats, Singles

__all__ = ["CHANGE_TOLERANCE", "cosine_and_l2", "is_changed", "is_other_response"]

CHANGE_TOLERANCE = 0.05
"""A prediction has changed if it is on the other side of 0.5, or further away than this."""


def is_changed(reused: float, fresh: float) -> bool:
    """Say whether two predictions in 0..1 are different answers."""
    return (reused >= 0.5) != (fresh >= 0.5) or abs(reused - fresh) > CHANGE_TOLERANCE


def cosine_and_l2(reused: Singles, fresh: Singles) -> tuple[float, float]:
    """Return the similarity of two vectors, and their distance over the fresh one's length."""
    first: Floats = reused.astype(np.float64)
    second: Floats = fresh.astype(np.float64)
    lengths = float(np.sqrt(first @ first)), float(np.sqrt(second @ second))
    away = first - second
    distance = float(np.sqrt(away @ away))
    if distance == 0.0:
        return 1.0, 0.0
    if lengths[0] == 0.0 or lengths[1] == 0.0:
        return 0.0, 1.0 if lengths[1] else np.inf
    return float(first @ second) / (lengths[0] * lengths[1]), distance / lengths[1]


def is_other_response(info: ModelInfo, reused: Singles, fresh: Singles) -> bool:
    """Say whether two responses of a text model are different answers.

    CLASSIFY: another label, or with several at once (probability at least 0.5) another set of them. REGRESS:
    a number that is off by more than ``CHANGE_TOLERANCE`` of the largest, or of 1 if that is more.
    """
    if reused.shape != fresh.shape:
        return True
    if info.task is Task.REGRESS:
        scale = max(1.0, float(np.abs(fresh).max(initial=0.0)))
        return bool(np.abs(reused - fresh).max(initial=0.0) > CHANGE_TOLERANCE * scale)
    if info.multi_label:
        return bool(((reused >= 0.5) != (fresh >= 0.5)).any())
    return int(reused.argmax()) != int(fresh.argmax())
