"""Configuration: precedence, spelling, units, and errors that name what was given."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from server.cli import main
from server.config import SETTINGS, ConfigError, ServerConfig, parse_bytes, parse_seconds, resolve


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "port: 1001\nblock_size: 32\nkv-memory: 2GiB\ngrace: 10s\n")
    config = resolve({"port": "1003"}, {"KVSERVE_PORT": "1002", "KVSERVE_BLOCK_SIZE": "64"}, config_file=file)
    assert (config.port, config.block_size, config.kv_memory, config.grace) == (1003, 64, 2 << 30, 10.0)
    assert config.max_running == ServerConfig().max_running


def test_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "model: ./x\n")
    assert resolve({}, {"KVSERVE_CONFIG": file}).model == "./x"


def test_every_setting_is_a_field_and_every_field_a_setting() -> None:
    assert set(SETTINGS) == {field.name for field in fields(ServerConfig)} - {"api_keys"}


def test_defaults_are_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(setting.flag in text for setting in SETTINGS.values() if setting.name != "model")
    assert "(default: 50051)" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("500 MB", 500_000_000),
        ("1.5GiB", 3 << 29),
        ("4096", 4096),
        ("10kib", 10240),
        ("1B", 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bad", ["", "GiB", "-1GiB", "4Gi", "4 parsecs", "0", "nan", "1e9", "2000TiB", True])
def test_bad_sizes(bad: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_bytes(bad)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("1.5h", 5400), ("250ms", 0.25), (30, 30), ("2d", 172_800)]
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("bad", ["", "-1s", "10 fortnights", "inf", "nan", "1000000d", False])
def test_bad_durations(bad: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_seconds(bad)


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({"port": "x"}, {}, "--port: must be a whole number, not 'x'"),
        ({"port": "70000"}, {}, "--port: must be between 0 and 65535"),
        ({}, {"KVSERVE_PORT": "-1"}, "KVSERVE_PORT: must be between"),
        ({}, {"KVSERVE_PROT": "1"}, "unknown environment variable KVSERVE_PROT; did you mean KVSERVE_PORT?"),
        ({"device": "tpu"}, {}, "--device: must be auto, cpu, cuda or mps, not 'tpu'"),
        ({"block_size": "24"}, {}, "--block-size: must be a power of two"),
        ({"kv_memory": "lots"}, {}, "--kv-memory: must be a size such as 4GiB"),
        ({"kv_memory": "1GiB", "num_blocks": "4"}, {}, "exclude each other"),
        ({"tls_key": "k.pem"}, {}, "--tls-certificate and --tls-key belong together"),
        ({"served_name": "../x"}, {}, "--served-name: must be a name"),
        ({"otlp_endpoint": "localhost:4317"}, {}, "--otlp-endpoint: must look like"),
        ({"api_keys_file": "/nowhere/keys.yaml"}, {}, "/nowhere/keys.yaml: No such file"),
        ({"silence": "500ms"}, {}, "--silence: must be at least 1s, not '500ms'"),
        ({"watchdog": "0"}, {}, "--watchdog: must be at least 1s"),
        ({"quarantine": "never"}, {}, "--quarantine: must be a duration"),
        ({"model": "x" * 500 + "\n"}, {}, r"\.\.\."),
    ],
)
def test_errors_name_the_setting_by_the_way_it_was_given(
    flags: dict[str, object], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("(", r"\(")):
        resolve(flags, environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1\n", "unknown key 'prot'; did you mean port"),
        ("- a\n", "must be a mapping"),
        ("port: [1]\n", "port: must be a whole number"),
        ("port: 1.5\n", "port: must be a whole number"),
        ("port: true\n", "port: must be a whole number"),
        ("a: : b\n", "not valid YAML, line 1"),
        ("api_keys: [{tenant: a, key: short-secret}]\n", "api_keys: entry 0: key must be"),
    ],
)
def test_errors_in_the_file_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve({}, {}, config_file=file)
    assert file in str(caught.value)
    assert "secret" not in str(caught.value)


def test_yaml_on_and_off_are_words_here(tmp_path: Path) -> None:
    assert resolve({}, {}, config_file=write(tmp_path / "c.yaml", "reflection: off\n")).reflection == "off"


def test_keys_and_passwords_are_redacted(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.yaml", "- {tenant: alice, key: a-very-hidden-key-0001}\n")
    config = resolve({"api_keys_file": keys, "otlp_endpoint": "http://user:hidden@host:1"}, {})
    assert len(config.api_keys) == 1
    assert "hidden" not in repr(config)
    assert config.api_keys[0].digest.hex() not in repr(config.api_keys)


def test_engine_options_follow() -> None:
    options = resolve(
        {"kv_memory": "1MiB", "lifetime": "10m", "threads": "2", "random_weights": "true"}, {}
    ).engine_options()
    assert (options.kv_memory_bytes, options.default_lifetime_s, options.num_threads) == (1 << 20, 600.0, 2)
    assert options.random_weights is True


@pytest.mark.parametrize(
    ("flags", "name"),
    [({}, "builtin"), ({"model": "Qwen/Qwen3-0.6B"}, "Qwen/Qwen3-0.6B"), ({"model": "/a/b/tiny"}, "tiny"),
     ({"model": "/a/b/tiny", "served_name": "mine"}, "mine")],
)  # fmt: skip
def test_served_name(flags: dict[str, object], name: str) -> None:
    assert resolve(flags, {}).model_name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--prot", "1"], "unrecognized arguments: --prot; did you mean --port?"),
        (["serve", "--port"], "expected one argument"),
        (["serve", "--port", "x"], "--port: must be a whole number"),
        ([], "the following arguments are required: COMMAND"),
        (["surf"], "invalid choice: 'surf'"),
    ],
)
def test_wrong_command_lines_end_with_2_and_a_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    assert message in capsys.readouterr().err


def test_front_end_never_imports_torch() -> None:
    check = "import sys, server.app, server.rpc.front_end; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("name", ["redis_url", "otlp_endpoint"])
def test_an_address_that_may_hold_a_password_is_not_repeated(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve({name: "ftp://user:hunter2@host"}, {})
    assert "hunter2" not in str(refused.value)
    assert f"--{name.replace('_', '-')}: must look like" in str(refused.value)
