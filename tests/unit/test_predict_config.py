"""Which predict models are served, from flags and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import ConfigError, resolve
from server.config.predict import BUILTIN_FEATURES
from server.predict.options import BudgetSpec, ModelSpec

CATALOGUE = """
models:
  - name: minilm
    source: minilm
    preload: true
  - name: sentiment
    version: 2
    source: hf:owner/name@0123456789abcdef0123456789abcdef01234567
    canary: 0.1
  - name: risk
    features:
      prefix: 16
      budget: {max_changed: 0.02}
      canaries: [{name: wide, share: 0.1, prefix: 8}]
"""


def models(**flags: object) -> dict[str, ModelSpec]:
    return {spec.name: spec for spec in resolve(flags, {}).predict_options().models}


def test_builtin_encoder_is_served_by_default() -> None:
    [spec] = models().values()
    assert spec.name == BUILTIN_FEATURES
    assert spec.features is not None


def test_pairs_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = models(predict_models="a=./x, b=models:/churn/3,c=y,d=/abs")
    assert {name: spec.source for name, spec in found.items() if name != BUILTIN_FEATURES} == {
        "a": str(tmp_path / "x"),
        "b": "models:/churn/3",
        "c": str(tmp_path / "y"),
        "d": "/abs",
    }


def test_what_is_fetched_is_kept_where_and_as_long_as_the_operator_says(tmp_path: Path) -> None:
    options = resolve({}, {}).predict_options()
    assert (options.download_folder, options.download_bytes) == (None, 64 << 30)
    flags = {"download_cache": str(tmp_path), "download_cache_size": "2GiB"}
    options = resolve(flags, {}).predict_options()
    assert (options.download_folder, options.download_bytes) == (str(tmp_path), 2 << 30)


def test_plain_source_lies_below_the_model_root(tmp_path: Path) -> None:
    found = models(predict_models="a=x,b=./x", model_root=str(tmp_path))
    assert found["a"].source == "x"
    assert found["b"].source == str(Path.cwd() / "x")


def test_a_source_may_lie_beside_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert models(predict_models="a=../x", model_root=str(tmp_path))["a"].source == str(tmp_path / "x")


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="source must not be empty"):
        models(predict_models="a=")


def test_folders_and_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--predict-models: minilm: no such catalogue file"):
        models(predict_models="minilm")
    with pytest.raises(ConfigError, match=f"--model-root: {tmp_path}/models is not a folder"):
        models(model_root=f"{tmp_path}/models")
    assert resolve({"model_root": f"{tmp_path}/models", "predict": "off"}, {}).predict == "off"


def test_catalogue_file(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(CATALOGUE)
    found = models(predict_models=str(file), model_root=str(tmp_path))
    assert found["minilm"].preload
    assert (found["sentiment"].version, found["sentiment"].canary) == ("2", 0.1)
    features = found["risk"].features
    assert features is not None
    assert (features.prefix, features.budget, features.canaries[0].prefix) == (
        16,
        BudgetSpec(max_changed=0.02),
        8,
    )
    assert BUILTIN_FEATURES in found


def test_catalogue_inside_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "predict_models:\n  - {name: builtin-encoder, features: {prefix: 8}}\nmodel_memory: 2GiB\n"
    )
    options = resolve({}, {}, config_file=str(file)).predict_options()
    [spec] = options.models  # in the place of the built-in one
    assert spec.features is not None
    assert spec.features.prefix == 8
    assert options.memory_bytes == 2 << 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: 3", "must be a list of models"),
        ("- {name: a}", r"models\[0\]: .*either source or features"),
        ("- {name: a, source: x}\n- {name: ../b, source: x}", r"models\[1\]: .*names and versions are"),
        ("- {name: a, sorce: x}", "unknown field `sorce`"),
        ("- {name: a, source: x, pooling: max}", "pooling must be mean, cls or last"),
        ("- 7", r"models\[0\]"),
        ("- {name: a, features: {seed: 9223372036854775808}}", r"features.seed"),
        ("- {name: a, features: {seed: -9223372036854775809}}", r"features.seed"),
        ("- {name: a, features: {max_bytes: 9223372036854775808}}", r"features.max_bytes"),
        ("- {name: a, source: x, semantic: {embedder: e, seed: 9223372036854775808}}", r"semantic.seed"),
        ("- {name: a, source: x, semantic: {embedder: e, max_entries: 9223372036854775808}}", r"max_entries"),
    ],
)
def test_errors_name_the_file_and_the_model(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        resolve({"predict_models": str(file)}, {})
    assert str(file) in str(refused.value)


def test_missing_catalogue_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        resolve({"predict_models": "nowhere.yaml"}, {})
