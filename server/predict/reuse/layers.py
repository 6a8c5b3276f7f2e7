"""A stack of tanh layers with a linear one at the end, forwards and backwards, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from server.predict.reuse.predictor import Floats

__all__ = ["Layers", "one_by_one"]


def one_by_one(rows: npt.NDArray[np.floating[Any]]) -> Floats:
    """Return [n, F] as [n, 1, F]: products of one row with a matrix, n of them.

    A product's rounding depends on its shape, so that all have the same. One row is the quickest: OpenBLAS
    copies a matrix before it multiplies several rows with it, which for few rows is most of the time.
    """
    return rows.astype(np.float64)[:, None, :]


@dataclass(frozen=True, slots=True)
class Layers:
    """``h_l = tanh(h_{l-1} W_l + b_l)`` for all but the last layer, which has no tanh."""

    weights: tuple[Floats, ...]
    """[in, out] each."""
    biases: tuple[Floats, ...]
    gains: tuple[float, ...]
    """Upper bounds of the weights' spectral norms."""

    def forward(self, rows: Floats) -> Floats:
        """Return [..., out] for [..., in]."""
        return self.hidden(rows)[-1] @ self.weights[-1] + self.biases[-1]

    def hidden(self, rows: Floats) -> list[Floats]:
        """Return the outputs of all tanh layers."""
        found = []
        state = rows
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            state = state @ weight
            state += bias
            np.tanh(state, out=state)
            found.append(state)
        return found

    def sensitivities(self, hidden: list[Floats], direction: Floats) -> tuple[list[Floats], Floats]:
        """Differentiate ``f = forward(x) direction``: by each hidden layer's output, and by x.

        ``hidden``: of x [..., in]; the result has [..., width] for each, in their order, and [..., in].
        """
        sensitivity = np.broadcast_to(self.weights[-1] @ direction, hidden[-1].shape)
        found = [sensitivity]
        for weight, state in zip(reversed(self.weights[:-1]), reversed(hidden), strict=True):
            sensitivity = (sensitivity * (1.0 - state * state)) @ weight.T
            found.append(sensitivity)
        return found[-2::-1], found[-1]
