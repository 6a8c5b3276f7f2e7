"""What the documents name exists: files, headings, flags, settings, metrics, modules, pictures."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from kvcore.clock import ManualClock
from kvserve._cli.main import _make_parser
from server.config import SETTINGS
from server.config.predict import specs_of
from server.predict.catalogue import Catalogue
from server.predict.errors import (
    ComputeError,
    ExpiredError,
    InputError,
    ModelExistsError,
    ModelInUseError,
    ModelRefusedError,
    ModelTooLargeError,
    ModelUnloadedError,
    OverloadedError,
    PredictLostError,
    QuarantinedError,
    UnknownModelError,
)
from server.predict.options import FeatureSpec, ModelSpec, PredictOptions, SemanticSpec
from server.predict.reuse import build_feature_model
from server.rpc.errors import ResponseTooLarge
from server.rpc.predict_errors import error_from_predict, predict_is_off
from tests.unit.test_deploy import known_metrics, known_samples

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "client" / "README.md", *(ROOT / "docs").glob("*.md")])
PREDICT = ROOT / "docs" / "predict.md"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

REDIS_FLAGS = frozenset(
    {
        "--bind",
        "--unixsocket",
        "--unixsocketperm",
        "--maxmemory",
        "--maxmemory-policy",
        "--save",
        "--appendonly",
    }
)


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def anchors_of(document: Path) -> set[str]:
    """Return the anchors that a forge makes of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def parsers_below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers_below(below)


def own_flags() -> set[str]:
    """Return every flag of kvserve, kvctl, and what else can be started here."""
    flags = {setting.flag for setting in SETTINGS.values()} | {"--config", "--version", "--help"}
    flags |= {"--quick", "--full"}  # of loadgen.bench, made of its modes
    for parser in parsers_below(_make_parser()):
        flags.update(parser._option_string_actions)
    for folder in ("loadgen", "scripts", "kvcore/simulate"):
        for path in (ROOT / folder).rglob("*.py"):
            flags.update(re.findall(r'"(--[a-z][a-z-]*)"', path.read_text(encoding="utf-8")))
    return flags


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors_of(found), f"{target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_flags_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not re.search(r"docker|pip install", line)]
    assert set(FLAG.findall("\n".join(lines))) - own_flags() - REDIS_FLAGS == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_modules_and_files_that_are_named_exist(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:kvcore|server|loadgen)(?:\.[a-z_]+)+)`", text):
        if not name.endswith(".py"):
            assert find_spec(name) is not None, f"no module {name}"
    for path in re.findall(r"`((?:kvcore|server|scripts|tests|docs|deploy|protos)/[\w./]+)`", text):
        assert (ROOT / path).exists(), f"no file {path}"


def test_the_yaml_example_names_settings() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert set(yaml.safe_load(example)) <= set(SETTINGS)


async def test_metrics_that_are_named_exist_and_none_is_missing() -> None:
    named: set[str] = set()
    for document in ("operations.md", "predict.md"):
        text = (ROOT / "docs" / document).read_text(encoding="utf-8")
        for start, inner, end in re.findall(r"`(kvserve_[a-z0-9_]*)(?:\{([a-z_,]+)\}([a-z_]*))?`", text):
            named |= {start + part + end for part in inner.split(",")}
    assert named - known_samples() == set()
    assert known_metrics() - {re.sub(r"_(total|info)$", "", name) for name in named} == set()


def test_every_flag_is_explained() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS if path.parent.name == "docs")
    named = set(FLAG.findall(text))
    # For benchmarks alone, but for MODEL, which is no flag.
    others = {"--model", "--random-weights", "--seed"}
    assert {setting.flag for setting in SETTINGS.values()} - named == others


def yaml_examples(document: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_catalogue_examples_are_catalogues() -> None:
    examples = [specs_of(yaml.safe_load(example)) for example in yaml_examples(PREDICT)]
    assert len(examples) == 3
    Catalogue(PredictOptions(models=examples[0]), clock=ManualClock())
    for spec in (spec for specs in examples for spec in specs if spec.features is not None):
        build_feature_model(spec, clock=ManualClock(), on_event=lambda event: None).close()


def test_the_catalogue_example_has_every_field() -> None:
    """One document is where people look for what can be written."""
    specs = [spec for text in yaml_examples(PREDICT) for spec in yaml.safe_load(text)["models"]]
    written = {field for spec in specs for field in spec}
    assert written == set(ModelSpec.__struct_fields__)
    features = {field for spec in specs for field in spec.get("features") or ()}
    text = PREDICT.read_text(encoding="utf-8")
    for struct, found in ((FeatureSpec, features), (SemanticSpec, set(specs[1]["semantic"]))):
        for field in set(struct.__struct_fields__) - found:
            assert f"`{field}" in text, f"{struct.__name__}.{field} is nowhere"


def test_reasons_of_errors_that_are_named_exist() -> None:
    table = PREDICT.read_text(encoding="utf-8").partition("## Errors")[2].partition("## Metrics")[0]
    found = re.findall(r"^\| ([A-Z_]+)(?:, `([A-Z_]+)`)? \|", table, re.MULTILINE)
    named = {(reason or code, code) for code, reason in found}
    errors = [
        InputError("x"),
        UnknownModelError("x"),
        ModelRefusedError("x"),
        ModelExistsError("x"),
        ModelTooLargeError("x"),
        ModelInUseError("x"),
        ModelUnloadedError("x"),
        OverloadedError("x"),
        PredictLostError("x"),
        ExpiredError("x"),
        ComputeError("x"),
        QuarantinedError("x"),
    ]
    answers = [*map(error_from_predict, errors), predict_is_off(), ResponseTooLarge("x")]
    assert len(named) == len(answers)
    for answer in answers:
        code = answer.code.name
        assert {(answer.reason, code), (code, code)} & named, answer.reason


@pytest.mark.parametrize("script", ["draw_cache_pictures.py", "draw_predict_pictures.py"])
def test_pictures_are_those_of_the_tables(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
