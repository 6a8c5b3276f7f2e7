"""Prometheus metrics: what the engine counts and what the front end measures.

Names follow vLLM's where it has one for the same thing (with the prefix ``kvserve_``), because dashboards and
routers know them. Engine counters are read from its latest snapshot when scraped; they begin anew with each
engine process, as counters may.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvserve.v1 import generate_pb2 as pb
from server.engine.admin_messages import PrefetchReport, TierReport
from server.engine.interface import Engine, EngineState
from server.engine.messages import EngineStats
from server.rpc.call import Call
from server.telemetry.buckets import Buckets

__all__ = ["FrontEndMetrics", "MetricsServer"]

_FIRST_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0)
_REQUEST_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class PlainHistogram(Buckets, Collector):
    """A histogram without labels."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        super().__init__(bounds)
        self._name, self._text = name, text

    def collect(self) -> Iterable[Metric]:
        """Return the metric as it stands."""
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric([], self.cumulative(), self.total)
        return [family]


class FrontEndMetrics:
    """What the front end measures: a ``CallObserver`` and a ``FrontEndObserver``. Event loop only."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        self._calls = Counter(
            "kvserve_rpc_calls", "Calls by method and status code.", ["method", "code"], registry=registry
        )
        # Finding a labelled child costs more than adding to it.
        self._ended: dict[tuple[str, grpc.StatusCode], Counter] = {}
        self._num_active = 0
        active = Gauge("kvserve_rpc_calls_active", "Calls being served.", registry=registry)
        active.set_function(lambda: self._num_active)
        self._watchers = Gauge("kvserve_cache_watchers", "Streams of cache events.", registry=registry)
        self._watch_lost = Counter(
            "kvserve_cache_watch_lost_events", "Events that watchers did not get.", registry=registry
        )
        self._call_s = PlainHistogram(
            "kvserve_e2e_request_latency_seconds", "From headers to status.", _REQUEST_S
        )
        self._between_s = PlainHistogram(
            "kvserve_inter_token_latency_seconds", "Between two messages of a stream.", _BETWEEN_TOKENS_S
        )
        self._per_message = PlainHistogram(
            "kvserve_tokens_per_message",
            "Tokens that travelled together.",
            (1, 2, 4, 8, 16, 32, 64, 256, 1024),
        )
        self._lag_s = PlainHistogram(
            "kvserve_event_loop_lag_seconds", "How late the front end's event loop runs a timer.", _LAG_S
        )
        for plain in (self._call_s, self._between_s, self._per_message, self._lag_s):
            registry.register(plain)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"kvserve_{name}", text, ["model_name"], buckets=buckets, registry=registry
            ).labels(model_name)

        self._first_token_s = histogram(
            "time_to_first_token_seconds", "From the whole request to its first message.", _FIRST_TOKEN_S
        )
        self._per_token_s = histogram(
            "request_time_per_output_token_seconds",
            "Decoding time by tokens after the first.",
            _BETWEEN_TOKENS_S,
        )
        self._queue_s = histogram("request_queue_time_seconds", "Waiting for the first step.", _REQUEST_S)
        self._prefill_s = histogram("request_prefill_time_seconds", "Computing the prompt.", _REQUEST_S)
        self._decode_s = histogram(
            "request_decode_time_seconds", "From the first token to the last.", _REQUEST_S
        )
        self._tokenize_s = histogram(
            "request_tokenize_time_seconds", "Template and tokenizer.", _FIRST_TOKEN_S
        )
        self._prompt_tokens = histogram("request_prompt_tokens", "Tokens of prompts.", _TOKENS)
        self._new_tokens = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)

    def begin(self, call: Call, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        """Note a call."""
        self._num_active += 1

    def end(self, call: Call, code: grpc.StatusCode) -> None:
        """Note a call's end."""
        self._num_active -= 1
        ended = self._ended.get((call.method, code))
        if ended is None:
            # Methods are those of our own services: the set of label values is bounded.
            ended = self._calls.labels(call.method.rpartition("/")[2], code.name)
            self._ended[call.method, code] = ended
        ended.inc()
        self._call_s.observe(time.perf_counter() - call.started_s)

    def message(self, num_tokens: int, interval_s: float | None) -> None:
        """Note a streamed message."""
        self._per_message.observe(num_tokens)
        if interval_s is not None:
            self._between_s.observe(interval_s)

    def finished(self, summary: pb.GenerateSummary, num_samples: int) -> None:
        """Note a generation that ended well."""
        usage, timings = summary.usage, summary.timings
        self._first_token_s.observe(timings.first_token_s)
        self._queue_s.observe(timings.queue_s)
        self._prefill_s.observe(timings.prefill_s)
        self._decode_s.observe(timings.decode_s)
        self._tokenize_s.observe(timings.tokenize_s)
        self._prompt_tokens.observe(usage.prompt_tokens)
        self._new_tokens.observe(usage.generated_tokens)
        per_sample = usage.generated_tokens / num_samples
        if per_sample > 1:
            self._per_token_s.observe(timings.decode_s / (per_sample - 1))

    def watchers(self, count: int) -> None:
        """Note how many watch the cache."""
        self._watchers.set(count)

    def watch_lost(self, count: int) -> None:
        """Note events that watchers did not get."""
        self._watch_lost.inc(count)

    def loop_lag(self, lag_s: float) -> None:
        """Note how late the event loop was."""
        self._lag_s.observe(lag_s)


