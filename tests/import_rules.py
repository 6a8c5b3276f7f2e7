"""Who may import whom, as a table, and a checker that walks the sources without running them.

Imports under ``TYPE_CHECKING``, inside functions and through ``import_module("literal")`` count like any
other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FIRST_PARTY", "RULES", "Rule", "Violation", "check_module", "check_tree", "imports_of", "rule_of"]

FIRST_PARTY = frozenset({"kvcore", "kvserve", "loadgen", "server", "tests"})

GRPC = ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google")
TENSORS = ("torch", "transformers", "safetensors", "numpy")
UNSAFE = ("pickle", "shelve", "marshal", "dill", "cloudpickle")
"""Formats that run code when they are read. Nobody may."""

TREE = (
    "kvcore.control",
    "kvcore.cursors",
    "kvcore.events",
    "kvcore.filler",
    "kvcore.finder",
    "kvcore.ghost",
    "kvcore.heat",
    "kvcore.index",
    "kvcore.integrity",
    "kvcore.lanes",
    "kvcore.lease",
    "kvcore.manager",
    "kvcore.node",
    "kvcore.pins",
    "kvcore.policies",
    "kvcore.queues",
    "kvcore.quotas",
    "kvcore.reclaim",
    "kvcore.restore",
    "kvcore.runs",
    "kvcore.selection",
    "kvcore.spaces",
    "kvcore.tails",
    "kvcore.tree",
    "kvcore.trial",
)
"""The modules that know what is cached where."""

CONTRACTS = (
    "server.engine.admin_answers",
    "server.engine.admin_messages",
    "server.engine.admin_ops",
    "server.engine.errors",
    "server.engine.messages",
    "server.engine.interface",
    "server.engine.options",
    "server.engine.plan",
)
"""What the engine shows to its neighbours."""

PREDICT_CONTRACTS = (
    "server.predict.errors",
    "server.predict.interface",
    "server.predict.messages",
    "server.predict.options",
)
"""What predict shows to its neighbours."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What modules under ``owner`` may import. Names cover themselves and everything below them.

    Of first-party modules only those in ``allowed``, and of these none in ``forbidden``; of others
    everything that is not in ``forbidden``, or the standard library alone with ``standard_library_only``.
    """

    owner: str
    allowed: tuple[str, ...]
    forbidden: tuple[str, ...] = ()
    standard_library_only: bool = False


@dataclass(frozen=True, slots=True)
class Violation:
    """One arrow that the table does not have."""

    module: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.imported}"


TELEMETRY = ("opentelemetry",)
REDIS = ("redis",)
MLFLOW = ("mlflow",)
OUTSIDE = (*UNSAFE, *TELEMETRY, *REDIS, *MLFLOW)

# The most specific owner's rule is the one that counts.
RULES = (
    Rule("kvserve.v1", ("kvserve.v1",), (*OUTSIDE, *TENSORS)),
    Rule("kvserve", ("kvserve",), (*UNSAFE, *REDIS, *TENSORS)),
    Rule("loadgen", ("kvserve", "loadgen"), (*OUTSIDE, *TENSORS)),
    Rule("loadgen.experiments", ("kvserve", "loadgen", "kvcore.simulate"), OUTSIDE),
    Rule("kvcore", ("kvcore",), ("threading", "asyncio", "time", "datetime"), standard_library_only=True),
    Rule("kvcore.clock", ("kvcore",), ("threading", "asyncio"), standard_library_only=True),
    Rule("kvcore.codec", ("kvcore",), (*OUTSIDE, *GRPC, "asyncio")),
    Rule("kvcore.prefetch", ("kvcore",), (*OUTSIDE, *GRPC, "asyncio")),
    Rule("kvcore.risk", ("kvcore",), (*OUTSIDE, *GRPC, "asyncio")),
    Rule("kvcore.simulate", ("kvcore",), (*OUTSIDE, *GRPC, "asyncio")),
    # Tiers keep objects; what of the cache they are is not their business.
    Rule("kvcore.tiers", ("kvcore",), (*OUTSIDE, *GRPC, *TREE, "asyncio", "torch", "transformers")),
    Rule(
        "kvcore.tiers.redis",
        ("kvcore",),
        (*UNSAFE, *TELEMETRY, *GRPC, *TREE, "asyncio", "torch", "transformers"),
    ),
    # Both processes write their logs alike.
    Rule("server.logs", (), standard_library_only=True),
    # How two processes talk, whatever they say.
    Rule("server.process", ("server.process", "server.logs"), (*OUTSIDE, *GRPC, *TENSORS)),
    Rule(
        "server.engine",
        ("kvcore", "server.engine", "server.logs", "server.process"),
        (*OUTSIDE, *GRPC, *TENSORS),
    ),
    Rule(
        "server.worker",
        ("kvcore", "server.process.memory", "server.worker", *CONTRACTS),
        (*OUTSIDE, *GRPC, *TREE, "asyncio"),
    ),
    Rule(
        "server.worker.predict",
        ("server.process.memory", "server.worker", "server.predict.model", *PREDICT_CONTRACTS),
        (*OUTSIDE, *GRPC, "asyncio"),
    ),
    Rule(
        "server.rpc",
        ("kvserve.v1", "server.rpc", *CONTRACTS, *PREDICT_CONTRACTS),
        (*OUTSIDE, "torch", "safetensors"),
    ),
    # Batches, models as opaque objects, and reuse; models are computed by the worker.
    Rule(
        "server.predict",
        ("kvcore.clock", "kvcore.risk", "server.logs", "server.predict", "server.process"),
        (*OUTSIDE, *GRPC, "torch", "transformers", "safetensors"),
    ),
    # Telemetry observes calls and engines; neither knows of it.
    Rule(
        "server.telemetry",
        ("kvserve.v1", "server.rpc.call", "server.telemetry", *CONTRACTS, *PREDICT_CONTRACTS),
        (*UNSAFE, *REDIS, *TENSORS),
    ),
    Rule(
        "server.config",
        ("server.config", "server.engine.options", "server.predict.options", "server.rpc.auth"),
        (*OUTSIDE, *GRPC, *TENSORS),
    ),
    # Composition roots: app puts the front end together, the mains the processes behind it.
    Rule("server.app", ("kvcore", "kvserve.v1", "server"), (*OUTSIDE, *TENSORS)),
    Rule(
        "server.engine_main",
        ("kvcore", "server.engine", "server.worker", "server.engine_main"),
        (*OUTSIDE, *GRPC),
    ),
    Rule(
        "server.predict.sources.mlflow_client",
        ("server.predict.sources",),
        (*UNSAFE, *TELEMETRY, *REDIS, *GRPC, "torch", "transformers", "safetensors"),
    ),
    Rule(
        "server.predict_main",
        ("kvcore.clock", "server.predict", "server.predict_main", "server.process", "server.worker.predict"),
        (*OUTSIDE, *GRPC),
    ),
    Rule("server", ("kvcore", "kvserve", "server"), OUTSIDE),
)


def covers(names: tuple[str, ...], module: str) -> bool:
    """Say whether ``module`` is one of the names or below one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def rule_of(module: str) -> Rule:
    """Return the rule of the longest owner that covers ``module``; raise ``LookupError`` if there is none."""
    found = [rule for rule in RULES if covers((rule.owner,), module)]
    if not found:
        raise LookupError(f"no import rule covers {module}")
    return max(found, key=lambda rule: len(rule.owner))


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Yield every imported module with its line, relative ones resolved; `from a import b` gives `a.b`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                yield f"{name}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            argument = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(argument, ast.Constant):
                yield str(argument.value), node.lineno


def is_allowed(rule: Rule, imported: str) -> bool:
    """Say whether the rule has an arrow to ``imported``."""
    if covers(rule.forbidden, imported):
        return False
    root = imported.split(".")[0]
    if root in FIRST_PARTY:
        return covers(rule.allowed, imported)
    return not rule.standard_library_only or root in sys.stdlib_module_names


def check_module(module: str, source: str, *, is_package: bool = False) -> list[Violation]:
    """Return the arrows of one module that its rule does not have."""
    rule = rule_of(module)
    return [
        Violation(module, imported, line)
        for imported, line in imports_of(source, module, is_package=is_package)
        if not is_allowed(rule, imported)
    ]


def check_tree(roots: Mapping[str, Path]) -> list[Violation]:
    """Check every source below the given packages' folders."""
    violations = []
    for package, folder in roots.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            violations += check_module(module, path.read_text(encoding="utf-8"), is_package=is_package)
    return violations
