r"""A certificate for tanh layers: how far a prediction can be off, from one gradient and bounds on curvature.

Let ``f(x) = encoding(x) v`` be all that the head takes from the encoding. At the cached input x0 the gradient
``g = f'(x0)`` is kept. For a fresh x with ``d = x - x0`` and ``r = |d|`` Taylor's theorem says

    |f(x) - f(x0)|  <=  |g d|  +  r^2 / 2 * sup |f''|        (sup over the segment between x0 and x)

Only features that differ enter ``d``: with an exact key those are the features behind it, so that ``g d``
uses exactly their part of the gradient. The second derivative is a sum over layers, with ``a_l`` the input of
layer l's tanh, ``c_l`` the derivative of f by its output and ``J_l`` that of ``a_l`` by x:

    f'' = sum_l  J_l^T diag(c_l * tanh''(a_l)) J_l,     |f''| <= sum_l  max|c_l| * B * |J_l|^2

with ``B = max |tanh''| = 4 / (3 sqrt 3)`` and ``|J_l| <= s_l``, the product of the spectral norms up to l.
Bounding ``max|c_l|`` by norms as well would give it all away: it is computed at x0, and grows along the
segment by no more than the tanh' in it can change. With ``c_l = (c_{l+1} * tanh'(a_{l+1})) W_{l+1}^T``, and
as ``|change of tanh'(a_l)| <= B s_l r`` in the Euclidean norm:

    change of c_L  = 0
    change of c_l <= norm(W_{l+1}) * (|change of c_{l+1}| + max|c_{l+1}(x0)| * B s_{l+1} r)

in the Euclidean norm, hence in the largest entry too. It is linear in r: the bound is
``|g d| + A r^2 + C r^3``, with A and C kept with the entry. The lesser of it and ``|v| s r`` (the product of
norms alone) counts. Where the gradient is small or the displacement lies across it, that is much less than
Lipschitz's bound.

The sigmoid is no steeper than at the point nearest to 0 that the logit can reach. Rounding: float64 inside
(relative 1e-9 is added, a thousand times what it can be), the encoding rounded to float32 once (both times),
the prediction too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from server.predict.reuse.layers import Layers, one_by_one
from server.predict.reuse.predictor import Floats, Singles

__all__ = ["SmoothCertificate"]

BEND = 4.0 / (3.0 * math.sqrt(3.0))
"""Largest absolute second derivative of tanh."""

SINGLE = 2.0**-24
"""Relative rounding error of float32."""


class SmoothCertificate:
    """See the module's text. Anchors: the gradient [F], then A and C."""

    def __init__(
        self, layers: Layers, direction: Floats, logits: Callable[[Singles, Singles], Floats]
    ) -> None:
        """Bound errors of ``sigmoid(logits(encodings, rows))``, which take ``encodings direction`` in."""
        self._layers = layers
        self._direction = direction
        self._logits = logits
        self._reach = np.cumprod(layers.gains[:-1])
        """s_l."""
        length = float(np.linalg.norm(direction))
        self._lipschitz = length * float(self._reach[-1]) * layers.gains[-1]
        longest = layers.gains[-1] * math.sqrt(layers.weights[-1].shape[0]) + float(
            np.linalg.norm(layers.biases[-1])
        )
        # Of the logit, fresh and reused: every entry of an encoding is off by 2^-24 of itself.
        self._rounding = 2.0 * length * longest * SINGLE * (1 + 1e-6) + 1e-9

    def anchors(self, rows: Singles) -> Floats:
        hidden = self._layers.hidden(one_by_one(rows))
        sensitivities, gradient = self._layers.sensitivities(hidden, self._direction)
        square, cube, grows = (np.zeros(gradient.shape[:2]) for _ in range(3))
        # ``grows``: |change of c_l| for each unit of r
        for layer in reversed(range(len(hidden))):
            largest = np.abs(sensitivities[layer]).max(axis=2)
            bend = BEND / 2 * self._reach[layer] ** 2
            square += bend * largest
            cube += bend * grows
            grows = self._layers.gains[layer] * (grows + largest * BEND * self._reach[layer])
        anchors: Floats = np.concatenate([gradient, square[..., None], cube[..., None]], axis=2)[:, 0]
        return anchors

    def bounds(self, anchors: Floats, cached: Singles, encodings: Singles, rows: Singles) -> Floats:
        moved = rows.astype(np.float64) - cached
        squared = (moved * moved).sum(axis=1)
        distance = np.sqrt(squared)
        tilt = np.abs((moved * anchors[:, :-2]).sum(axis=1))
        # Of the products in the sum, whose rounding does not cancel as they do.
        slack = 1e-9 * distance * np.sqrt((anchors[:, :-2] ** 2).sum(axis=1))
        curved = tilt + slack + squared * (anchors[:, -2] + anchors[:, -1] * distance)
        off = np.minimum(curved, self._lipschitz * distance) * (1 + 1e-9) + self._rounding
        nearest = np.maximum(np.abs(self._logits(encodings, rows)) - off, 0.0)
        chance = 1.0 / (1.0 + np.exp(np.minimum(nearest, 700.0)))
        steepest = chance * (1.0 - chance)
        bound: Floats = off * steepest * (1 + 1e-9) + 2 * SINGLE
        return bound
