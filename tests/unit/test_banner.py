"""What a start says of the cache."""

from __future__ import annotations

from pathlib import Path

import msgspec

from server.banner import banner
from server.config import ServerConfig
from server.engine.fake import fake_ready
from server.predict.messages import ModelPhase, ModelStatus, PredictReady


def lines_of(config: ServerConfig, **facts: object) -> list[str]:
    ready = msgspec.structs.replace(fake_ready(), **facts)
    return [
        line for line in banner(config, ready, None) if not line.startswith(("model", "compute", "KV cache"))
    ]


def test_a_plain_start_names_its_policy_and_no_tiers() -> None:
    assert lines_of(ServerConfig(), policy="foresight") == ["policy    foresight"]


def test_tiers_trials_and_snapshots_are_named_and_no_credentials() -> None:
    config = ServerConfig(
        trial=("lru", "arc"),
        canary=("fifo", 0.1),
        host_cache=2 << 30,
        disk_cache=Path("/srv/cache"),
        redis_url="rediss://user:secret@cache.internal:6379/1",
        snapshots=Path("/srv/snapshots"),
    )
    lines = lines_of(config, policy="foresight", num_tier_objects={"disk": 12345}, notes=["one"])
    assert lines == [
        "policy    foresight (trial lru, arc; canary fifo 10%)",
        "tiers     host 2 GiB, disk 16 GiB at /srv/cache (12,345 objects), redis",
        "snapshots /srv/snapshots",
        "note      one",
    ]


def test_a_server_without_predict_says_so() -> None:
    assert "predict   off" in lines_of(ServerConfig(predict="off"))


def test_models_that_could_not_be_preloaded_are_not_called_loaded() -> None:
    states = (("minilm", ModelPhase.READY), ("hurt", ModelPhase.FAILED))
    preloaded = tuple(
        ModelStatus(name=name, version="1", phase=phase, source_kind="folder") for name, phase in states
    )
    predict = PredictReady(num_models=3, num_threads=1, device="cpu", preloaded=preloaded)
    lines = banner(ServerConfig(), fake_ready(), predict)
    assert "predict   3 models (minilm:1 loaded; hurt:1 FAILED), 1 thread" in lines
