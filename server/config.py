"""The server's configuration, resolved once: flags > ``KVSERVE_*`` environment > YAML file > defaults.

One table, :data:`SETTINGS`, names every setting; the command line, the environment's names, the keys of the
YAML file and the help text all follow from it. The name ``kv_memory`` is ``--kv-memory``,
``KVSERVE_KV_MEMORY`` and ``kv_memory:``. An unknown key or variable is an error that names it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.engine.options import EngineOptions
from server.rpc.auth import ApiKey, ApiKeyError, parse_api_keys

__all__ = ["SETTINGS", "ConfigError", "ServerConfig", "Setting", "parse_bytes", "parse_seconds", "resolve"]

ENVIRONMENT_PREFIX = "KVSERVE_"
_OF_OTHERS = frozenset({"KVSERVE_CONFIG", "KVSERVE_TARGET", "KVSERVE_API_KEY"})
"""Variables of that prefix that are not settings: the file's own, and those that the client reads."""
_SIZE_UNITS = {"": 1, "B": 1}
_SIZE_UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_SIZE_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_TIME_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class ConfigError(Exception):
    """A setting that cannot be used; the text names it by the way it was given."""


Parse = Callable[[object], Any]


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

    max_model_length: int | None = None
    max_batch_tokens: int = 512
    max_running: int = 256
    max_waiting: int = 1024
    waiting_bound: float = 30.0

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
            num_threads=self.threads,
            random_weights=self.random_weights,
            seed=self.seed,
        )


def parse_bytes(value: object) -> int:
    """Return a size: ``4GiB``, ``500 MB``, ``1.5GiB`` or a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    units = {name.lower(): factor for name, factor in _SIZE_UNITS.items()}
    if found is None or found[2].lower() not in units or isinstance(value, bool):
        raise ValueError("must be a size such as 4GiB or 500MB")
    size = int(float(found[1]) * units[found[2].lower()])
    if not 1 <= size <= 1 << 50:
        raise ValueError("must be between 1 byte and 1024 TiB")
    return size


def parse_seconds(value: object) -> float:
    """Return a duration in seconds: ``10m``, ``1.5h``, ``250ms`` or a number of seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value))
    if found is None or found[2] not in _TIME_UNITS or isinstance(value, bool):
        raise ValueError("must be a duration such as 30s, 10m or 2h")
    seconds = float(found[1]) * _TIME_UNITS[found[2]]
    if seconds > 10 * 366 * 86_400:
        raise ValueError("must be at most 10 years")
    return seconds


def _positive_seconds(value: object) -> float:
    seconds = parse_seconds(value)
    if seconds <= 0:
        raise ValueError("must be more than 0")
    return seconds


def _integer(low: int, high: float = math.inf) -> Parse:
    def parse(value: object) -> int:
        text = str(value).strip()
        if isinstance(value, bool | float) or re.fullmatch(r"[+-]?\d{1,18}", text) is None:
            raise ValueError("must be a whole number")
        if not low <= int(text) <= high:
            raise ValueError(
                f"must be at least {low}" if high == math.inf else f"must be between {low} and {high}"
            )
        return int(text)

    return parse


def _choice(*names: str) -> Parse:
    def parse(value: object) -> str:
        # YAML reads a bare on and off as booleans.
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value).strip().lower()
        if text not in names:
            raise ValueError(f"must be {', '.join(names[:-1])} or {names[-1]}")
        return text

    return parse


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("must be a text")
    return value


def _name(value: object) -> str:
    text = _text(value)
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,255}", text) is None or ".." in text:
        raise ValueError("must be a name of letters, digits and . _ : @ / -")
    return text


def _path(value: object) -> Path:
    return Path(_text(value)).expanduser()


def _flag(value: object) -> bool:
    text = str(value).strip().lower()
    if text not in {"true", "false", "1", "0", "yes", "no", "on", "off"}:
        raise ValueError("must be true or false")
    return text in {"true", "1", "yes", "on"}


