"""The certificate on a chain of single neurons, where everything that it says can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.predict.reuse.certificate import SmoothCertificate
from server.predict.reuse.layers import Layers

IN, MID, OUT, HEAD = 1.5, -2.0, 0.75, 3.0
"""Weights: of the two tanh layers, of the linear one, and of the head."""
BIAS_IN, BIAS_MID, BIAS_OUT = 0.1, -0.3, 0.5
BEND = 4 / (3 * math.sqrt(3))
ROUNDING = 2 * HEAD * (OUT + BIAS_OUT) * 2.0**-24 + 1e-9


def chain(logit: float = 0.0) -> SmoothCertificate:
    """Certify ``f(x) = HEAD * (OUT * tanh(MID * tanh(IN * x + ...) + ...) + ...)`` at a logit."""
    layers = Layers(
        weights=tuple(np.array([[weight]]) for weight in (IN, MID, OUT)),
        biases=tuple(np.array([bias]) for bias in (BIAS_IN, BIAS_MID, BIAS_OUT)),
        gains=(abs(IN), abs(MID), abs(OUT)),
    )
    return SmoothCertificate(layers, np.array([HEAD]), lambda encodings, rows: np.full(len(rows), logit))


def parts(x: float) -> tuple[float, float, float]:
    """Return the gradient at x, and what the bound has of the square and the cube of the distance."""
    first = math.tanh(IN * x + BIAS_IN)
    second = math.tanh(MID * first + BIAS_MID)
    by_second = OUT * HEAD
    by_first = by_second * (1 - second**2) * MID
    to_first, to_second = abs(IN), abs(IN * MID)
    square = BEND / 2 * (to_second**2 * abs(by_second) + to_first**2 * abs(by_first))
    cube = BEND / 2 * to_first**2 * abs(MID) * abs(by_second) * BEND * to_second
    return by_first * (1 - first**2) * IN, square, cube


def bound_of(certificate: SmoothCertificate, cached: float, row: float) -> float:
    there, here = np.array([[cached]], np.float32), np.array([[row]], np.float32)
    [bound] = certificate.bounds(certificate.anchors(there), there, np.zeros((1, 1), np.float32), here)
    return float(bound)


def test_rounding_grows_with_the_width_of_the_last_layer() -> None:
    layers = Layers(
        weights=(np.array([[IN] * 4]), np.array([[0.5]] * 4)),
        biases=(np.zeros(4), np.array([BIAS_OUT])),
        gains=(abs(IN) * 2, 1.0),
    )
    certificate = SmoothCertificate(layers, np.array([HEAD]), lambda encodings, rows: np.zeros(len(rows)))
    rounding = 2 * HEAD * (1.0 * math.sqrt(4) + BIAS_OUT) * 2.0**-24 + 1e-9
    assert bound_of(certificate, 0.5, 0.5) == pytest.approx(rounding / 4 + 2 * 2.0**-24, rel=1e-4)


@pytest.mark.parametrize("x", [-2.0, -0.3, 0.0, 0.4, 1.7])
def test_anchors_are_the_gradient_and_the_two_bounds_on_curvature(x: float) -> None:
    [anchor] = chain().anchors(np.array([[x]], np.float32))
    assert anchor == pytest.approx(parts(float(np.float32(x))), rel=1e-9)


def test_anchors_of_many_rows_are_those_of_each() -> None:
    rows = np.linspace(-2, 2, 11, dtype=np.float32).reshape(-1, 1)
    together = chain().anchors(rows)
    assert together.shape == (11, 3)
    for row, anchor in zip(rows, together, strict=True):
        assert chain().anchors(row.reshape(1, 1))[0].tolist() == anchor.tolist()


@pytest.mark.parametrize("distance", [0.0, 0.001, 0.02, -0.1, 0.3])
def test_a_step_is_bounded_by_slope_and_curvature(distance: float) -> None:
    cached = 0.25
    gradient, square, cube = parts(cached)
    row = float(np.float32(cached + distance))
    r = abs(row - cached)
    off = min(abs(gradient * r) + square * r**2 + cube * r**3, HEAD * abs(IN * MID * OUT) * r) + ROUNDING
    assert bound_of(chain(), cached, row) == pytest.approx(off / 4 + 2 * 2.0**-24, rel=1e-6)


def test_a_long_way_is_bounded_by_the_product_of_norms() -> None:
    off = HEAD * abs(IN * MID * OUT) * 8.0 + ROUNDING
    assert bound_of(chain(), 0.0, 8.0) == pytest.approx(off / 4 + 2 * 2.0**-24, rel=1e-6)


@pytest.mark.parametrize("logit", [5.0, -5.0])
def test_where_the_answer_is_sure_the_sigmoid_hides_most_of_the_error(logit: float) -> None:
    at_the_edge = bound_of(chain(0.0), 0.25, 0.26)
    sure = bound_of(chain(logit), 0.25, 0.26)
    off = (at_the_edge - 2 * 2.0**-24) * 4
    chance = 1 / (1 + math.exp(5.0 - off))  # no steeper than at the nearest logit that can be reached
    assert sure == pytest.approx(off * chance * (1 - chance) + 2 * 2.0**-24, rel=1e-5)


def test_no_step_of_the_chain_is_longer_than_its_bound() -> None:
    def taken_in(x: np.ndarray) -> np.ndarray:
        return HEAD * (OUT * np.tanh(MID * np.tanh(IN * x + BIAS_IN) + BIAS_MID) + BIAS_OUT)

    places = np.linspace(-2.5, 2.5, 201).astype(np.float32)
    cached, rows = (each.reshape(-1, 1) for each in np.meshgrid(places, places))
    certificate = chain()
    bounds = certificate.bounds(certificate.anchors(cached), cached, cached, rows)
    moved = np.abs(taken_in(rows.astype(float)) - taken_in(cached.astype(float)))
    assert (moved[:, 0] / 4 <= bounds).all()
    near = np.abs(rows - cached) < 0.03
    far = moved > 0.01
    assert np.median((moved / 4 / bounds.reshape(-1, 1))[near & far]) > 0.8  # and it says something
