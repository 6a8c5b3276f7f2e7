"""Flags > environment > YAML file > defaults: find every setting once, and say where a bad one came from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.config.predict import specs_of
from server.config.resolved import ServerConfig
from server.config.settings import ENVIRONMENT_PREFIX, SETTINGS
from server.predict.options import ModelSpec
from server.rpc.auth import ApiKey, ApiKeyError, parse_api_keys

__all__ = ["ConfigError", "resolve"]

_OF_OTHERS = frozenset({"KVSERVE_CONFIG", "KVSERVE_TARGET", "KVSERVE_API_KEY"})
"""Variables of that prefix that are not settings: the file's own, and those that the client reads."""
_MAY_HOLD_SECRETS = frozenset({"redis_url", "otlp_endpoint", "mlflow_uri"})
"""Settings whose text is not repeated in errors: a password may stand in it."""


class ConfigError(Exception):
    """A setting that cannot be used; the text names it by the way it was given."""


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
            shown = "" if name in _MAY_HOLD_SECRETS else f", not {_shown(value)}"
            raise ConfigError(f"{source}: {error}{shown}") from error
    if isinstance(file := values.get("predict_models"), Path):
        if not file.is_file():
            source, _ = given["predict_models"]
            raise ConfigError(f"{source}: {file}: no such catalogue file, and no NAME=SOURCE")
        values["predict_models"] = _catalogue(file)
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
    if config.predict == "on" and config.model_root is not None and not config.model_root.is_dir():
        raise ConfigError(f"--model-root: {config.model_root} is not a folder")


def _catalogue(file: Path) -> tuple[ModelSpec, ...]:
    try:
        return specs_of(_read_yaml(file))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error


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
