"""Responses of a text model, reused for similar texts as far as observed errors allow.

::

    text --- seen before, exactly? ---- yes: its response (the model is deterministic)
               |
             embed --- nearest text of the same tenant: similar enough? --- yes: its response; some compared
                                                                |
                                                               no: computed, and compared with the nearest

Off unless a model's catalogue entry asks for it. How similar is enough is not set but learned
(``reuse.threshold``), to hold ``max_error_rate`` among the responses that are reused for similar texts; exact
repeats are never wrong and are not counted in that. What is learned is learned from all tenants together: it
is one number; responses never cross from one to another. Nor do they between texts that were asked for with
and without permission to truncate, or with and without a pair. Both texts of a pair must be similar.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from kvcore.clock import Clock
from kvcore.risk import RiskAlarm, RiskBudget, RiskMeter
from server.predict.errors import ModelRefusedError
from server.predict.messages import (
    EventKind,
    Inputs,
    ModelInfo,
    Output,
    PolicyReport,
    ReuseEvent,
    ReuseReport,
    Task,
    TextItem,
)
from server.predict.model import PredictModel, Prepared
from server.predict.options import SemanticSpec
from server.predict.reuse.compare import cosine_and_l2, is_other_response
from server.predict.reuse.events import EventBox
from server.predict.reuse.meters import CONFIDENCE, describe_risk, interval_report, make_meter
from server.predict.reuse.policy import Counts, Outcome
from server.predict.reuse.predictor import Singles
from server.predict.reuse.responses import Partition, Response, ResponseCache
from server.predict.reuse.threshold import NOTHING, Threshold

__all__ = ["SemanticModel"]

log = logging.getLogger("kvserve.predict.reuse")

POLICY = "semantic"
NOWHERE = Partition("", truncate=False, has_pair=False)
"""Of what is neither looked up nor kept."""
QUICK_HALF_LIFE = 30.0
"""Comparisons, of the meter that watches for sudden change: some 90 count in it, in the other thousands."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A text on its way, twice prepared."""

    inner: Prepared
    embeds: tuple[Prepared, ...]
    """Empty: it cannot be embedded as a whole."""
    partition: Partition
    text: TextItem


@dataclass(slots=True)
class _Case:
    """How one text of a batch fares."""

    item: _Item
    place: int
    outcome: Outcome | None = None
    """None: reuse was not wanted."""
    output: Output | None = None
    vectors: list[Singles] = field(default_factory=list)
    neighbour: Response | None = None
    similarity: float = 0.0
    computes: bool = False
    repeats: list[int] = field(default_factory=list)
    """Places of the same text later in the batch."""


