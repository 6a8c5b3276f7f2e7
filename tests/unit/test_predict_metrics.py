"""What Predict counts, as Prometheus gets it."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from server.predict.interface import PredictState
from server.predict.messages import (
    CallStats,
    IntervalReport,
    ModelStats,
    PolicyReport,
    PredictStats,
    RiskReport,
    Task,
)
from server.telemetry.predict_metrics import PredictCollector, PredictMetrics

INTERVAL = IntervalReport(0.01, 0.02, 0.04, 100.0)
RISK = RiskReport(INTERVAL, INTERVAL, INTERVAL, num_compared=100, over_budget=True, proven_safe=False)


class Backend:
    """A backend of which only the snapshot is looked at."""

    def __init__(self, stats: PredictStats | None, state: PredictState = PredictState.READY) -> None:
        self.stats = stats
        self.state = state
        self.num_restarts = 2


def full_backend() -> Any:
    """Return a backend that has something of everything to show."""
    policy = PolicyReport(name="main", traffic_share=1.0, risk=RISK)
    return Backend(PredictStats(models=(ModelStats(name="m", version="1", policies=(policy,)),)))


def registry_of(backend: Backend) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(PredictCollector(backend))  # type: ignore[arg-type]
    return registry


def test_process_that_has_said_nothing_is_down_and_nothing_else() -> None:
    registry = registry_of(Backend(None, PredictState.LOADING))
    assert registry.get_sample_value("kvserve_predict_up") == 0
    assert registry.get_sample_value("kvserve_predict_restarts_total") == 2
    assert registry.get_sample_value("kvserve_predict_model_bytes") is None


def test_models_are_told_apart_by_version() -> None:
    stats = PredictStats(
        models=(
            ModelStats(name="a", version="1", num_calls=5, num_failed=1, is_loaded=True, num_bytes=7),
            ModelStats(name="a", version="2", num_calls=3),
        ),
        num_bytes=7,
        memory_bytes=10,
        num_evictions=4,
    )
    registry = registry_of(Backend(stats))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvserve_predict_{name}", labels)

    assert value("up") == 1
    assert (value("model_bytes"), value("model_memory_bytes")) == (7, 10)
    assert value("model_evictions_total") == 4
    assert value("calls_total", model="a", version="1") == 5
    assert value("failed_calls_total", model="a", version="1") == 1
    assert value("calls_total", model="a", version="2") == 3
    assert value("model_loaded", model="a", version="2") == 0


def test_policies_show_outcomes_risk_and_alarms() -> None:
    policy = PolicyReport(
        name="canary", traffic_share=0.1, num_hits=90, num_absent=9, num_expired=1, num_alarms=3, risk=RISK
    )
    stats = PredictStats(models=(ModelStats(name="r", version="1", policies=(policy,)),))
    registry = registry_of(Backend(stats))
    labels = {"model": "r", "version": "1", "policy": "canary"}

    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(f"kvserve_predict_reuse_{name}", {**labels, **more})

    assert [value("lookups_total", outcome=o) for o in ("hits", "absent", "expired", "stopped")] == [
        90,
        9,
        1,
        0,
    ]
    assert value("alarms_total") == 3
    assert value("over_budget") == 1
    assert value("compared_total") == 100
    assert [value("risk", measure="changed", bound=b) for b in ("lower", "estimate", "upper")] == [
        0.01,
        0.02,
        0.04,
    ]


def test_answers_are_counted_by_model_version_and_task() -> None:
    registry = CollectorRegistry()
    metrics = PredictMetrics(registry)
    for _ in range(2):
        metrics.answered(
            Task.CLASSIFY,
            "a",
            "1",
            num_inputs=3,
            num_tokens=12,
            num_hits=1,
            stats=CallStats(queue_s=0.004, batch_size=8),
            total_s=0.02,
        )
    labels = {"model": "a", "version": "1", "task": "classify"}

    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(f"kvserve_predict_{name}", {**labels, **more})

    assert (value("inputs_total"), value("tokens_total"), value("cache_hits_total")) == (6, 24, 2)
    assert value("latency_seconds_count") == 2
    assert value("latency_seconds_bucket", le="0.01") == 0
    assert value("batch_size_bucket", le="8.0") == 2


def test_answers_are_scraped_as_counters_and_histograms_with_a_beginning() -> None:
    """Dashboards know these names and bounds; without answers there are no samples."""
    registry = CollectorRegistry()
    metrics = PredictMetrics(registry)
    assert not [sample for metric in registry.collect() for sample in metric.samples]
    metrics.answered(
        Task.FEATURES,
        "f",
        "2",
        num_inputs=1,
        num_tokens=0,
        num_hits=0,
        stats=CallStats(queue_s=0.3, batch_size=5000),
        total_s=100.0,
    )
    lines = generate_latest(registry).decode().splitlines()
    labels = 'model="f",task="features",version="2"'
    for line in (
        "# TYPE kvserve_predict_inputs_total counter",
        f"kvserve_predict_tokens_total{{{labels}}} 0.0",
        "# TYPE kvserve_predict_latency_seconds histogram",
        f'kvserve_predict_latency_seconds_bucket{{le="60.0",{labels}}} 0.0',
        f'kvserve_predict_latency_seconds_bucket{{le="+Inf",{labels}}} 1.0',
        f"kvserve_predict_latency_seconds_sum{{{labels}}} 100.0",
        f'kvserve_predict_queue_seconds_bucket{{le="0.25",{labels}}} 0.0',
        f'kvserve_predict_queue_seconds_bucket{{le="0.5",{labels}}} 1.0',
        f'kvserve_predict_batch_size_bucket{{le="4096.0",{labels}}} 0.0',
        f"kvserve_predict_batch_size_count{{{labels}}} 1.0",
    ):
        assert line in lines
    for name in ("inputs", "latency_seconds", "batch_size"):
        assert any(line.startswith(f"kvserve_predict_{name}_created{{") for line in lines)
