"""Prometheus metrics of the processes behind the front end: deaths, and requests that may be the cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["ProcessCounts", "ProcessCollector"]


class QuarantineFigures(Protocol):
    """As ``server.process.quarantine.QuarantineCounts``."""

    @property
    def num_suspects(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_in_quarantine(self) -> int: ...
    @property
    def num_quarantined(self) -> int: ...
    @property
    def num_refused(self) -> int: ...


class ProcessCounts(Protocol):
    """What a process that is started again when it dies says of that."""

    @property
    def num_restarts(self) -> int: ...
    @property
    def is_given_up(self) -> bool: ...
    @property
    def quarantine(self) -> QuarantineFigures: ...


Value = Callable[[ProcessCounts], float]


class ProcessCollector(Collector):
    """Asks the processes when scraped; runs in the scraping thread, changes nothing."""

    def __init__(self, processes: Mapping[str, ProcessCounts]) -> None:
        """``processes`` by their names, which become the label ``process``."""
        self._processes = dict(processes)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        yield self._each(
            counter, "process_restarts", "Times that the process was started again.", lambda p: p.num_restarts
        )
        yield self._each(
            gauge, "process_given_up", "1 once the process does not start any more.", lambda p: p.is_given_up
        )
        yield self._each(
            gauge,
            "quarantine_suspects",
            "Different requests that were in the process when it died.",
            lambda p: p.quarantine.num_suspects,
        )
        yield self._each(
            gauge,
            "quarantine_waiting",
            "Requests that wait for their turn, for such a one is suspected.",
            lambda p: p.quarantine.num_waiting,
        )
        yield self._each(
            gauge,
            "quarantine_requests",
            "Different requests that are refused now, for the process has died of them.",
            lambda p: p.quarantine.num_in_quarantine,
        )
        yield self._each(
            counter,
            "quarantined_requests",
            "Requests that were quarantined since the start.",
            lambda p: p.quarantine.num_quarantined,
        )
        yield self._each(
            counter,
            "quarantine_refusals",
            "Calls refused because they are in quarantine.",
            lambda p: p.quarantine.num_refused,
        )

    def _each(
        self, family: type[CounterMetricFamily | GaugeMetricFamily], name: str, text: str, value: Value
    ) -> Metric:
        metric = family(f"kvserve_{name}", text, labels=["process"])
        for process, kept in self._processes.items():
            metric.add_metric([process], float(value(kept)))
        return metric
