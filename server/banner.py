"""What the server says of itself once the model is loaded, line by line."""

from __future__ import annotations

from server.config import ServerConfig
from server.engine.messages import EngineReady
from server.predict.messages import ModelPhase, ModelStatus, PredictReady

__all__ = ["banner"]


def banner(config: ServerConfig, ready: EngineReady, predict: PredictReady | None) -> list[str]:
    """Return the lines about models and cache. No credentials: of a Redis only that there is one."""
    kv_bytes = ready.num_blocks * ready.bytes_per_block
    model = (
        f"{config.model_name}: {ready.family}, {_count(ready.num_parameters)} parameters, "
        f"{ready.vocab_size} tokens, length {ready.max_model_length}"
    )
    compute = (
        f"{ready.device}, {ready.dtype}, {ready.executor} executor, {ready.attention} attention, "
        f"{ready.num_threads} threads"
    )
    kv_cache = (
        f"{ready.num_blocks} blocks of {ready.block_size} tokens "
        f"({ready.num_blocks * ready.block_size} tokens, {_size(kv_bytes)})"
    )
    lines = [
        f"model     {model}",
        f"compute   {compute}",
        f"KV cache  {kv_cache}",
        f"policy    {_policy(config, ready)}",
    ]
    tiers = _tiers(config, ready)
    if tiers:
        lines.append(f"tiers     {', '.join(tiers)}")
    if config.snapshots is not None:
        lines.append(f"snapshots {config.snapshots}")
    if config.predict == "off":
        lines.append("predict   off")
    elif predict is not None:
        lines.append(f"predict   {_predict(predict)}")
    return [*lines, *(f"note      {note}" for note in ready.notes)]


def _predict(ready: PredictReady) -> str:
    loaded = [_version(model) for model in ready.preloaded if model.phase is ModelPhase.READY]
    failed = [_version(model) for model in ready.preloaded if model.phase is ModelPhase.FAILED]
    state = f"{', '.join(loaded) or 'none'} loaded" + (f"; {', '.join(failed)} FAILED" if failed else "")
    return (
        f"{ready.num_models} model{'s' * (ready.num_models != 1)} ({state}), "
        f"{ready.num_threads} thread{'s' * (ready.num_threads != 1)}"
    )


def _version(model: ModelStatus) -> str:
    return f"{model.name}:{model.version}"


def _policy(config: ServerConfig, ready: EngineReady) -> str:
    beside = []
    if config.trial:
        beside.append(f"trial {', '.join(config.trial)}")
    if config.canary is not None:
        name, share = config.canary
        beside.append(f"canary {name} {share * 100:.3g}%")
    return (ready.policy or config.policy) + (f" ({'; '.join(beside)})" if beside else "")


def _tiers(config: ServerConfig, ready: EngineReady) -> list[str]:
    tiers = []
    if config.host_cache is not None:
        tiers.append(f"host {_size(config.host_cache)}")
    if config.disk_cache is not None:
        found = ready.num_tier_objects.get("disk", 0)
        tiers.append(f"disk {_size(config.disk_cache_size)} at {config.disk_cache} ({found:,} objects)")
    if config.redis_url is not None:
        tiers.append("redis")
    return tiers


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _size(num_bytes: int) -> str:
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.3g} {unit}"
    return f"{num_bytes} B"
