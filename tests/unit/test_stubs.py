"""The committed stubs are what protoc makes of the protos, and load on their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))
KINDS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


@pytest.fixture(scope="module")
def fresh_stubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stubs")
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, *map(str, PROTOS)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return folder


def committed(name):
    """Return where a stub belongs: the protocols of others are the server's alone."""
    return ROOT / ("." if name.startswith("server/") else "client") / name


def test_there_are_protos():
    assert PROTOS


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", KINDS)
def test_committed_stub_is_what_protoc_makes(fresh_stubs, proto, kind):
    name = proto.relative_to(ROOT / "protos").with_suffix("").as_posix() + kind
    stub = committed(name)
    assert stub.is_file(), f"{name} is missing: run `make protos`"
    assert stub.read_text() == (fresh_stubs / name).read_text(), f"{name} is out of date: run `make protos`"


def test_no_stub_is_left_without_its_proto():
    expected = {
        proto.relative_to(ROOT / "protos").with_suffix("").as_posix() + kind
        for proto in PROTOS
        for kind in KINDS
    }
    found = {path.relative_to(ROOT / "client").as_posix() for path in (ROOT / "client").rglob("*_pb2*.py*")}
    found |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "server").rglob("*_pb2*.py*")}
    assert {name for name in found if "__pycache__" not in name} == expected