def _block_size(value: object) -> int:
    size: int = _integer(1, 256)(value)
    if size & (size - 1):
        raise ValueError("must be a power of two")
    return size


def _endpoint(value: object) -> str:
    text = _text(value)
    if re.fullmatch(r"https?://[^\s/]+", text) is None:
        raise ValueError("must look like http://host:4317")
    return text


def _settings(group: str, *rows: tuple[str, Parse, str, str]) -> list[Setting]:
    return [Setting(name, parse, text, metavar, group) for name, parse, metavar, text in rows]


SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for setting in (
        *_settings(
            "model",
            ("model", _text, "MODEL", "builtin, a local folder, or a name on the hub (default: builtin)"),
            ("revision", _text, "COMMIT", "revision of a model from the hub"),
            ("served_name", _name, "NAME", "name by which clients ask for the model (default: MODEL)"),
            (
                "device",
                _choice("auto", "cpu", "cuda", "mps"),
                "NAME",
                "auto, cpu, cuda or mps (default: auto)",
            ),
            (
                "dtype",
                _choice("auto", "float32", "bfloat16", "float16"),
                "NAME",
                "auto, float32, bfloat16 or float16 (default: auto, the checkpoint's own)",
            ),
            (
                "executor",
                _choice("auto", "native", "transformers"),
                "NAME",
                "auto, native (fused) or transformers (the reference)",
            ),
            ("threads", _integer(1, 4096), "N", "threads of the engine (default: one less than the cores)"),
            ("random_weights", _flag, "", "random weights in the model's shape, for benchmarks"),
            ("seed", _integer(0, 2**63 - 1), "N", "seed of random weights (default: 0)"),
        ),
        *_settings(
            "KV cache",
            ("block_size", _block_size, "TOKENS", "tokens in a block, a power of two (default: 16)"),
            (
                "kv_memory",
                parse_bytes,
                "SIZE",
                "memory for KV blocks, such as 4GiB (default: a share of what is free)",
            ),
            ("num_blocks", _integer(2, 2**31 - 1), "N", "number of KV blocks, instead of --kv-memory"),
            (
                "lifetime",
                _positive_seconds,
                "TIME",
                "cached blocks are dropped this long after insertion, such as 10m",
            ),
            (
                "min_cached_tokens",
                _integer(0, 2**31 - 1),
                "TOKENS",
                "shorter prompts leave nothing behind (default: 0)",
            ),
        ),
        *_settings(
            "scheduling",
            (
                "max_model_length",
                _integer(2, 2**31 - 1),
                "TOKENS",
                "prompt and generated tokens (default: the model's)",
            ),
            ("max_batch_tokens", _integer(1, 2**20), "TOKENS", "tokens computed in a step (default: 512)"),
            ("max_running", _integer(1, 2**16), "N", "sequences in a step (default: 256)"),
            (
                "max_waiting",
                _integer(0, 2**20),
                "N",
                "requests in the queue; more are refused (default: 1024)",
            ),
            (
                "waiting_bound",
                _positive_seconds,
                "TIME",
                "after so long nobody is served before a waiting request (default: 30s)",
            ),
        ),
        *_settings(
            "network",
            ("host", _text, "ADDRESS", "address to listen on (default: 127.0.0.1)"),
            ("port", _integer(0, 65535), "N", "port to listen on; 0 takes a free one (default: 50051)"),
            ("max_message_size", parse_bytes, "SIZE", "largest message, in and out (default: 4MiB)"),
            (
                "receive_timeout",
                _positive_seconds,
                "TIME",
                "for a request to arrive after its headers (default: 2s)",
            ),
            ("write_timeout", _positive_seconds, "TIME", "for a client to take a message (default: 10s)"),
            ("max_call_time", _positive_seconds, "TIME", "longest call, whatever its deadline (default: 1h)"),
            ("grace", parse_seconds, "TIME", "for running calls to finish when stopped (default: 30s)"),
            (
                "reflection",
                _choice("auto", "on", "off"),
                "MODE",
                "gRPC reflection: on, off, or auto (on unless keys are configured)",
            ),
        ),
        *_settings(
            "security",
            (
                "api_keys_file",
                _path,
                "FILE",
                "YAML list of {tenant, scopes, key or key_sha256}; without keys everybody may call",
            ),
            ("tls_certificate", _path, "FILE", "PEM certificate chain"),
            ("tls_key", _path, "FILE", "PEM key of the certificate"),
            ("tls_client_ca", _path, "FILE", "PEM; clients must present a certificate signed by it"),
        ),
        *_settings(
            "telemetry",
            (
                "metrics_port",
                _integer(0, 65535),
                "N",
                "serve Prometheus metrics at /metrics on this port (default: off)",
            ),
            ("metrics_host", _text, "ADDRESS", "address of the metrics (default: 127.0.0.1)"),
            ("otlp_endpoint", _endpoint, "URL", "send traces to this OTLP/gRPC collector (default: off)"),
            ("log_format", _choice("text", "json"), "NAME", "text or json (default: text)"),
            (
                "log_level",
                _choice("debug", "info", "warning", "error"),
                "NAME",
                "debug, info, warning or error (default: info)",
            ),
        ),
    )
}


