"""The built-in predictor: 32 features, fixed weights, a certificate.

::

    h1 = tanh(x W1 + b1)   h2 = tanh(h1 W2 + b2)   h3 = tanh(h2 W3 + b3)   encoding = h3 W4 + b4
       32 -> 256              256 -> 256              256 -> 256              256 -> 64
    prediction = sigmoid(encoding v + x u + c)

155,648 multiplications for a row in the encoder, 96 in the head. Every matrix is a corner of a signed,
shuffled Hadamard matrix times one number: rows or columns are exactly orthogonal, so that spectral norms are
known and not estimated (``Layers.gains``), which is what the certificate lives on.

The same bits for every batch size and in every run: weights come from raw 64-bit draws of PCG64 (its stream
is fixed; what NumPy makes of one may change between versions), are small multiples of powers of two, and
products are computed row by row, because a matrix product's rounding depends on its shape.
Arithmetic is float64, the encoding is rounded to float32 once: it costs twice the time of float32, and makes
the certificate's share for rounding 1e-5 instead of several hundredths.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from server.predict.reuse.certificate import SmoothCertificate
from server.predict.reuse.layers import Layers, one_by_one
from server.predict.reuse.predictor import Floats, Predictor, Singles

__all__ = ["BUILTIN_SEED", "BuiltinEncoder", "LinearHead", "make_builtin"]

BUILTIN_SEED = 20_260_701
NUM_FEATURES, WIDTH, NUM_DIMENSIONS = 32, 256, 64
CHUNK = 512
"""Rows whose hidden layers are in memory at once: 1 MiB for each layer."""


@dataclass(frozen=True, slots=True)
class BuiltinEncoder:
    """The encoder of the module's text."""

    layers: Layers

    def encode(self, rows: Singles) -> Singles:
        out = np.empty((len(rows), NUM_DIMENSIONS), np.float32)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            out[start : start + CHUNK] = self.layers.forward(one_by_one(part))[:, 0]
        return out


@dataclass(frozen=True, slots=True)
class LinearHead:
    """``sigmoid(encoding v + x u + c)``, in float64, rounded to float32 at the end."""

    weights: Floats
    """Of an encoding, then of a row."""
    bias: float

    def logits(self, encodings: Singles, rows: Singles) -> Floats:
        """Return what goes into the sigmoid. Sums along a row do not know of other rows."""
        products = np.concatenate([encodings, rows], axis=1) * self.weights
        total: Floats = np.add.reduce(products, axis=1)
        return total + self.bias

    def predict(self, encodings: Singles, rows: Singles) -> Singles:
        # Beyond 80 nothing changes in float32; exp would overflow for rows near the largest float.
        logits = np.minimum(np.maximum(self.logits(encodings, rows), -80.0), 80.0)
        return (1.0 / (1.0 + np.exp(-logits))).astype(np.float32)


def make_builtin() -> Predictor:
    """Make the predictor of the module's text; always the same."""
    draw = np.random.PCG64(BUILTIN_SEED)
    layers = Layers(
        weights=(
            _mix(draw, NUM_FEATURES, WIDTH, 11 / 64),
            _mix(draw, WIDTH, WIDTH, 1 / 16),
            _mix(draw, WIDTH, WIDTH, 1 / 16),
            _mix(draw, WIDTH, NUM_DIMENSIONS, 1 / 16),
        ),
        biases=(
            _biases(draw, WIDTH),
            _biases(draw, WIDTH),
            _biases(draw, WIDTH),
            _biases(draw, NUM_DIMENSIONS),
        ),
        # A corner with r orthogonal vectors of 256 entries +-m stretches by exactly m * sqrt(256).
        gains=(11 / 64 * 16, 1.0, 1.0, 1.0),
    )
    direction = _signs(draw, NUM_DIMENSIONS) / 2
    head = LinearHead(np.concatenate([direction, _signs(draw, NUM_FEATURES) / 16]), 0.0)
    arrays = [*layers.weights, *layers.biases, head.weights]
    digest = hashlib.blake2b(b"".join(each.astype("<f8").tobytes() for each in arrays), digest_size=16)
    return Predictor(
        num_features=NUM_FEATURES,
        num_dimensions=NUM_DIMENSIONS,
        encoder=BuiltinEncoder(layers),
        head=head,
        certificate=SmoothCertificate(layers, direction, head.logits),
        num_parameters=sum(each.size for each in arrays) + 1,
        fingerprint=digest.hexdigest(),
    )


def _signs(draw: np.random.PCG64, count: int) -> Floats:
    signs: Floats = 1.0 - 2.0 * (draw.random_raw(count) >> np.uint64(63)).astype(np.float64)
    return signs


def _biases(draw: np.random.PCG64, count: int) -> Floats:
    """Return multiples of 1/64 between -1/2 and 1/2."""
    biases: Floats = (draw.random_raw(count) >> np.uint64(58)).astype(np.float64) / 64.0 - 0.5
    return biases


def _mix(draw: np.random.PCG64, rows: int, columns: int, size: float) -> Floats:
    """Return a corner of a Hadamard matrix of 256, its rows and columns shuffled, with random signs."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < WIDTH:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    order = [np.argsort(draw.random_raw(WIDTH), kind="stable") for _ in range(2)]
    corner = hadamard[order[0]][:, order[1]][:rows, :columns]
    mixed: Floats = np.ascontiguousarray(size * _signs(draw, rows)[:, None] * corner * _signs(draw, columns))
    return mixed
