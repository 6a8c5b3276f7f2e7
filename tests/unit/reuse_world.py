"""What tests of reuse share: models on a clock that they move, rows, and predictors that change with time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvcore.clock import ManualClock
from server.predict.messages import Inputs, PolicyReport, ReuseEvent
from server.predict.options import FeatureSpec
from server.predict.reuse.build import make_feature_model
from server.predict.reuse.builtin import make_builtin
from server.predict.reuse.predictor import Predictor

BUILTIN = make_builtin()


class World:
    """A feature model, its clock, and what it told."""

    def __init__(self, predictor: Predictor | None = None, **spec) -> None:
        self.clock = ManualClock()
        self.events: list[ReuseEvent] = []
        self.listener: Callable[[ReuseEvent], None] = self.events.append
        self.predictor = predictor or BUILTIN
        self.model = make_feature_model(
            "risk",
            "1",
            FeatureSpec(**spec),
            self.predictor,
            clock=self.clock,
            on_event=lambda event: self.listener(event),
        )

    def ask(self, rows, *, reuse: bool = True, tenant: str = ""):
        """Return predictions and hits of rows, as one batch."""
        rows = np.atleast_2d(np.asarray(rows, np.float32))
        inputs = Inputs(rows=rows.tobytes(), num_rows=len(rows))
        outputs = self.model.run(self.model.prepare(inputs, truncate=False, reuse=reuse, tenant=tenant))
        self.model.check_integrity()
        values = np.array([np.frombuffer(each.values, "<f4")[0] for each in outputs], np.float32)
        return values, [each.cache_hit for each in outputs]

    def fresh(self, rows) -> np.ndarray:
        """Return predictions that reuse nothing."""
        rows = np.atleast_2d(np.asarray(rows, np.float32))
        return self.predictor.head.predict(self.predictor.encoder.encode(rows), rows)

    def report(self, policy: int = 0, *, max_keys: int = 0) -> PolicyReport:
        report = self.model.reuse_report(max_keys=max_keys).policies[policy]
        missed = report.num_absent + report.num_expired + report.num_stopped + report.num_uncertified
        assert report.num_lookups == report.num_hits + missed
        return report

    def kinds(self, *, of_keys: bool = False) -> list[str]:
        """Return what was told of all keys together, or of single ones."""
        return [event.kind.value for event in self.events if bool(event.key) == of_keys]


def rows_of(count: int, seed: int = 0, features: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, features)).astype(np.float32)


@dataclass
class Turning:
    """An encoder whose own weights drift: the same row is encoded otherwise as time goes by.

    Rows of two: what the key sees, and what it does not. The encoding is a direction, turned by ``speed``
    for each second and by the second feature.
    """

    clock: ManualClock
    speed: float = 0.0
    num_calls: int = 0
    num_rows: int = 0

    def encode(self, rows):
        self.num_calls += 1
        self.num_rows += len(rows)
        angle = rows[:, 0].astype(np.float64) + rows[:, 1] + self.speed * self.clock.now()
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


class Half:
    """A head: 0.5 more or less half of the first entry."""

    def predict(self, encodings, rows):
        return np.clip(0.5 + 0.5 * encodings[:, 0], 0.0, 1.0).astype(np.float32)


class TurningWorld(World):
    """A world around a turning encoder."""

    def __init__(self, speed: float = 0.0, **spec) -> None:
        self.encoder = Turning(ManualClock(), speed)
        super().__init__(Predictor(2, 2, self.encoder, Half()), **{"prefix": 1, **spec})
        self.encoder.clock = self.clock

    def visit(self, seed: int, count: int, *, keys: int = 20, noise: float = 0.0, wait_s: float = 0.1):
        """Let ``count`` batches of one row for each key come, ``wait_s`` apart; return how they were off."""
        draw = np.random.default_rng(seed)
        angles = np.linspace(0.0, 2 * math.pi, keys, endpoint=False) + 0.05
        wrong = []
        for _ in range(count):
            self.clock.advance(wait_s)
            rows = np.stack([angles, noise * draw.standard_normal(keys)], axis=1).astype(np.float32)
            got, hits = self.ask(rows)
            fresh = self.fresh(rows)
            changed = ((got >= 0.5) != (fresh >= 0.5)) | (abs(got - fresh) > 0.05)
            wrong.append((int(changed[hits].sum()), sum(hits)))
        return np.array(wrong)
