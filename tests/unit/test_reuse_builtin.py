"""The built-in predictor and its certificate: always the same bits, and a bound that is never broken."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from server.predict.reuse.builtin import BuiltinEncoder, LinearHead, make_builtin
from server.predict.reuse.certificate import BEND
from server.predict.reuse.predictor import LipschitzCertificate
from tests.campaigns import cases
from tests.unit.reuse_world import BUILTIN, rows_of

ENCODER = cast("BuiltinEncoder", BUILTIN.encoder)
HEAD = cast("LinearHead", BUILTIN.head)
CERTIFICATE = BUILTIN.certificate


def errors(cached, rows):
    """Return how far off predictions from reused encodings are, as they are served, and the bounds."""
    encodings = ENCODER.encode(cached)
    reused = HEAD.predict(encodings, rows).astype(np.float64)
    fresh = HEAD.predict(ENCODER.encode(rows), rows).astype(np.float64)
    return np.abs(reused - fresh), CERTIFICATE.bounds(CERTIFICATE.anchors(cached), cached, encodings, rows)


def test_the_weights_are_always_the_same():
    assert make_builtin().fingerprint == BUILTIN.fingerprint == "33a150d515a440ddf6a00f3f285408a4"


def test_a_row_has_the_same_bits_whatever_is_in_its_batch():
    rows = rows_of(700)
    encodings, answers = ENCODER.encode(rows), HEAD.predict(ENCODER.encode(rows), rows)
    for seed, count in enumerate((1, 2, 3, 7, 8, 9, 100, 513)):
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        again = ENCODER.encode(rows[chosen])
        assert again.tobytes() == encodings[chosen].tobytes()
        assert HEAD.predict(again, rows[chosen]).tobytes() == answers[chosen].tobytes()


def test_predictions_say_something():
    rows = rows_of(2000)
    answers = HEAD.predict(ENCODER.encode(rows), rows)
    assert answers.dtype == np.float32
    assert 0.1 < answers.mean() < 0.9
    assert answers.std() > 0.2
    assert 0.25 < (answers >= 0.5).mean() < 0.75


def test_the_gains_are_the_spectral_norms():
    layers = ENCODER.layers
    for weight, gain in zip(layers.weights, layers.gains, strict=True):
        assert np.linalg.norm(weight, 2) == pytest.approx(gain, rel=1e-12)


def test_anchors_hold_the_gradient_of_what_the_head_takes():
    rows = rows_of(5, seed=3)
    anchors = CERTIFICATE.anchors(rows)
    step = 1e-6
    direction = HEAD.weights[:64]
    for feature in range(32):
        moved = np.zeros(32)
        moved[feature] = step
        there = ENCODER.layers.forward(rows.astype(np.float64) + moved) @ direction
        back = ENCODER.layers.forward(rows.astype(np.float64) - moved) @ direction
        assert anchors[:, feature] == pytest.approx((there - back) / (2 * step), abs=1e-7)


def test_tanh_bends_no_more_than_the_certificate_says():
    at = np.linspace(-3, 3, 100_001)
    assert np.abs(2 * np.tanh(at) * (1 - np.tanh(at) ** 2)).max() <= BEND
    assert BEND < 0.77


def test_no_violation_over_random_inputs():
    total, certified = 0, 0
    count = cases(500, full=5000)
    for seed, spread in enumerate((0.0, 1e-4, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e6)):
        draw = np.random.default_rng(seed)
        cached = (draw.choice([0.1, 1.0, 5.0]) * draw.standard_normal((count, 32))).astype(np.float32)
        rows = cached.copy()
        rows[:, 24:] += (spread * draw.standard_normal((count, 8))).astype(np.float32)
        error, bound = errors(cached, rows)
        assert (error <= bound).all()
        total += len(error)
        certified += (bound <= 0.05).sum()
    assert total == 10 * count
    assert certified > total / 4


def test_no_violation_where_an_adversary_looks_for_one():
    """Steps along the gradient, in single features, and to where the answer moves most."""
    cached = rows_of(400, seed=9)
    gradients = CERTIFICATE.anchors(cached)[:, :32]
    along = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    for length in (0.001, 0.02, 0.1, 0.5, 2.0):
        for direction in (along, -along, np.eye(32)[np.arange(400) % 32]):
            error, bound = errors(cached, (cached + length * direction).astype(np.float32))
            assert (error <= bound).all()
    error, bound = errors(cached, (cached + 0.01 * along).astype(np.float32))
    assert np.median(error / bound) > 0.5  # the bound is of use: twice the truth, not a hundred times


def test_an_equal_row_is_certified_to_rounding():
    rows = rows_of(50)
    error, bound = errors(rows, rows)
    assert (error == 0).all()
    assert bound.max() < 1e-5


def test_only_directions_that_differ_count():
    """A displacement across the gradient is bounded by curvature alone, far below Lipschitz's bound."""
    cached = rows_of(200, seed=4)
    gradients = CERTIFICATE.anchors(cached)[:, :32]
    across = np.random.default_rng(5).standard_normal((200, 32))
    across -= (across * gradients).sum(1, keepdims=True) / (gradients**2).sum(1, keepdims=True) * gradients
    across *= 0.02 / np.linalg.norm(across, axis=1, keepdims=True)
    rows = (cached + across).astype(np.float32)
    _, bound = errors(cached, rows)
    by_norms_alone = 4.0 * 2.75 * 0.02 / 4  # |v| s r, and the sigmoid's steepest slope
    assert np.median(bound) < by_norms_alone / 20


def test_the_simple_certificate_bounds_by_distance():
    certificate = LipschitzCertificate(2.0, 0.001)
    cached = np.zeros((2, 3), np.float32)
    rows = np.array([[0, 0, 0], [0, 3, 4]], np.float32)
    anchors = certificate.anchors(cached)
    assert anchors.shape == (2, 0)
    bounds = certificate.bounds(anchors, cached, np.zeros((2, 1), np.float32), rows)
    assert bounds == pytest.approx([0.001, 10.001])


def test_extreme_rows_give_numbers():
    largest = float(np.finfo(np.float32).max)
    rows = np.array([[largest] * 32, [-largest] * 32, [0.0] * 32, [1e-45] * 32], np.float32)
    answers = HEAD.predict(ENCODER.encode(rows), rows)
    assert np.isfinite(answers).all()
    error, bound = errors(np.zeros_like(rows), rows)
    assert (error <= bound).all()


def test_the_encoder_is_what_costs():
    assert BUILTIN.num_parameters > 1000 * len(HEAD.weights)
