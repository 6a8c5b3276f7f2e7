"""The arrows of docs/architecture.md are the only ones in the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.import_rules import check_module, check_tree, imports_of, rule_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "kvcore": ROOT / "kvcore",
    "kvserve": ROOT / "client" / "kvserve",
    "loadgen": ROOT / "loadgen",
    "server": ROOT / "server",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_an_arrow_of_the_design(package):
    violations = check_tree({package: PACKAGES[package]})
    assert not violations, "\n".join(str(violation) for violation in violations)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvcore.tree", "import torch"),
        ("kvcore.tree", "import msgspec"),
        ("kvcore.manager", "import time"),
        ("kvcore.manager", "from threading import Lock"),
        ("kvcore.tiers.disk", "import redis"),
        ("kvcore.tiers.disk", "import pickle"),
        ("kvcore.tree", "from server.engine import plan"),
        ("server.worker.runner", "from kvcore.tree import PrefixTree"),
        ("server.worker.runner", "from kvcore import tree"),
        ("server.worker.runner", "import server.engine.scheduler"),
        ("server.worker.runner", "import grpc"),
        ("server.engine.scheduler", "def f():\n    import torch"),
        ("server.engine.scheduler", "from importlib import import_module\nimport_module('torch.nn')"),
        ("server.engine.scheduler", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("server.engine.scheduler", "from ..worker import runner"),
        ("server.engine.loop", "from opentelemetry import trace"),
        ("server.rpc.generate", "from kvcore import keys"),
        ("server.rpc.generate", "import torch.nn as nn"),
        ("server.rpc.generate", "from server.engine.scheduler import Scheduler"),
        ("server.rpc.generate", "from kvserve import AsyncClient"),
        ("server.app", "import loadgen"),
        ("kvserve._aio", "from server.rpc import convert"),
        ("kvserve.v1.generate_pb2", "from kvserve import _aio"),
        ("loadgen.runner", "from kvcore import tree"),
        ("loadgen.runner", "import torch"),
        ("loadgen.experiments.core", "from kvcore.tree import PrefixTree"),
    ],
)
def test_a_planted_violation_is_caught(module, source):
    assert len(check_module(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvcore.tiers.redis", "import redis"),
        ("kvcore.clock", "import time"),
        ("server.telemetry.tracing", "from opentelemetry import trace"),
        ("server.worker.runner", "from server.engine.plan import StepPlan"),
        ("server.engine_main", "from server.worker.runner import ModelRunner"),
        ("server.rpc.convert", "from kvserve.v1 import generate_pb2"),
        ("loadgen.experiments.peer", "import torch"),
        ("loadgen.experiments.tiers", "from kvcore.simulate import replay"),
    ],
)
def test_an_arrow_of_the_design_passes(module, source):
    assert check_module(module, source) == []


def test_relative_imports_are_resolved_from_modules_and_packages():
    assert list(imports_of("from . import plan", "server.engine.loop")) == [("server.engine.plan", 1)]
    assert list(imports_of("from . import plan", "server.engine", is_package=True)) == [
        ("server.engine.plan", 1)
    ]


def test_the_most_specific_rule_counts():
    assert rule_of("kvcore.tiers.redis").owner == "kvcore.tiers.redis"
    assert rule_of("server.app").owner == "server.app"
    assert rule_of("server.cli").owner == "server"
