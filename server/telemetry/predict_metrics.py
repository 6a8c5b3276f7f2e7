"""Prometheus metrics of Predict: calls as the front end answers them, models and reuse as the process says.

Labels ``model`` and ``version`` are those of the catalogue, whose size is bounded: never text from clients.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.predict.interface import PredictBackend, PredictState
from server.predict.messages import CallStats, ModelStats, PolicyReport, PredictStats, RiskReport, Task
from server.telemetry.buckets import Buckets

__all__ = ["PredictCollector", "PredictMetrics"]

_CALL_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_BATCH = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0)
_LABELS = ("model", "version", "task")

Samples = Sequence[tuple[tuple[str, ...], float]]


class _Answers:
    """What was answered by one version of a model for one task. Plain numbers: calls are many and small."""

    __slots__ = ("batch_size", "created_s", "latency_s", "num_hits", "num_inputs", "num_tokens", "queue_s")

    def __init__(self) -> None:
        self.num_inputs = self.num_tokens = self.num_hits = 0
        self.latency_s, self.queue_s = Buckets(_CALL_S), Buckets(_CALL_S)
        self.batch_size = Buckets(_BATCH)
        self.created_s = time.time()


class PredictMetrics(Collector):
    """What the front end sees of predict calls that were answered. Event loop only; scraped by any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._answers: dict[tuple[str, str, str], _Answers] = {}
        registry.register(self)

    def answered(
        self,
        task: Task,
        model: str,
        version: str,
        *,
        num_inputs: int,
        num_tokens: int,
        num_hits: int,
        stats: CallStats,
        total_s: float,
    ) -> None:
        """Note an answer."""
        labels = (model, version, task.value)
        answers = self._answers.get(labels)
        if answers is None:
            answers = self._answers[labels] = _Answers()
        answers.num_inputs += num_inputs
        answers.num_tokens += num_tokens
        answers.num_hits += num_hits
        answers.latency_s.observe(total_s)
        answers.queue_s.observe(stats.queue_s)
        answers.batch_size.observe(stats.batch_size)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they stand."""
        rows = list(self._answers.items())
        for name, text, field in (
            ("inputs", "Inputs answered.", "num_inputs"),
            ("tokens", "Tokens of these inputs.", "num_tokens"),
            ("cache_hits", "Inputs for which something was reused.", "num_hits"),
        ):
            counter = CounterMetricFamily(f"kvserve_predict_{name}", text, labels=_LABELS)
            for labels, answers in rows:
                counter.add_metric(labels, getattr(answers, field), created=answers.created_s)
            yield counter
        for name, text, field in (
            ("latency_seconds", "From the whole request to its answer.", "latency_s"),
            ("queue_seconds", "Waiting for a batch.", "queue_s"),
            ("batch_size", "Inputs in a call's largest batch.", "batch_size"),
        ):
            histogram = HistogramMetricFamily(f"kvserve_predict_{name}", text, labels=_LABELS)
            for labels, answers in rows:
                buckets: Buckets = getattr(answers, field)
                histogram.add_metric(labels, buckets.cumulative(), buckets.total)
                created = dict(zip(_LABELS, labels, strict=True))
                histogram.add_sample(f"kvserve_predict_{name}_created", created, answers.created_s)
            yield histogram


class PredictCollector(Collector):
    """Reads the backend's latest snapshot when scraped; runs in the scraping thread, changes nothing."""

    def __init__(self, backend: PredictBackend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; of a process that has said nothing yet only whether it is up."""
        is_up = self._backend.state is PredictState.READY
        yield _gauge("up", "1 while the predict process takes calls.", [((), float(is_up))])
        yield _counter(
            "restarts", "Times that the process was started again.", [((), self._backend.num_restarts)]
        )
        stats = self._backend.stats
        if stats is not None:
            yield from _of_process(stats)
            yield from _of_models(stats.models)
            yield from _of_reuse(
                [(model.name, model.version, policy) for model in stats.models for policy in model.policies]
            )


def _of_process(stats: PredictStats) -> Iterator[Metric]:
    yield _gauge("open_calls", "Calls that wait or are computed.", [((), stats.num_calls)])
    yield _gauge("waiting_inputs", "Inputs that wait for a batch.", [((), stats.num_waiting_inputs)])
    yield _gauge("waiting_tokens", "Their tokens.", [((), stats.num_waiting_tokens)])
    yield _gauge("model_bytes", "Memory of loaded models.", [((), stats.num_bytes)])
    yield _gauge("model_memory_bytes", "Their budget; 0: no limit.", [((), stats.memory_bytes)])
    yield _counter("model_loads", "Models loaded.", [((), stats.num_loads)])
    yield _counter("model_load_failures", "Models that could not be loaded.", [((), stats.num_failed_loads)])
    yield _counter("model_evictions", "Models unloaded to make room.", [((), stats.num_evictions)])
    yield _counter("model_load_seconds", "Time spent loading.", [((), stats.load_s)])


def _of_models(models: Sequence[ModelStats]) -> Iterator[Metric]:
    labels = ("model", "version")

    def each(value: str) -> Samples:
        return [((model.name, model.version), float(getattr(model, value))) for model in models]

    yield _gauge("model_loaded", "1 while the model is loaded.", each("is_loaded"), labels)
    yield _gauge("model_size_bytes", "Memory that the model takes.", each("num_bytes"), labels)
    yield _counter("calls", "Calls that ended.", each("num_calls"), labels)
    yield _counter("failed_calls", "Calls that ended without an answer.", each("num_failed"), labels)
    yield _counter("cancelled_calls", "Calls that nobody waited for any more.", each("num_cancelled"), labels)
    yield _counter("batches", "Batches computed.", each("num_batches"), labels)
    yield _counter("batch_inputs", "Inputs computed.", each("num_inputs"), labels)
    yield _counter("batch_tokens", "Tokens computed.", each("num_tokens"), labels)
    yield _counter("padding_tokens", "Tokens that filled batches up.", each("num_padding_tokens"), labels)
    yield _counter("compute_seconds", "Time in batches.", each("compute_s"), labels)


def _of_reuse(rows: Sequence[tuple[str, str, PolicyReport]]) -> Iterator[Metric]:
    labels = ("model", "version", "policy")

    def each(value: str) -> Samples:
        return [((model, version, p.name), float(getattr(p, value))) for model, version, p in rows]

    outcomes = ("hits", "absent", "expired", "stopped", "uncertified")
    yield _counter(
        "reuse_lookups",
        "Look-ups of what could be reused, by outcome.",
        [
            ((model, version, p.name, outcome), float(getattr(p, f"num_{outcome}")))
            for model, version, p in rows
            for outcome in outcomes
        ],
        (*labels, "outcome"),
    )
    yield _gauge("reuse_entries", "Entries kept for reuse.", each("num_entries"), labels)
    yield _gauge("reuse_bytes", "Memory that they take.", each("num_bytes"), labels)
    yield _counter("reuse_evictions", "Entries given up for others.", each("num_evicted"), labels)
    yield _gauge("reuse_lifetime_seconds", "Lifetime of new entries; 0: none.", each("lifetime_s"), labels)
    yield _gauge("reuse_threshold", "Least similarity of a semantic hit.", each("threshold"), labels)
    yield _counter("reuse_alarms", "Times that the risk budget was broken.", each("num_alarms"), labels)
    yield _gauge("reuse_stopped_keys", "Keys for which reuse has stopped.", each("num_stopped_keys"), labels)
    yield _gauge("reuse_stopped", "1 while the policy reuses nothing.", each("stopped"), labels)
    yield _gauge(
        "reuse_over_budget",
        "1 while the risk is proved to exceed the budget.",
        [((model, version, p.name), float(p.risk.over_budget)) for model, version, p in rows],
        labels,
    )
    yield _counter(
        "reuse_compared",
        "Reuses that were compared with a fresh computation.",
        [((model, version, p.name), p.risk.num_compared) for model, version, p in rows],
        labels,
    )
    yield _gauge(
        "reuse_risk",
        "What reuse costs in correctness: estimate, and both ends of its interval.",
        [
            ((model, version, p.name, measure, bound), value)
            for model, version, p in rows
            for measure, bound, value in _risks(p.risk)
        ],
        (*labels, "measure", "bound"),
    )


def _risks(risk: RiskReport) -> Iterator[tuple[str, str, float]]:
    for measure in ("changed", "cosine_distance", "l2"):
        interval = getattr(risk, measure)
        for bound in ("lower", "estimate", "upper"):
            yield measure, bound, getattr(interval, bound)


def _gauge(name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
    return _filled(GaugeMetricFamily(f"kvserve_predict_{name}", text, labels=labels), samples)


def _counter(name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
    return _filled(CounterMetricFamily(f"kvserve_predict_{name}", text, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    for values, value in samples:
        family.add_metric(list(values), value)
    return family