class SemanticModel:
    """A ``ReusingModel`` around a text model. ``run`` on one thread at a time, the rest on any."""

    def __init__(
        self,
        inner: PredictModel,
        embedder: PredictModel,
        spec: SemanticSpec,
        *,
        clock: Clock,
        on_event: Callable[[ReuseEvent], None],
    ) -> None:
        """Own ``inner``; ``embedder`` stays the caller's. Raises ``ModelRefusedError``."""
        if inner.info.task not in (Task.CLASSIFY, Task.REGRESS):
            raise ModelRefusedError("semantic: only responses of classification and regression are reused")
        if embedder.info.task is not Task.EMBED:
            raise ModelRefusedError(f"semantic: the model {spec.embedder!r} does not embed")
        _check(spec)
        self._inner, self._embedder, self._spec = inner, embedder, spec
        self._clock = clock
        self._lock = threading.Lock()
        self._cache = ResponseCache(max_entries=spec.max_entries, lifetime_s=spec.lifetime_s)
        self._threshold = Threshold(spec.max_error_rate)
        budget = RiskBudget(max_changed=spec.max_error_rate)
        self._meter = make_meter(
            budget, max_keys=1, on_alarm=self._note_alarm, on_recovery=self._note_recovery
        )
        self._quick = RiskMeter(
            budget,
            confidence=CONFIDENCE,
            half_life=QUICK_HALF_LIFE,
            max_keys=1,
            on_alarm=self._note_alarm,
            share_interval="chernoff",
        )
        self._events = EventBox(self._lock, log, on_event)
        self._draw = random.Random(f"{spec.seed}/{POLICY}")  # noqa: S311 - which hits to compare
        self._counts = Counts()
        self._watched = NOTHING
        """The last threshold at which anything was reused: what is more similar is watched, reused or not."""
        self._is_unfit = False
        """An alarm fired, and what was learned must go."""
        self._num_alarms = 0
        self._hit_s = self._miss_s = 0.0

    @property
    def info(self) -> ModelInfo:
        return self._inner.info

    @property
    def threshold(self) -> float:
        """Return the least similarity of a text whose response is reused; above 1: none is."""
        return self._threshold.value

    def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
        inner = self._inner.prepare(inputs, truncate=truncate, reuse=reuse, tenant=tenant)
        if not reuse:
            return [
                Prepared(each.num_tokens, _Item(each, (), NOWHERE, text), each.truncated, reuse=False)
                for each, text in zip(inner, inputs.texts, strict=True)
            ]
        texts = [
            TextItem(part) for item in inputs.texts for part in (item.text, item.pair) if part is not None
        ]
        embeds = iter(
            self._embedder.prepare(Inputs(texts=tuple(texts)), truncate=True, reuse=False, tenant=tenant)
        )
        prepared = []
        for each, text in zip(inner, inputs.texts, strict=True):
            parts = tuple(next(embeds) for _ in range(1 if text.pair is None else 2))
            if any(part.truncated for part in parts):
                parts = ()  # what was cut off may be what differs
            partition = Partition(tenant, truncate, text.pair is not None)
            num_tokens = each.num_tokens + sum(part.num_tokens for part in parts)
            item = _Item(each, parts, partition, text)
            prepared.append(Prepared(num_tokens, item, each.truncated, tenant=tenant))
        return prepared

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        started = self._clock.now()
        outputs: list[Output | None] = [None] * len(batch)
        try:
            with self._lock:
                cases = self._find_repeats(batch, started)
            self._embed([case for case in cases if case.outcome is Outcome.ABSENT and case.item.embeds])
            with self._lock:
                self._find_neighbours(cases)
            before = self._clock.now()
            computing = [case for case in cases if case.computes]
            fresh = self._inner.run([case.item.inner for case in computing]) if computing else []
            after = self._clock.now()
            with self._lock:
                self._keep(computing, fresh, started)
                self._count(cases, computing, after - before, self._clock.now() - started)
        finally:
            self._events.empty()
        for case in cases:
            outputs[case.place] = case.output
            for place in case.repeats:
                outputs[place] = case.output and _reused(case.output, batch[place].payload.inner)
        return [output for output in outputs if output is not None]

    def close(self) -> None:
        """Close the inner model, and forget all responses."""
        self.clear_reuse()
        self._inner.close()

    def reuse_report(self, *, max_keys: int) -> ReuseReport:
        with self._lock:
            counts = self._counts
            misses = counts.lookups - counts.hit
            report = PolicyReport(
                name=POLICY,
                traffic_share=1.0,
                threshold=self._threshold.value,
                lifetime_s=self._spec.lifetime_s or 0.0,
                min_lifetime_s=self._spec.lifetime_s or 0.0,
                max_lifetime_s=self._spec.lifetime_s or 0.0,
                max_changed=self._spec.max_error_rate,
                sample_share=self._spec.sample_share,
                num_entries=len(self._cache),
                max_entries=self._cache.max_entries,
                num_bytes=self._cache.num_bytes,
                num_lookups=counts.lookups,
                num_hits=counts.hit,
                num_absent=counts.absent,
                num_expired=counts.expired,
                num_stopped=counts.stopped,
                num_uncertified=counts.uncertified,
                num_evicted=self._cache.num_evicted,
                num_alarms=self._num_alarms,
                risk=describe_risk(self._meter),
                hit_s=self._hit_s / counts.hit if counts.hit else 0.0,
                miss_s=self._miss_s / misses if misses else 0.0,
            )
        return ReuseReport(model="", version="", kind="semantic", policies=(report,))

    def clear_reuse(self) -> int:
        """Forget the responses; what was learned of similarity stays."""
        with self._lock:
            return self._cache.clear()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if something does not add up."""
        with self._lock:
            self._cache.check_integrity()

    def _find_repeats(self, batch: Sequence[Prepared], now: float) -> list[_Case]:
        """Answer what was asked before, word for word. Lock held."""
        gone = self._cache.expire(now)
        cases: list[_Case] = []
        firsts: dict[tuple[Partition, TextItem], _Case] = {}
        for place, prepared in enumerate(batch):
            item: _Item = prepared.payload
            case = _Case(item, place)
            if not prepared.reuse:
                case.computes = True
                cases.append(case)
                continue
            name = (item.partition, item.text)
            first = firsts.get(name)
            if first is not None:
                first.repeats.append(place)
                continue
            firsts[name] = case
            cases.append(case)
            found = self._cache.exact(*name)
            if found is not None:
                case.outcome, case.output = Outcome.HIT, _reused(found.output, item.inner)
            else:
                case.outcome = Outcome.EXPIRED if name in gone else Outcome.ABSENT
                case.computes = True
        return cases

    def _embed(self, cases: list[_Case]) -> None:
        """Give cases their unit vectors; those whose vector has no direction stay without."""
        parts = [part for case in cases for part in case.item.embeds]
        vectors = iter(self._embedder.run(parts) if parts else [])
        for case in cases:
            found = [np.frombuffer(next(vectors).values, "<f4") for _ in case.item.embeds]
            lengths = [float(np.linalg.norm(vector)) for vector in found]
            if all(0 < length < np.inf for length in lengths):
                case.vectors = [
                    (vector / length).astype(np.float32)
                    for vector, length in zip(found, lengths, strict=True)
                ]

    def _find_neighbours(self, cases: list[_Case]) -> None:
        """Decide who is answered with a neighbour's response, and which of those are compared. Lock held."""
        for case in cases:
            near = self._cache.nearest(case.item.partition, case.vectors) if case.vectors else None
            if near is None:
                continue
            case.neighbour, case.similarity = near
            if case.similarity >= self._threshold.value:
                case.outcome = Outcome.HIT
                case.output = _reused(case.neighbour.output, case.item.inner)
                case.computes = self._draw.random() < self._spec.sample_share
                self._cache.exact(case.neighbour.partition, case.neighbour.text)  # it was of use
            else:
                case.outcome = Outcome.STOPPED if self._threshold.value >= NOTHING else Outcome.UNCERTIFIED

    def _keep(self, computing: list[_Case], fresh: list[Output], now: float) -> None:
        """Keep what was computed, and learn from it. Lock held."""
        for case, output in zip(computing, fresh, strict=True):
            if case.outcome is None:
                case.output = output
                continue
            own = msgspec.structs.replace(output, policy=POLICY)
            if case.neighbour is not None:
                self._learn(case, case.neighbour, own)
            if case.output is None:
                case.output = own
            self._cache.put(Response(case.item.partition, case.item.text, own, case.vectors, now))

    def _learn(self, case: _Case, neighbour: Response, output: Output) -> None:
        reused = np.frombuffer(neighbour.output.values, "<f4")
        fresh = np.frombuffer(output.values, "<f4")
        changed = is_other_response(self.info, reused, fresh)
        cosine, l2 = cosine_and_l2(reused, fresh) if len(reused) == len(fresh) else (0.0, np.inf)
        before = self._threshold.value
        self._threshold.observe(case.similarity, cosine, l2, changed=changed)
        self._note_threshold(before)
        if case.outcome is Outcome.HIT:
            self._meter.observe(POLICY, cosine, l2, changed)
        if case.similarity >= self._watched:
            self._quick.observe(POLICY, cosine, l2, changed)
        if self._is_unfit:
            self._is_unfit = False
            before = self._threshold.value
            self._threshold.reset()
            self._note_threshold(before)

    def _count(self, cases: list[_Case], computing: list[_Case], inner_s: float, total_s: float) -> None:
        rest = (total_s - inner_s) / len(cases) if cases else 0.0
        slow = inner_s / len(computing) if computing else 0.0
        for case in cases:
            if case.outcome is None:
                continue
            for outcome in (case.outcome, *(Outcome.HIT for _ in case.repeats)):
                name = outcome.value
                setattr(self._counts, name, getattr(self._counts, name) + 1)
            if case.outcome is Outcome.HIT:
                self._hit_s += rest + slow * case.computes
            else:
                self._miss_s += rest + slow

    def _note_threshold(self, before: float) -> None:
        after = self._threshold.value
        if after < NOTHING:
            self._watched = after
        if (before >= NOTHING) != (after >= NOTHING):
            kind = EventKind.STOPPED if after >= NOTHING else EventKind.RESUMED
            self._events.put(ReuseEvent(kind=kind, policy=POLICY, limit=self._spec.max_error_rate))

    def _note_alarm(self, alarm: RiskAlarm) -> None:
        if alarm.key is not None:  # the one key's own account says the same
            return
        if not self._is_unfit:  # else the other meter has told it of this very comparison
            self._num_alarms += 1
            self._tell(EventKind.ALARM, alarm)
        self._is_unfit = True

    def _note_recovery(self, alarm: RiskAlarm) -> None:
        if alarm.key is None:
            self._tell(EventKind.RECOVERED, alarm)

    def _tell(self, kind: EventKind, alarm: RiskAlarm) -> None:
        interval = interval_report(alarm.interval)
        self._events.put(
            ReuseEvent(kind=kind, policy=POLICY, measure=alarm.measure, interval=interval, limit=alarm.limit)
        )


def _reused(output: Output, prepared: Prepared) -> Output:
    """Return a response for another text, or for the same one again."""
    return msgspec.structs.replace(
        output,
        num_tokens=prepared.num_tokens,
        truncated=prepared.truncated,
        cache_hit=True,
        policy=POLICY,
    )


def _check(spec: SemanticSpec) -> None:
    wrong = {
        "max_error_rate: a share between 0 and 0.5": not 0 < spec.max_error_rate < 0.5,
        "max_entries: there must be room for one": spec.max_entries < 1,
        "sample_share: above 0, at most 1: what is reused is watched": not 0 < spec.sample_share <= 1,
        "lifetime_s: more than 0": spec.lifetime_s is not None and not spec.lifetime_s > 0,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ModelRefusedError(f"semantic: {what}")
