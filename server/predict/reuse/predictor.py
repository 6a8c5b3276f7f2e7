"""What a stateful predictor is: a slow encoder, a cheap head, and perhaps a certificate.

::

    row [F] --encode (slow)--> encoding [D] --\\
       \\-------------------------------------- predict (cheap) --> 0..1

The encoder sees the whole row; its output is kept under a part of the row, so that using it for another row
is an approximation. The head always gets the fresh row. All arrays have one row for each input; all methods
are called by one thread at a time and must give a row the same bits whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "Certificate",
    "Encoder",
    "Floats",
    "Head",
    "LipschitzCertificate",
    "Predictor",
    "PredictorFactory",
    "Singles",
]

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


class Encoder(Protocol):
    """The expensive half."""

    def encode(self, rows: Singles) -> Singles:
        """Return [n, D] for rows [n, F], all finite. Deterministic, and row by row independent of n."""
        ...


class Head(Protocol):
    """The cheap half."""

    def predict(self, encodings: Singles, rows: Singles) -> Singles:
        """Return [n] in 0..1 for encodings [n, D] and rows [n, F]; row by row independent of n."""
        ...


class Certificate(Protocol):
    """Knows how far a prediction can be off when an encoding is reused, without computing the fresh one."""

    def anchors(self, rows: Singles) -> Floats:
        """Return [n, A] of what is kept beside the encodings of these rows; A may be 0."""
        ...

    def bounds(self, anchors: Floats, cached: Singles, encodings: Singles, rows: Singles) -> Floats:
        """Bound the prediction's error [n], rounding included.

        For each row: ``|predict(encodings, rows) - predict(encode(rows), rows)|`` is at most this, where
        ``encodings`` are those of the rows ``cached``, and ``anchors`` theirs. Infinity: nothing is known.
        """
        ...


@dataclass(frozen=True, slots=True)
class Predictor:
    """An encoder with its head."""

    num_features: int
    num_dimensions: int
    """D, of an encoding."""
    encoder: Encoder
    head: Head
    certificate: Certificate | None = None
    num_parameters: int = 0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.num_features < 1 or self.num_dimensions < 1:
            raise ValueError("a predictor has at least one feature and one dimension")


PredictorFactory = Callable[[], Predictor]


@dataclass(frozen=True, slots=True)
class LipschitzCertificate:
    """The simple certificate, for predictors of which one number is known.

    ``lipschitz``: the prediction as a function of the encoder's input, the head's own row held fixed, changes
    by at most so much for each unit of Euclidean distance. ``rounding``: by how much two computed predictions
    can be further apart than the exact ones.
    """

    lipschitz: float
    rounding: float

    def __post_init__(self) -> None:
        if not (self.lipschitz >= 0 and self.rounding >= 0):
            raise ValueError("lipschitz and rounding are not negative")

    def anchors(self, rows: Singles) -> Floats:
        return np.zeros((len(rows), 0))

    def bounds(self, anchors: Floats, cached: Singles, encodings: Singles, rows: Singles) -> Floats:
        moved = rows.astype(np.float64) - cached
        distance = np.sqrt((moved * moved).sum(axis=1))
        bound: Floats = self.lipschitz * distance * (1 + 1e-12) + self.rounding
        return bound
