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

from kvserve._cli.main import _make_parser
from server.config import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "client" / "README.md", *(ROOT / "docs").glob("*.md")])
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


def test_metrics_that_are_named_exist() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    source = (ROOT / "server" / "telemetry" / "metrics.py").read_text(encoding="utf-8")
    names = re.findall(r"`kvserve_([a-z_]+)`", text)
    assert len(names) > 10
    for name in names:
        bare = name.removesuffix("_total")
        assert re.search(rf'"(kvserve_)?({bare}|{bare.removeprefix("cache_tier_")})"', source), name


def test_pictures_are_those_of_the_tables() -> None:
    script = ROOT / "scripts" / "draw_cache_pictures.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
