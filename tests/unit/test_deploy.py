"""The dashboard asks for metrics that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from server.engine.fake import FakeEngine
from server.telemetry.metrics import EngineCollector, FrontEndMetrics
from server.telemetry.predict_metrics import PredictCollector, PredictMetrics
from server.telemetry.process_metrics import ProcessCollector
from tests.unit.test_predict_metrics import full_backend

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SAMPLE_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count", "_info")


def known_metrics():
    """Return the names of all metrics, without the suffixes of their samples."""
    registry = CollectorRegistry()
    FrontEndMetrics(registry, model_name="m")
    registry.register(EngineCollector(FakeEngine(), model_name="m"))
    PredictMetrics(registry)
    registry.register(PredictCollector(full_backend()))
    registry.register(ProcessCollector({"engine": FakeEngine()}))
    return {metric.name for metric in registry.collect()}


def known_samples():
    return {name + suffix for name in known_metrics() for suffix in SAMPLE_SUFFIXES}


async def test_the_dashboard_asks_for_metrics_that_exist():
    dashboard = json.loads((DEPLOY / "grafana/dashboards/kvserve.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"kvserve_\w+", expression)}
    assert asked
    assert asked <= known_samples()


async def test_the_alerts_ask_for_metrics_that_exist():
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    asked = {name for expression in expressions for name in re.findall(r"kvserve_\w+", expression)}
    assert asked
    assert asked <= known_samples()


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: path.name)
def test_configuration_files_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_prometheus_scrapes_the_port_that_the_server_is_given():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    command = compose["services"]["kvserve"]["command"]
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    port = command[command.index("--metrics-port") + 1]
    assert scrape["static_configs"][0]["targets"] == [f"kvserve:{port}"]