def resolve(
    flags: Mapping[str, object], environment: Mapping[str, str], *, config_file: str | None = None
) -> ServerConfig:
    """Return the configuration. ``flags`` holds what was given on the command line, by setting name.

    Raises :class:`ConfigError`. Reads the YAML file and the keys file.
    """
    config_file = config_file or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG") or None
    document = {} if config_file is None else _read_mapping(Path(config_file).expanduser())
    inline_keys = document.pop("api_keys", None)
    given: dict[str, tuple[str, object]] = {}
    for key, value in document.items():
        if key not in SETTINGS:
            raise ConfigError(f"{config_file}: unknown key {key!r}{_hint(key, SETTINGS)}")
        if value is not None:
            given[key] = (f"{config_file}: {key}", value)
    by_variable = {setting.variable: setting.name for setting in SETTINGS.values()}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _OF_OTHERS:
            continue
        if variable not in by_variable:
            raise ConfigError(f"unknown environment variable {variable}{_hint(variable, by_variable)}")
        if text:
            given[by_variable[variable]] = (variable, text)
    given.update({name: (SETTINGS[name].flag, value) for name, value in flags.items()})

    values: dict[str, Any] = {}
    for name, (source, value) in given.items():
        try:
            values[name] = SETTINGS[name].parse(value)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}, not {_shown(value)}") from error
    values["api_keys"] = _api_keys(values.get("api_keys_file"), inline_keys, config_file)
    config = ServerConfig(**values)
    _check_together(config)
    return config


def _check_together(config: ServerConfig) -> None:
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key belong together")
    if config.tls_client_ca is not None and config.tls_certificate is None:
        raise ConfigError("--tls-client-ca needs --tls-certificate and --tls-key")
    if config.kv_memory is not None and config.num_blocks is not None:
        raise ConfigError("--kv-memory and --num-blocks exclude each other")


def _api_keys(file: Path | None, inline: object, config_file: str | None) -> tuple[ApiKey, ...]:
    if file is not None and inline is not None:
        raise ConfigError("api_keys and api_keys_file exclude each other")
    source = str(file) if file is not None else f"{config_file}: api_keys"
    entries = _read_yaml(file) if file is not None else inline
    if entries is None and file is None:
        return ()
    try:
        return parse_api_keys(entries)
    except ApiKeyError as error:
        raise ConfigError(f"{source}: {error}") from error


def _read_mapping(path: Path) -> dict[str, object]:
    document = _read_yaml(path)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a mapping of settings")
    return {str(key).replace("-", "_"): value for key, value in document.items()}


def _read_yaml(path: Path) -> object:
    import yaml

    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # The parser's own text may quote a line, and with it a key.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}: not valid YAML{where}") from None


def _hint(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: object) -> str:
    return repr(value if len(str(value)) <= 80 else str(value)[:80] + "...")