class EngineCollector(Collector):
    """Reads an engine's latest snapshot when scraped; runs in the scraping thread, changes nothing."""

    def __init__(self, engine: Engine, *, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's metrics; only its state before it is ready."""
        yield self._gauge(
            "engine_up", "1 while the engine takes requests.", float(self._engine.state is EngineState.READY)
        )
        ready, stats = self._engine.ready, self._engine.stats
        if ready is not None:
            info = {
                "block_size": str(ready.block_size),
                "num_gpu_blocks": str(ready.num_blocks),
                "bytes_per_block": str(ready.bytes_per_block),
                "dtype": ready.dtype,
                "device": ready.device,
                "executor": ready.executor,
            }
            family = InfoMetricFamily("kvserve_cache_config", "How the KV cache is laid out.")
            family.add_metric([], info)
            yield family
        if stats is not None:
            yield from self._of_stats(stats)

    def _of_stats(self, stats: EngineStats) -> Iterator[Metric]:
        gauge, counter = self._gauge, self._counter
        used = stats.num_blocks_leased / stats.num_blocks if stats.num_blocks else 0.0
        cached = (
            stats.cached_block_tokens
            + stats.cached_partial_tokens
            + stats.cached_tail_tokens
            + stats.restored_tokens
        )
        yield gauge("num_requests_running", "Requests that take part in steps.", stats.num_running)
        yield gauge("num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield gauge(
            "kv_cache_usage_perc",
            "Share of KV blocks held by requests and hard pins; 1 is all.",
            used,
        )
        yield gauge("kv_blocks", "KV blocks altogether.", stats.num_blocks)
        yield gauge("kv_blocks_leased", "KV blocks held by requests and hard pins.", stats.num_blocks_leased)
        yield gauge("kv_blocks_cached", "KV blocks held by the prefix tree alone.", stats.num_blocks_cached)
        yield gauge("kv_blocks_free", "KV blocks that hold nothing.", stats.num_blocks_free)
        yield counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prompt_tokens)
        yield counter("prefix_cache_hits", "Prompt tokens found.", cached)
        yield counter("prefix_cache_hit_block_tokens", "Found as whole blocks.", stats.cached_block_tokens)
        yield counter(
            "prefix_cache_hit_partial_tokens", "Found as part of a block.", stats.cached_partial_tokens
        )
        yield counter("prefix_cache_hit_tail_tokens", "Found as an exact tail.", stats.cached_tail_tokens)
        yield counter("prefix_cache_hit_restored_tokens", "Brought back from tiers.", stats.restored_tokens)
        yield counter("prompt_tokens", "Prompt tokens.", stats.prompt_tokens)
        yield counter("computed_prompt_tokens", "Prompt tokens computed.", stats.computed_prompt_tokens)
        yield counter("recomputed_tokens", "Tokens computed again.", stats.recomputed_tokens)
        yield counter("generation_tokens", "Tokens generated.", stats.generated_tokens)
        yield counter("requests_finished", "Requests that finished.", stats.requests_finished)
        yield counter("requests_failed", "Requests that failed.", stats.requests_failed)
        yield counter(
            "num_preemptions", "Requests sent back to the queue for want of blocks.", stats.preemptions
        )
        yield counter("evicted_blocks", "Cached blocks given up for others.", stats.evicted_blocks)
        yield counter("expired_blocks", "Cached blocks that outlived their lifetime.", stats.expired_blocks)
        yield counter(
            "grouped_tokens", "Query tokens that shared a prefix's attention.", stats.grouped_tokens
        )
        yield counter("engine_steps", "Steps of the engine.", stats.steps)
        yield counter("engine_step_seconds", "Time in steps.", stats.step_s)
        yield counter("engine_plan_seconds", "Time spent planning them.", stats.plan_s)

        yield gauge("kv_blocks_pinned", "Cached blocks that a pin holds.", stats.pinned_blocks)
        yield self._family(
            CounterMetricFamily,
            "evicted_blocks_by_cause",
            "Cached blocks given up, by why.",
            ["cause"],
            [((cause,), blocks) for cause, blocks in sorted(stats.evicted_by_cause.items())],
        )
        yield gauge(
            "policy_trial_cost_share",
            "Share of the engine's time for policies on trial.",
            stats.trial_cost_share,
        )
        yield from self._of_tiers(stats.tiers)
        yield from self._of_prefetch(stats.prefetch or PrefetchReport())

    def _of_tiers(self, tiers: Sequence[TierReport]) -> Iterator[Metric]:
        def of_tier(
            family: type[GaugeMetricFamily | CounterMetricFamily],
            name: str,
            text: str,
            value: Callable[[TierReport], float],
        ) -> Metric:
            samples = [((tier.tier,), float(value(tier))) for tier in tiers]
            return self._family(family, f"cache_tier_{name}", text, ["tier"], samples)

        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield of_tier(gauge, "available", "1 while the tier is used.", lambda tier: tier.is_available)
        yield of_tier(gauge, "objects", "Cache objects in the tier.", lambda tier: tier.num_objects)
        yield of_tier(gauge, "bytes", "Bytes of cache objects in the tier.", lambda tier: tier.num_bytes)
        yield of_tier(
            gauge, "max_bytes", "Its budget; 0 is none of its own.", lambda tier: tier.max_bytes or 0
        )
        yield of_tier(
            gauge,
            "fetch_latency_seconds",
            "Measured time to the first byte of a fetch.",
            lambda tier: tier.latency_s,
        )
        yield of_tier(
            gauge, "read_bytes_per_second", "Measured bandwidth.", lambda tier: tier.read_bytes_per_s
        )
        yield of_tier(
            gauge,
            "crossover_tokens",
            "Prefix length from which fetching beats computing; -1 is never.",
            lambda tier: tier.crossover_tokens,
        )
        yield of_tier(counter, "hits", "Look-ups that found an object.", lambda tier: tier.hits)
        yield of_tier(counter, "misses", "Look-ups that found none.", lambda tier: tier.misses)
        yield of_tier(counter, "stored", "Objects stored.", lambda tier: tier.stored)
        yield of_tier(counter, "stored_bytes", "Bytes stored.", lambda tier: tier.stored_bytes)
        yield of_tier(counter, "fetched", "Objects fetched.", lambda tier: tier.fetched)
        yield of_tier(counter, "fetched_bytes", "Bytes fetched.", lambda tier: tier.fetched_bytes)
        yield of_tier(counter, "evicted", "Objects given up for others.", lambda tier: tier.evicted)
        yield of_tier(counter, "expired", "Objects that outlived their lifetime.", lambda tier: tier.expired)
        yield of_tier(counter, "quarantined", "Damaged objects put aside.", lambda tier: tier.quarantined)
        yield of_tier(
            counter, "refused_stores", "Objects that found no room.", lambda tier: tier.refused_stores
        )
        yield of_tier(counter, "store_failures", "Stores that failed.", lambda tier: tier.store_failures)
        yield self._family(
            CounterMetricFamily,
            "cache_tier_fetch_failures",
            "Fetches that failed, by kind; each cost a recompute.",
            ["tier", "kind"],
            [((tier.tier, kind), n) for tier in tiers for kind, n in sorted(tier.failures.items())],
        )

    def _of_prefetch(self, report: PrefetchReport) -> Iterator[Metric]:
        yield self._family(
            CounterMetricFamily,
            "prefetch_blocks",
            "Blocks fetched ahead, for waiting requests and returning sessions, by what became of them.",
            ["purpose", "outcome"],
            [
                (("waiting", "fetched"), report.waiting_fetched),
                (("waiting", "used"), report.waiting_used),
                (("waiting", "late"), report.waiting_late),
                (("waiting", "wasted"), report.waiting_wasted),
                (("sessions", "fetched"), report.sessions_fetched),
                (("sessions", "used"), report.sessions_used),
                (("sessions", "late"), report.sessions_late),
                (("sessions", "wasted"), report.sessions_wasted),
            ],
        )
        yield self._counter("cache_restore_seconds", "Time that bringing blocks back took.", report.restore_s)
        yield self._counter(
            "cache_restore_hidden_seconds",
            "The part of it that requests spent in the queue anyway.",
            report.hidden_s,
        )

    def _family(
        self,
        family_type: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        labels: Sequence[str],
        samples: Iterable[tuple[tuple[str, ...], float]],
    ) -> Metric:
        family = family_type(f"kvserve_{name}", text, labels=["model_name", *labels])
        for values, value in samples:
            family.add_metric([self._model_name, *values], value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"kvserve_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"kvserve_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family


class MetricsServer:
    """``/metrics`` over HTTP, in a thread of its own."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        """Listen. Raises ``OSError``."""
        self._server, self._thread = start_http_server(port, host, registry)
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving. Blocks for a moment."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
