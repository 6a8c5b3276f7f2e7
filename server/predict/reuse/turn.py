"""How a batch is answered: lookups, one pass of the encoder, heads, and what is learned from it.

::

    rows ---- look up (lock) ---- certify ---- count, draw (lock) ---- encode what is missing or compared
          \\-- rows whose key an earlier row of the batch computes wait, and are looked up afterwards --/
    ---- heads: answers, and for comparisons the other answer ---- keep, learn (lock)

Nothing is kept unless everything was computed, and an answer depends on no other row of the batch but through
what is kept: a row is told apart from its batch only by what it may reuse.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from struct import Struct
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from server.predict.errors import ComputeError
from server.predict.messages import Output
from server.predict.reuse.compare import cosine_and_l2, is_changed
from server.predict.reuse.lifetimes import Comparison
from server.predict.reuse.policy import Lookup, Outcome, ReusePolicy
from server.predict.reuse.predictor import Certificate, Floats, Predictor, Singles

__all__ = ["FeatureRow", "Pass"]

Number = TypeVar("Number", bound=np.generic)

log = logging.getLogger("kvserve.predict.reuse")


_to_bytes = Struct("<f").pack


class FeatureRow(msgspec.Struct, frozen=True):
    """A checked row with its key; without a policy nothing is reused for it, or kept."""

    values: bytes
    """float32, little-endian."""
    policy: ReusePolicy | None
    key: bytes


class Pass:
    """The rows of a batch that are answered together. Made, looked up, computed and kept in that order."""

    def __init__(self, rows: Sequence[FeatureRow]) -> None:
        self.rows = rows
        data = b"".join([row.values for row in rows])
        self.values: Singles = np.frombuffer(data, "<f4").reshape(len(rows), -1)
        self.lookups: list[Lookup | None] = []
        self.fresh: list[int] = []
        """Rows that go through the encoder, ascending."""
        self._fresh_encodings: Singles | None = None
        self._anchors: dict[int, Floats] = {}
        self._comparisons: dict[int, Comparison] = {}
        self.predictions: list[float] = []

    def look_up(self, now: float, *, waits: bool) -> list[int]:
        """Look all rows up; return those that wait for an earlier one, which leave the pass. Lock held."""
        computing: set[tuple[int, bytes]] = set()
        waiting: list[int] = []
        staying: list[int] = []
        for number, row in enumerate(self.rows):
            policy = row.policy
            if policy is None:
                self.lookups.append(None)
                staying.append(number)
                continue
            name = (id(policy), row.key)
            if waits and name in computing:
                waiting.append(number)
                continue
            lookup = policy.look_up(row.key, now)
            if lookup.outcome is not Outcome.HIT and not lookup.keeps_entry:
                computing.add(name)
            self.lookups.append(lookup)
            staying.append(number)
        if waiting:
            self.rows = [self.rows[number] for number in staying]
            self.values = self.values[staying]
        return waiting

    def certify(self, certificate: Certificate) -> None:
        """Take back hits whose error is not bounded well enough."""
        asked: list[tuple[int, Lookup, float]] = []
        for number, lookup in enumerate(self.lookups):
            policy = self.rows[number].policy
            if lookup is None or policy is None or lookup.outcome is not Outcome.HIT:
                continue
            if policy.settings.max_error is not None:
                asked.append((number, lookup, policy.settings.max_error))
        entries = [lookup.entry for _, lookup, _ in asked if lookup.entry is not None]
        if not entries:
            return
        bounds = certificate.bounds(
            _together([entry.anchor for entry in entries if entry.anchor is not None]),
            _together([entry.row for entry in entries]),
            _together([entry.encoding for entry in entries]),
            self.values if len(asked) == len(self.rows) else self.values[[number for number, _, _ in asked]],
        )
        for (_, lookup, max_error), bound in zip(asked, bounds.tolist(), strict=True):
            if not bound <= max_error:  # not a number certifies nothing
                lookup.outcome = Outcome.UNCERTIFIED

    def count(self) -> None:
        """Count outcomes and draw comparisons. Lock held."""
        for number, (row, lookup) in enumerate(zip(self.rows, self.lookups, strict=True)):
            if lookup is not None and row.policy is not None:
                row.policy.count(lookup)
            if lookup is None or lookup.computes:
                self.fresh.append(number)

    def encode(self, predictor: Predictor) -> None:
        """Compute what is missing or compared, and the certificate's part of what will be kept."""
        if not self.fresh:
            return
        everything = len(self.fresh) == len(self.rows)
        rows = self.values if everything else self.values[self.fresh]
        encodings = _guarded(lambda: predictor.encoder.encode(rows))
        if encodings.shape != (len(rows), predictor.num_dimensions) or encodings.dtype != np.float32:
            raise ComputeError("the model gave encodings of another shape or type than it says")
        if not np.isfinite(encodings).all():
            raise ComputeError("the model gave an encoding that is not a number")
        self._fresh_encodings = encodings
        anchored = [place for place, number in enumerate(self.fresh) if self._needs_anchor(number)]
        if anchored and predictor.certificate is not None:
            anchors = predictor.certificate.anchors(rows[anchored])
            self._anchors = {
                self.fresh[place]: anchor for place, anchor in zip(anchored, anchors, strict=True)
            }

    def predict(self, predictor: Predictor) -> None:
        """Let the head answer, and compare."""
        fresh = self._fresh_encodings
        place_of = {number: place for place, number in enumerate(self.fresh)}
        reused: list[Singles] = []
        for number, lookup in enumerate(self.lookups):
            if lookup is not None and lookup.outcome is Outcome.HIT and lookup.entry is not None:
                reused.append(lookup.entry.encoding)
            elif fresh is not None:
                reused.append(fresh[place_of[number]])
        compared = [n for n, lookup in enumerate(self.lookups) if lookup is not None and lookup.compares]
        if len(reused) == 1 and not compared:
            self.predictions = self._ask(predictor, reused[0].reshape(1, -1), self.values)
            return
        others = [self._other(number, place_of) for number in compared]
        encodings = _together(reused + others)
        answers = self._ask(predictor, encodings, np.concatenate([self.values, self.values[compared]]))
        self.predictions = answers[: len(self.rows)]
        for place, number in enumerate(compared):
            lookup, other = self.lookups[number], len(self.rows) + place
            is_hit = lookup is not None and lookup.outcome is Outcome.HIT
            old, new = (number, other) if is_hit else (other, number)
            cosine, l2 = cosine_and_l2(encodings[old], encodings[new])
            changed = is_changed(answers[old], answers[new])
            age = 0.0 if lookup is None else lookup.age_s
            self._comparisons[number] = Comparison(age, cosine, l2, changed)

    def keep(self, now: float) -> None:
        """Keep what was computed, and learn from comparisons. Lock held."""
        for place, number in enumerate(self.fresh):
            row, lookup, fresh = self.rows[number], self.lookups[number], self._fresh_encodings
            if lookup is None or row.policy is None or fresh is None:
                continue
            if lookup.outcome is not Outcome.HIT and not lookup.keeps_entry:
                anchor = self._anchors.get(number)
                row.policy.keep(row.key, self.values[number], fresh[place], anchor, now)
            comparison = self._comparisons.get(number)
            if comparison is not None:
                row.policy.learn(row.key, lookup, comparison)

    def outputs(self) -> list[Output]:
        """Return the outputs of the rows that stayed, in their order."""
        return [
            Output(
                _to_bytes(prediction),
                cache_hit=lookup is not None and lookup.outcome is Outcome.HIT,
                policy="" if row.policy is None else row.policy.settings.name,
            )
            for row, lookup, prediction in zip(self.rows, self.lookups, self.predictions, strict=True)
        ]

    def _needs_anchor(self, number: int) -> bool:
        policy, lookup = self.rows[number].policy, self.lookups[number]
        if policy is None or lookup is None or policy.settings.max_error is None:
            return False
        return lookup.outcome is not Outcome.HIT and not lookup.keeps_entry

    def _other(self, number: int, place_of: dict[int, int]) -> Singles:
        """Return the encoding that the row is not answered with: the fresh one of a hit, else the old one."""
        lookup = self.lookups[number]
        assert lookup is not None
        assert lookup.entry is not None
        assert self._fresh_encodings is not None
        if lookup.outcome is Outcome.HIT:
            encoding: Singles = self._fresh_encodings[place_of[number]]
            return encoding
        return lookup.entry.encoding

    @staticmethod
    def _ask(predictor: Predictor, encodings: Singles, rows: Singles) -> list[float]:
        predictions = _guarded(lambda: predictor.head.predict(encodings, rows))
        if predictions.shape != (len(rows),) or predictions.dtype != np.float32:
            raise ComputeError("the model gave predictions of another shape or type than it says")
        values: list[float] = predictions.tolist()
        if not all(0.0 <= value <= 1.0 for value in values):  # not a number is not
            raise ComputeError("the model gave a prediction that is not between 0 and 1")
        return values


def _together(rows: list[npt.NDArray[Number]]) -> npt.NDArray[Number]:
    """Return [n, F] of n rows; of a single one without a copy, which is what most batches have."""
    return (rows[0] if len(rows) == 1 else np.concatenate(rows)).reshape(len(rows), -1)


def _guarded(compute: Callable[[], Singles]) -> Singles:
    """Call somebody else's code: whatever it raises, this batch could not be computed."""
    try:
        return compute()
    except ComputeError:
        raise
    except Exception as fault:
        log.exception("a predictor failed")
        raise ComputeError("the model could not compute this") from fault
