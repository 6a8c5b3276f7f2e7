"""What the cache counts, as Prometheus gets it."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry

from server.engine.admin_messages import PrefetchReport, TierReport
from server.engine.fake import FakeEngine
from server.engine.messages import EngineStats
from server.telemetry.metrics import EngineCollector, FrontEndMetrics


class Engine(FakeEngine):
    """Shows the statistics that a test sets."""

    shown: EngineStats | None = None

    @property
    def stats(self) -> EngineStats | None:
        return self.shown


def tier(name: str, **fields: object) -> TierReport:
    plain = dict.fromkeys(
        (
            *("num_objects", "num_bytes", "stored", "store_failures", "refused_stores", "hits", "misses"),
            *("fetched", "fetched_bytes", "stored_bytes", "evicted", "expired", "quarantined"),
            *("latency_s", "read_bytes_per_s", "write_bytes_per_s", "crossover_tokens"),
        ),
        0,
    )
    others = {"codec": "none", "is_available": True, "max_bytes": None, "failures": {}, "last_fault": None}
    return TierReport(tier=name, **{**plain, **others, **fields})  # type: ignore[arg-type]


async def sampled(**fields: object) -> CollectorRegistry:
    engine = Engine()
    stats = FakeEngine().stats
    assert stats is not None
    engine.shown = msgspec.structs.replace(stats, **fields)
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, model_name="m"))
    return registry


async def test_tiers_are_told_apart() -> None:
    disk = tier(
        "disk",
        num_bytes=100,
        max_bytes=1000,
        hits=3,
        misses=1,
        failures={"corrupt": 2, "timeout": 1},
        latency_s=0.25,
        crossover_tokens=-1,
    )
    registry = await sampled(tiers=[disk, tier("redis", is_available=False)])

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvserve_cache_tier_{name}", {"model_name": "m", **labels})

    assert (value("available", tier="disk"), value("available", tier="redis")) == (1.0, 0.0)
    assert (value("bytes", tier="disk"), value("max_bytes", tier="disk")) == (100.0, 1000.0)
    assert (value("hits_total", tier="disk"), value("misses_total", tier="disk")) == (3.0, 1.0)
    assert value("fetch_failures_total", tier="disk", kind="corrupt") == 2.0
    assert value("fetch_failures_total", tier="redis", kind="corrupt") is None
    assert value("fetch_latency_seconds", tier="disk") == 0.25
    assert value("crossover_tokens", tier="disk") == -1.0


async def test_evictions_restores_pins_and_prefetches_are_counted() -> None:
    registry = await sampled(
        prompt_tokens=100,
        cached_block_tokens=32,
        restored_tokens=16,
        pinned_blocks=5,
        evicted_by_cause={"capacity": 7, "admin": 2},
        trial_cost_share=0.01,
        prefetch=PrefetchReport(waiting_fetched=9, sessions_wasted=1, restore_s=2.0, hidden_s=1.5),
    )

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvserve_{name}", {"model_name": "m", **labels})

    assert value("prefix_cache_hits_total") == 48.0
    assert value("prefix_cache_hit_restored_tokens_total") == 16.0
    assert value("kv_blocks_pinned") == 5.0
    assert value("evicted_blocks_by_cause_total", cause="capacity") == 7.0
    assert value("policy_trial_cost_share") == 0.01
    assert value("prefetch_blocks_total", purpose="waiting", outcome="fetched") == 9.0
    assert value("prefetch_blocks_total", purpose="sessions", outcome="wasted") == 1.0
    assert value("cache_restore_hidden_seconds_total") == 1.5


def test_watching_is_counted() -> None:
    registry = CollectorRegistry()
    metrics = FrontEndMetrics(registry, model_name="m")
    metrics.watchers(3)
    metrics.watch_lost(10)
    metrics.watch_lost(5)
    assert registry.get_sample_value("kvserve_cache_watchers") == 3.0
    assert registry.get_sample_value("kvserve_cache_watch_lost_events_total") == 15.0


async def test_hard_pins_are_said_to_be_among_the_blocks_held() -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector(FakeEngine(), model_name="m"))
    helps = {metric.name: metric.documentation for metric in registry.collect()}
    assert "hard pins" in helps["kvserve_kv_blocks_leased"]
    assert "hard pins" in helps["kvserve_kv_cache_usage_perc"]
