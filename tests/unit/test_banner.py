"""What a start says of the cache."""

from __future__ import annotations

from pathlib import Path

import msgspec

from server.banner import banner
from server.config import ServerConfig
from server.engine.fake import fake_ready


def lines_of(config: ServerConfig, **facts: object) -> list[str]:
    ready = msgspec.structs.replace(fake_ready(), **facts)
    return [line for line in banner(config, ready, None) if not line.startswith(("model", "compute", "KV cache"))]


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
