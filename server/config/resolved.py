"""The resolved configuration: one frozen object, handed to everything that needs a setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from server.config.predict import BUILTIN_FEATURES, builtin_spec, located
from server.engine.options import EngineOptions, TierOptions
from server.predict.options import ModelSpec, PredictOptions
from server.rpc.auth import ApiKey

__all__ = ["ServerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything that decides how the server runs. Sizes in bytes or tokens, times in seconds."""

    model: str = "builtin"
    revision: str | None = None
    served_name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    executor: str = "auto"
    threads: int | None = None
    random_weights: bool = False
    seed: int = 0

    block_size: int = 16
    kv_memory: int | None = None
    num_blocks: int | None = None
    lifetime: float | None = None
    min_cached_tokens: int = 0
    policy: str = "best"
    trial: tuple[str, ...] = ()
    canary: tuple[str, float] | None = None
    tenant_quota: float | None = None
    soft_pins: float = 0.8
    hard_pins: float = 0.5

    host_cache: int | None = None
    disk_cache: Path | None = None
    disk_cache_size: int = 16 << 30
    redis_url: str | None = field(default=None, repr=False)
    redis_lifetime: float = 3600.0
    host_codec: str = "none"
    disk_codec: str = "none"
    redis_codec: str = "none"
    restore: str = "auto"
    session_prefetch: str = "off"
    snapshots: Path | None = None

    max_model_length: int | None = None
    max_batch_tokens: int = 512
    max_running: int = 256
    max_waiting: int = 1024
    waiting_bound: float = 30.0

    predict: str = "on"
    predict_models: tuple[ModelSpec, ...] = ()
    model_root: Path | None = None
    model_memory: int | None = None
    max_models: int | None = None
    mlflow_uri: str | None = field(default=None, repr=False)
    download_cache: Path | None = None
    download_cache_size: int = 64 << 30
    predict_threads: int | None = None
    predict_batch_tokens: int = 8192
    predict_delay: float = 0.002

    silence: float = 5.0
    watchdog: float = 60.0
    quarantine: float = 600.0

    host: str = "127.0.0.1"
    port: int = 50051
    max_message_size: int = 4 << 20
    receive_timeout: float = 2.0
    write_timeout: float = 10.0
    max_call_time: float = 3600.0
    grace: float = 30.0
    reflection: str = "auto"

    api_keys_file: Path | None = None
    api_keys: tuple[ApiKey, ...] = field(default=(), repr=False)
    tls_certificate: Path | None = None
    tls_key: Path | None = field(default=None, repr=False)
    tls_client_ca: Path | None = None

    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    otlp_endpoint: str | None = field(default=None, repr=False)
    log_format: str = "text"
    log_level: str = "info"

    @property
    def model_name(self) -> str:
        """Return the name that clients use."""
        if self.served_name is not None:
            return self.served_name
        if self.model.startswith(("/", ".", "~")) or Path(self.model).is_dir():
            return Path(self.model).expanduser().resolve().name
        return self.model

    @property
    def is_open_to_others(self) -> bool:
        """Say whether other machines may reach a server that asks for no key."""
        return not self.api_keys and self.host not in {"127.0.0.1", "::1", "localhost"}

    def predict_options(self) -> PredictOptions:
        """Return what the predict process is started with."""
        models = located(self.predict_models, self.model_root)
        if all(spec.name != BUILTIN_FEATURES for spec in models):
            models = (*models, builtin_spec())
        return PredictOptions(
            models=models,
            model_root=None if self.model_root is None else str(self.model_root.absolute()),
            memory_bytes=self.model_memory,
            max_models=self.max_models,
            mlflow_uri=self.mlflow_uri,
            download_folder=None if self.download_cache is None else str(self.download_cache.absolute()),
            download_bytes=self.download_cache_size,
            device=self.device,
            num_threads=self.predict_threads,
            max_batch_tokens=self.predict_batch_tokens,
            max_delay_s=self.predict_delay,
        )

    def engine_options(self) -> EngineOptions:
        """Return what the engine process is started with."""
        return EngineOptions(
            model=self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            executor=self.executor,
            block_size=self.block_size,
            kv_memory_bytes=self.kv_memory,
            num_blocks=self.num_blocks,
            max_model_length=self.max_model_length,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            waiting_bound_s=self.waiting_bound,
            default_lifetime_s=self.lifetime,
            min_cached_tokens=self.min_cached_tokens,
            policy=self.policy,
            trial=self.trial,
            canary=self.canary,
            namespace_quota=self.tenant_quota,
            soft_pin_share=self.soft_pins,
            hard_pin_share=self.hard_pins,
            tiers=TierOptions(
                host_bytes=self.host_cache,
                host_codec=self.host_codec,
                disk_path=None if self.disk_cache is None else str(self.disk_cache),
                disk_bytes=self.disk_cache_size,
                disk_codec=self.disk_codec,
                redis_url=self.redis_url,
                redis_lifetime_s=self.redis_lifetime,
                redis_codec=self.redis_codec,
                restore=self.restore,
                prefetches_sessions=self.session_prefetch == "on",
                snapshot_root=None if self.snapshots is None else str(self.snapshots),
            ),
            num_threads=self.threads,
            random_weights=self.random_weights,
            seed=self.seed,
        )
