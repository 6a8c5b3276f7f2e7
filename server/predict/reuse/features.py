"""A stateful encoder as a model: rows of features in, numbers in 0..1 out, encodings reused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import numpy as np

from kvcore.clock import Clock
from server.predict.errors import InputError, WrongTaskError
from server.predict.messages import (
    Inputs,
    ModelInfo,
    Output,
    PolicyReport,
    ReuseEvent,
    ReuseReport,
    Task,
)
from server.predict.model import Prepared
from server.predict.reuse.events import EventBox
from server.predict.reuse.keys import KeyNames, KeyRule, shares_of
from server.predict.reuse.policy import Outcome, PolicySettings, ReusePolicy
from server.predict.reuse.predictor import Predictor, Singles
from server.predict.reuse.store import OVERHEAD_BYTES
from server.predict.reuse.turn import FeatureRow, Pass

__all__ = ["FeatureModel"]

log = logging.getLogger("kvserve.predict.reuse")

MODEL_BYTES = 1 << 20
"""What a predictor is taken to need beside its parameters: activations of one pass, and the objects."""


class FeatureModel:
    """A ``ReusingModel``. ``prepare`` on any thread, ``run`` on one at a time, the rest on any."""

    def __init__(
        self,
        name: str,
        version: str,
        predictor: Predictor,
        policies: Sequence[PolicySettings],
        *,
        routing: KeyRule,
        clock: Clock,
        on_event: Callable[[ReuseEvent], None],
    ) -> None:
        """Take the main policy first, then canaries, each with its share of the rows.

        ``routing``: what rows have in common that go to the same policy.
        """
        self._name, self._version = name, version
        self._predictor = predictor
        self._routing = routing
        self._is_certified = any(policy.max_error is not None for policy in policies)
        self._seed = policies[0].seed
        self._clock = clock
        self._lock = threading.Lock()
        self._events = EventBox(self._lock, log, on_event)
        names = KeyNames()
        self._policies = [
            ReusePolicy(
                each,
                bytes_per_entry=bytes_per_entry(predictor, each),
                names=names,
                on_event=partial(self._note, each.name),
            )
            for each in policies
        ]
        room = sum(policy.store.capacity * policy.store.bytes_per_entry for policy in self._policies)
        self._info = ModelInfo(
            task=Task.FEATURES,
            family="features",
            num_features=predictor.num_features,
            fingerprint=predictor.fingerprint,
            num_parameters=predictor.num_parameters,
            num_bytes=8 * predictor.num_parameters + room + MODEL_BYTES,
            dtype="float32",
            device="cpu",
            executor="features",
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
        if inputs.texts:
            raise WrongTaskError("the model takes rows of features, not texts")
        rows = self._read(inputs)
        size = rows.strides[0]
        values = [inputs.rows[start : start + size] for start in range(0, len(inputs.rows), size)]
        if not reuse:
            return [Prepared(1, FeatureRow(row, None, b""), reuse=False, tenant=tenant) for row in values]
        if len(self._policies) == 1:
            main = self._policies[0]
            own = main.settings.rule.keys(rows, tenant)
            return [
                Prepared(1, FeatureRow(row, main, key), tenant=tenant)
                for row, key in zip(values, own, strict=True)
            ]
        policies = self._route(rows)
        keys = {policy: policy.settings.rule.keys(rows, tenant) for policy in dict.fromkeys(policies)}
        return [
            Prepared(1, FeatureRow(row, policy, keys[policy][number]), tenant=tenant)
            for number, (row, policy) in enumerate(zip(values, policies, strict=True))
        ]

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        rows: list[FeatureRow] = [prepared.payload for prepared in batch]
        outputs: list[Output | None] = [None] * len(rows)
        places = list(range(len(rows)))
        waits = len(rows) > 1
        try:
            while places:
                waiting = self._answer(rows, places, outputs, waits=waits)
                waits, places = False, waiting
        finally:
            self._events.empty()
        return [output for output in outputs if output is not None]

    def close(self) -> None:
        """Forget everything that is kept."""
        self.clear_reuse()

    def reuse_report(self, *, max_keys: int) -> ReuseReport:
        with self._lock:
            reports: tuple[PolicyReport, ...] = tuple(
                policy.report(max_keys=max_keys) for policy in self._policies
            )
        return ReuseReport(model=self._name, version=self._version, kind="features", policies=reports)

    def clear_reuse(self) -> int:
        """Forget the encodings; what is known of the risk stays, and reuse that has stopped stays stopped."""
        with self._lock:
            return sum(policy.store.clear() for policy in self._policies)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if something does not add up."""
        with self._lock:
            for policy in self._policies:
                policy.check_integrity()

    def _read(self, inputs: Inputs) -> Singles:
        """Return the rows [n, F], all of them finite."""
        expected = self._predictor.num_features
        if inputs.num_rows < 1:
            raise InputError("there is no row of features")
        if len(inputs.rows) != 4 * expected * inputs.num_rows:
            values, rest = divmod(len(inputs.rows), 4 * inputs.num_rows)
            found = f"{values} features" if not rest else "another number of features"
            raise InputError(
                f"the model takes rows of {expected} features, not {found}", index=0, part="values"
            )
        rows: Singles = np.frombuffer(inputs.rows, "<f4").reshape(inputs.num_rows, expected)
        finite = np.isfinite(rows)
        if np.count_nonzero(finite) < rows.size:
            row, column = (int(each[0]) for each in np.nonzero(~finite))
            raise InputError("a feature is a finite number", index=row, part=f"values[{column}]")
        return rows

    def _route(self, rows: Singles) -> list[ReusePolicy]:
        """Return the policy of each row."""
        main, *canaries = self._policies
        chosen = []
        for share in shares_of(rows, self._routing, self._seed):
            end, policy = 0.0, main
            for canary in canaries:
                end += canary.settings.traffic_share
                if share < end:
                    policy = canary
                    break
            chosen.append(policy)
        return chosen

    def _answer(
        self, rows: list[FeatureRow], places: list[int], outputs: list[Output | None], *, waits: bool
    ) -> list[int]:
        """Answer the rows at these places but those that wait for others of them; return where these are."""
        together = Pass(rows if len(places) == len(rows) else [rows[place] for place in places])
        started = self._clock.now()
        certificate = self._predictor.certificate
        with self._lock:
            waiting = together.look_up(started, waits=waits)
            if certificate is None or not self._is_certified:
                together.count()
        if certificate is not None and self._is_certified:
            together.certify(certificate)
            with self._lock:
                together.count()
        encoding_started = self._clock.now()
        together.encode(self._predictor)
        encoded = self._clock.now()
        together.predict(self._predictor)
        with self._lock:
            together.keep(started)
            self._add_times(together, started, encoding_started, encoded)
        if waiting:
            late = set(waiting)
            answered = [place for number, place in enumerate(places) if number not in late]
        else:
            answered = places
        for place, output in zip(answered, together.outputs(), strict=True):
            outputs[place] = output
        return [places[number] for number in waiting]

    def _add_times(self, together: Pass, started: float, encoding_started: float, encoded: float) -> None:
        """Share the time out: the encoder's among rows that went through it, the rest among all."""
        each = (self._clock.now() - encoded + encoding_started - started) / len(together.rows)
        slow = (encoded - encoding_started) / len(together.fresh) if together.fresh else 0.0
        for row, lookup in zip(together.rows, together.lookups, strict=True):
            if row.policy is None or lookup is None:
                continue
            if lookup.outcome is Outcome.HIT:
                row.policy.hit_s += each + slow * lookup.compares
            else:
                row.policy.miss_s += each + slow

    def _note(self, policy: str, event: ReuseEvent) -> None:
        """Keep an event until the lock is free."""
        named = msgspec.structs.replace(event, model=self._name, version=self._version, policy=policy)
        self._events.put(named)


def bytes_per_entry(predictor: Predictor, settings: PolicySettings) -> int:
    """Return an upper bound of what one entry takes, in bytes."""
    key = settings.rule.num_features * (8 if settings.rule.bin_width else 4) + 64
    anchor = 0
    if settings.max_error is not None and predictor.certificate is not None:
        anchor = predictor.certificate.anchors(np.zeros((1, predictor.num_features), np.float32)).nbytes
    return key + 4 * (predictor.num_features + predictor.num_dimensions) + anchor + OVERHEAD_BYTES
