"""The table of settings: names, how they are read, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.config.predict import read_predict_models
from server.config.values import (
    Parse,
    integer_between,
    one_of,
    parse_bytes,
    parse_seconds,
    read_block_size,
    read_canary,
    read_endpoint,
    read_flag,
    read_name,
    read_names,
    read_path,
    read_positive_seconds,
    read_redis_url,
    read_share,
    read_text,
    seconds_of_at_least,
)

__all__ = ["ENVIRONMENT_PREFIX", "SETTINGS", "Setting"]

ENVIRONMENT_PREFIX = "KVSERVE_"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: how it is called, read and explained."""

    name: str
    parse: Parse
    help: str
    metavar: str
    group: str

    @property
    def flag(self) -> str:
        """Return the command line's name."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Return the environment's name."""
        return ENVIRONMENT_PREFIX + self.name.upper()


def _settings(group: str, *rows: tuple[str, Parse, str, str]) -> list[Setting]:
    return [Setting(name, parse, text, metavar, group) for name, parse, metavar, text in rows]


SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for setting in (
        *_settings(
            "model",
            ("model", read_text, "MODEL", "builtin, a local folder, or a name on the hub (default: builtin)"),
            ("revision", read_text, "COMMIT", "revision of a model from the hub"),
            ("served_name", read_name, "NAME", "name by which clients ask for the model (default: MODEL)"),
            (
                "device",
                one_of("auto", "cpu", "cuda", "mps"),
                "NAME",
                "auto, cpu, cuda or mps (default: auto)",
            ),
            (
                "dtype",
                one_of("auto", "float32", "bfloat16", "float16"),
                "NAME",
                "auto, float32, bfloat16 or float16 (default: auto, the checkpoint's own)",
            ),
            (
                "executor",
                one_of("auto", "native", "transformers"),
                "NAME",
                "auto, native (fused) or transformers (the reference)",
            ),
            (
                "threads",
                integer_between(1, 4096),
                "N",
                "threads of the engine (default: one less than the cores)",
            ),
            ("random_weights", read_flag, "", "random weights in the model's shape, for benchmarks"),
            ("seed", integer_between(0, 2**63 - 1), "N", "seed of random weights (default: 0)"),
        ),
        *_settings(
            "KV cache",
            ("block_size", read_block_size, "TOKENS", "tokens in a block, a power of two (default: 16)"),
            (
                "kv_memory",
                parse_bytes,
                "SIZE",
                "memory for KV blocks, such as 4GiB (default: a share of what is free)",
            ),
            ("num_blocks", integer_between(2, 2**31 - 1), "N", "number of KV blocks, instead of --kv-memory"),
            (
                "lifetime",
                read_positive_seconds,
                "TIME",
                "cached blocks are dropped this long after insertion, such as 10m",
            ),
            (
                "min_cached_tokens",
                integer_between(0, 2**31 - 1),
                "TOKENS",
                "shorter prompts leave nothing behind (default: 0)",
            ),
            (
                "policy",
                read_name,
                "NAME",
                "eviction policy (`python -m kvcore.simulate --policy list`; default: best)",
            ),
            (
                "trial",
                read_names,
                "NAMES",
                "policies to run in the shadow of it, with commas between (default: none)",
            ),
            (
                "canary",
                read_canary,
                "NAME:SHARE",
                "another policy for a share of the namespaces, such as arc:10%",
            ),
            (
                "tenant_quota",
                read_share,
                "SHARE",
                "most blocks that one namespace may keep (default: no limit)",
            ),
            ("soft_pins", read_share, "SHARE", "most blocks that soft pins may hold (default: 80%)"),
            ("hard_pins", read_share, "SHARE", "most blocks that hard pins may hold (default: 50%)"),
        ),
        *_settings(
            "tiers",
            (
                "host_cache",
                parse_bytes,
                "SIZE",
                "host memory for blocks evicted from the device (default: off)",
            ),
            ("disk_cache", read_path, "FOLDER", "keep cached blocks here, over restarts (default: off)"),
            ("disk_cache_size", parse_bytes, "SIZE", "budget of that folder (default: 16GiB)"),
            ("redis_url", read_redis_url, "URL", "share cached blocks with other servers (default: off)"),
            ("redis_lifetime", read_positive_seconds, "TIME", "of what is put into Redis (default: 1h)"),
            (
                "host_codec",
                one_of("none", "zstd", "int8"),
                "NAME",
                "none, zstd (lossless) or int8 (lossy, measured) (default: none)",
            ),
            ("disk_codec", one_of("none", "zstd", "int8"), "NAME", "the same for the disk (default: none)"),
            ("redis_codec", one_of("none", "zstd", "int8"), "NAME", "the same for Redis (default: none)"),
            (
                "restore",
                one_of("auto", "always", "never"),
                "WHEN",
                "bring blocks back when that is expected to beat computing them (auto), always or never",
            ),
            (
                "session_prefetch",
                one_of("on", "off"),
                "MODE",
                "bring sessions back before they are expected to return (default: off)",
            ),
            (
                "snapshots",
                read_path,
                "FOLDER",
                "root of the snapshots that CacheAdmin writes and reads (default: off)",
            ),
        ),
        *_settings(
            "scheduling",
            (
                "max_model_length",
                integer_between(2, 2**31 - 1),
                "TOKENS",
                "prompt and generated tokens (default: the model's)",
            ),
            (
                "max_batch_tokens",
                integer_between(1, 2**20),
                "TOKENS",
                "tokens computed in a step (default: 512)",
            ),
            ("max_running", integer_between(1, 2**16), "N", "sequences in a step (default: 256)"),
            (
                "max_waiting",
                integer_between(0, 2**20),
                "N",
                "requests in the queue; more are refused (default: 1024)",
            ),
            (
                "waiting_bound",
                read_positive_seconds,
                "TIME",
                "after so long nobody is served before a waiting request (default: 30s)",
            ),
        ),
        *_settings(
            "predict",
            (
                "predict",
                one_of("on", "off"),
                "MODE",
                "serve Predict, in a process of its own (default: on)",
            ),
            (
                "predict_models",
                read_predict_models,
                "MODELS",
                "NAME=SOURCE,... or a catalogue file; sources: FOLDER, hf:owner/name@COMMIT, models:/name/N",
            ),
            (
                "model_root",
                read_path,
                "FOLDER",
                "serve the models in FOLDER/name and FOLDER/name/version, and load from there over RPC",
            ),
            (
                "model_memory",
                parse_bytes,
                "SIZE",
                "memory for predict models, the least recently used leave (default: half of what is free)",
            ),
            (
                "max_models",
                integer_between(1, 2**16),
                "N",
                "most predict models loaded (default: no limit)",
            ),
            ("mlflow_uri", read_endpoint, "URL", "tracking server of models:/ sources (default: off)"),
            (
                "download_cache",
                read_path,
                "FOLDER",
                "keep models fetched from MLflow here (default: ~/.cache/kvserve/models)",
            ),
            (
                "download_cache_size",
                parse_bytes,
                "SIZE",
                "budget of that folder, the least recently used leave (default: 64GiB)",
            ),
            (
                "predict_threads",
                integer_between(1, 4096),
                "N",
                "threads of the predict process (default: one less than the cores)",
            ),
            (
                "predict_batch_tokens",
                integer_between(16, 2**20),
                "TOKENS",
                "tokens, or rows of features, computed together (default: 8192)",
            ),
            (
                "predict_delay",
                parse_seconds,
                "TIME",
                "most that a batch is held back for more to come, where that pays (default: 2ms)",
            ),
        ),
        *_settings(
            "faults",
            (
                "silence",
                seconds_of_at_least(1.0),
                "TIME",
                "a process that neither says nor does anything for so long is replaced (default: 5s)",
            ),
            (
                "watchdog",
                seconds_of_at_least(1.0),
                "TIME",
                "so is one that is in a single step or batch for so long (default: 1m)",
            ),
            (
                "quarantine",
                parse_seconds,
                "TIME",
                "refuse a request so long that has killed its process; 0: never (default: 10m)",
            ),
        ),
        *_settings(
            "network",
            ("host", read_text, "ADDRESS", "address to listen on (default: 127.0.0.1)"),
            (
                "port",
                integer_between(0, 65535),
                "N",
                "port to listen on; 0 takes a free one (default: 50051)",
            ),
            ("max_message_size", parse_bytes, "SIZE", "largest message, in and out (default: 4MiB)"),
            (
                "receive_timeout",
                read_positive_seconds,
                "TIME",
                "for a request to arrive after its headers (default: 2s)",
            ),
            ("write_timeout", read_positive_seconds, "TIME", "for a client to take a message (default: 10s)"),
            (
                "max_call_time",
                read_positive_seconds,
                "TIME",
                "longest call, whatever its deadline (default: 1h)",
            ),
            ("grace", parse_seconds, "TIME", "for running calls to finish when stopped (default: 30s)"),
            (
                "reflection",
                one_of("auto", "on", "off"),
                "MODE",
                "gRPC reflection: on, off, or auto (on unless keys are configured)",
            ),
        ),
        *_settings(
            "security",
            (
                "api_keys_file",
                read_path,
                "FILE",
                "YAML list of {tenant, scopes, key or key_sha256}; without keys everybody may call",
            ),
            ("tls_certificate", read_path, "FILE", "PEM certificate chain"),
            ("tls_key", read_path, "FILE", "PEM key of the certificate"),
            ("tls_client_ca", read_path, "FILE", "PEM; clients must present a certificate signed by it"),
        ),
        *_settings(
            "telemetry",
            (
                "metrics_port",
                integer_between(0, 65535),
                "N",
                "serve Prometheus metrics at /metrics on this port (default: off)",
            ),
            ("metrics_host", read_text, "ADDRESS", "address of the metrics (default: 127.0.0.1)"),
            ("otlp_endpoint", read_endpoint, "URL", "send traces to this OTLP/gRPC collector (default: off)"),
            ("log_format", one_of("text", "json"), "NAME", "text or json (default: text)"),
            (
                "log_level",
                one_of("debug", "info", "warning", "error"),
                "NAME",
                "debug, info, warning or error (default: info)",
            ),
        ),
    )
}
