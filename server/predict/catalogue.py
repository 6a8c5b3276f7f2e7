"""Which models there are: names, versions, aliases, and which version a call goes to.

::

    configured  (options.models)            \\
    found       (folders below model_root)   >  name -> version -> CatalogueEntry
    added       (LoadModel with a source)   /

    a call with version ""       a share of them to each alias that has one (canaries), the rest to "latest"
    a call with version "2"      that version; what is no version is looked up among the aliases

"latest" is the highest version that no share is routed to, unless an operator says otherwise. One that is
added is not before it was loaded, and is gone again if it cannot be: it must not stand in for one that works.
Versions are ordered as people count: 2 before 10, 1.9 before 1.10, 1.0-rc before 1.0.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvcore.clock import Clock
from server.predict.errors import InputError, ModelExistsError, ModelRefusedError, UnknownModelError
from server.predict.messages import LoadModel, ModelStatus, SetAlias
from server.predict.options import POOLINGS, TASKS, ModelSpec, PredictOptions, is_plain_name
from server.predict.sources import check_remote_source, source_kind

__all__ = ["CANARY", "LATEST", "Catalogue", "CatalogueEntry", "ModelKey", "version_order"]

LATEST = "latest"
CANARY = "canary"
MAX_VERSIONS = 10_000
"""Entries in all: names are text from clients' operators, and metrics carry them."""
SCAN_INTERVAL_S = 1.0
"""The model root is read again for a name that is not known, at most this often."""


class ModelKey(msgspec.Struct, frozen=True, order=True):
    """A version of a model."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A version that can be loaded."""

    spec: ModelSpec
    source_kind: str

    @property
    def key(self) -> ModelKey:
        return ModelKey(self.spec.name, self.spec.version)


@dataclass(slots=True)
class _Alias:
    version: str
    share: float = 0.0


class _Model:
    """The versions of one name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: dict[str, CatalogueEntry] = {}
        self.aliases: dict[str, _Alias] = {}
        self.on_trial: set[str] = set()
        """Added, and not loaded yet."""
        self.found: set[str] = set()
        """Below the model root: nobody has said what to make of them."""
        self._latest = ""

    def changed(self) -> None:
        """Find the latest version anew."""
        self._latest = ""

    def latest(self) -> str:
        if not self._latest:
            trials = {alias.version for alias in self.aliases.values() if alias.share > 0}
            named = self.aliases.get(LATEST)
            proved = self.versions.keys() - self.on_trial or self.versions.keys()
            candidates = proved - trials or proved
            self._latest = max(candidates, key=version_order) if named is None else named.version
        return self._latest

    def knows(self, version: str) -> bool:
        return version == LATEST or version in self.versions or version in self.aliases

    def find(self, version: str) -> CatalogueEntry:
        if version == LATEST:
            version = self.latest()
        elif version not in self.versions and version in self.aliases:
            version = self.aliases[version].version
        if version not in self.versions:
            raise UnknownModelError(f"model {self.name} has no such version or alias")
        return self.versions[version]

    def routed(self, roll: float | None) -> CatalogueEntry:
        if roll is not None:
            for alias in self.aliases.values():
                if roll < alias.share:
                    return self.versions[alias.version]
                roll -= alias.share
        return self.versions[self.latest()]

    def aliases_of(self, version: str) -> tuple[str, ...]:
        names = {alias for alias, target in self.aliases.items() if target.version == version}
        if version == self.latest():
            names.add(LATEST)
        return tuple(sorted(names))

    def traffic_share_of(self, version: str) -> float:
        share = sum(alias.share for alias in self.aliases.values() if alias.version == version)
        if version == self.latest():
            share += 1.0 - sum(alias.share for alias in self.aliases.values())
        return min(1.0, max(0.0, share))


class Catalogue:
    """See the module's text. All methods may be called from any thread."""

    def __init__(self, options: PredictOptions, *, clock: Clock) -> None:
        """Raise ``ModelRefusedError`` for models that cannot stand side by side, or sources that are none."""
        self._root = None if options.model_root is None else Path(options.model_root)
        self._clock = clock
        self._lock = threading.Lock()
        self._models: dict[str, _Model] = {}
        self._num_entries = 0
        self._scanned = -SCAN_INTERVAL_S
        for spec in options.models:
            self._put(_configured(spec))
            if spec.canary is not None:
                if CANARY in self._models[spec.name].aliases:
                    raise ModelRefusedError(f"model {spec.name!r} has two versions with a canary's share")
                self._models[spec.name].aliases[CANARY] = _Alias(spec.version, spec.canary)
                self._models[spec.name].changed()
        if self._root is not None and not self._root.is_dir():
            raise ModelRefusedError("the model root is not a folder")
        self._scan()

    def route(self, model: str, version: str = "", *, roll: float | None = None) -> CatalogueEntry:
        """Return where a call goes. ``roll``, in [0, 1), decides about canaries; None: to none of them.

        Raises ``UnknownModelError``.
        """
        with self._lock:
            found = self._find(model)
            if version and not found.knows(version):
                self._scan_if_due()
            return found.find(version) if version else found.routed(roll)

    def entries(self, model: str = "") -> list[CatalogueEntry]:
        """Return all versions (of one model), by name and version. Raises ``UnknownModelError``."""
        with self._lock:
            if not model:
                self._scan_if_due()
            models = [self._find(model)] if model else [self._models[name] for name in sorted(self._models)]
            return [
                found.versions[version]
                for found in models
                for version in sorted(found.versions, key=version_order)
            ]

    def named(self, status: ModelStatus) -> ModelStatus:
        """Return a version's status with its aliases and its share of the traffic."""
        with self._lock:
            model = self._models.get(status.name)
            if model is None or status.version not in model.versions:
                return status
            return msgspec.structs.replace(
                status,
                aliases=model.aliases_of(status.version),
                traffic_share=model.traffic_share_of(status.version),
            )

    def add(self, op: LoadModel) -> CatalogueEntry:
        """Add the version that ``op.source`` names; return it, also if the very same stands there already.

        A new one is on trial until :meth:`confirm` or :meth:`withdraw`, unless it is loaded on first use.
        Raises ``InputError`` naming a field, also for a source that may not come from a client,
        ``ModelExistsError`` naming what the version that stands there has other, or ``ModelRefusedError``.
        """
        for field, value, known in (("task", op.task, TASKS), ("pooling", op.pooling, POOLINGS)):
            if value and value not in known:
                raise InputError(f"must be {', '.join(known[:-1])} or {known[-1]}", part=field)
        for field, value in (("model", op.model), ("version", op.version or "1")):
            if not is_plain_name(value):
                raise InputError("is not a plain name", part=field)
        try:
            check_remote_source(op.source)
        except ModelRefusedError as error:
            raise InputError(error.reason, part="source") from error
        with self._lock:
            model = self._models.get(op.model)
            version = op.version or _next_version(model)
            if version == LATEST or (model is not None and version in model.aliases):
                raise InputError("is an alias", part="version")
            entry = _entry(
                ModelSpec(
                    name=op.model,
                    version=version,
                    source=op.source,
                    task=op.task or None,
                    pooling=op.pooling or None,
                )
            )
            there = model or _Model(op.model)
            present = there.versions.get(version)
            if present is None:
                self._put(entry)
                if not op.lazy:
                    self._models[op.model].on_trial.add(version)
                    self._models[op.model].changed()
                return entry
            if op.lazy and version in there.found:
                # It is repeated in a new process, which has found the same folder by itself meanwhile.
                there.versions[version] = entry
                there.found.remove(version)
                return entry
            _check_same(present.spec, entry.spec)
            return present

    def confirm(self, entry: CatalogueEntry) -> None:
        """Note that a version has been loaded; it is back if a load that failed withdrew it meanwhile."""
        name, version = entry.spec.name, entry.spec.version
        with self._lock:
            model = self._models.get(name)
            if model is None or version not in model.versions:
                self._put(entry)
            elif version in model.on_trial:
                model.on_trial.remove(version)
                model.changed()

    def withdraw(self, entry: CatalogueEntry) -> bool:
        """Take a version that is on trial out again, unless an alias names it; say whether. Others stay."""
        with self._lock:
            name, version = entry.spec.name, entry.spec.version
            model = self._models.get(name)
            if model is None or version not in model.on_trial:
                return False
            model.on_trial.remove(version)
            model.changed()
            if any(alias.version == version for alias in model.aliases.values()):
                return False
            del model.versions[version]
            self._num_entries -= 1
            if not model.versions:
                del self._models[name]
            return True

    def set_alias(self, op: SetAlias) -> None:
        """Set, move or take away an alias. Raises ``InputError`` or ``UnknownModelError``."""
        if not is_plain_name(op.alias):
            raise InputError("is not a plain name", part="alias")
        share = op.traffic_share
        if share is not None and not 0 <= share <= 1:
            raise InputError("must be between 0 and 1", part="traffic_share")
        if share is not None and op.alias == LATEST:
            raise InputError("latest has what the other aliases leave", part="traffic_share")
        with self._lock:
            model = self._find(op.model)
            if op.alias in model.versions:
                raise InputError("is a version", part="alias")
            if not op.version:
                model.aliases.pop(op.alias, None)
                model.changed()
                return
            version = model.find(op.version).spec.version
            present = model.aliases.get(op.alias)
            new_share = (present.share if present is not None else 0.0) if share is None else share
            others = sum(alias.share for name, alias in model.aliases.items() if name != op.alias)
            if others + new_share > 1 + 1e-9:
                raise InputError("exceeds what the other aliases leave", part="traffic_share")
            model.aliases[op.alias] = _Alias(version, new_share)
            model.changed()

    def _find(self, name: str) -> _Model:
        if name not in self._models:
            self._scan_if_due()
        if name not in self._models:
            raise UnknownModelError("no such model is served here")
        return self._models[name]

    def _put(self, entry: CatalogueEntry) -> None:
        spec = entry.spec
        model = self._models.setdefault(spec.name, _Model(spec.name))
        if spec.version in model.versions:
            raise ModelRefusedError(f"model {spec.name!r} has the version {spec.version!r} twice")
        if spec.version == LATEST or spec.version in model.aliases:
            raise ModelRefusedError(f"model {spec.name!r}: {spec.version!r} is an alias")
        if self._num_entries >= MAX_VERSIONS:
            raise ModelRefusedError("the catalogue is full")
        model.versions[spec.version] = entry
        model.changed()
        self._num_entries += 1

    def _scan_if_due(self) -> None:
        if self._clock.now() - self._scanned >= SCAN_INTERVAL_S:
            self._scan()

    def _scan(self) -> None:
        """Take in new folders below the root. What was configured or added under a name stays as it is."""
        self._scanned = self._clock.now()
        if self._root is None:
            return
        for source, name, version in _model_folders(self._root):
            known = self._models.get(name)
            taken = known is not None and (version in known.versions or version in known.aliases)
            if not taken and version != LATEST and self._num_entries < MAX_VERSIONS:
                self._put(_entry(ModelSpec(name=name, version=version, source=source)))
                self._models[name].found.add(version)


def version_order(version: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts versions as people count."""
    parts = re.findall(r"\d+|[A-Za-z]+", version)
    # A word counts as less than the end: a release candidate comes before its release.
    return (*((1, int(part), "") if part.isdigit() else (-1, 0, part) for part in parts), (0, 0, version))


def _entry(spec: ModelSpec) -> CatalogueEntry:
    return CatalogueEntry(spec, "features" if spec.source is None else source_kind(spec.source))


def _configured(spec: ModelSpec) -> CatalogueEntry:
    try:
        return _entry(spec)
    except ModelRefusedError as error:
        # One of many lines of a file: say which.
        raise ModelRefusedError(f"model {spec.name!r} version {spec.version!r}: {error.reason}") from error


def _check_same(present: ModelSpec, wanted: ModelSpec) -> None:
    """Raise ``ModelExistsError`` unless they agree in all that can be asked for."""
    stands = f"version {present.version} stands in the catalogue with"
    if present.source != wanted.source:
        # Not which: it may be a path of the operator's.
        raise ModelExistsError(f"{stands} another source", part="source")
    for part in ("task", "pooling"):
        has, asked = getattr(present, part), getattr(wanted, part)
        if has != asked:
            shown = "the one of the model's configuration" if has is None else has
            raise ModelExistsError(f"{stands} {shown}", part=part)


def _next_version(model: _Model | None) -> str:
    numbers = [] if model is None else [int(version) for version in model.versions if version.isdigit()]
    return str(max(numbers, default=0) + 1)


def _model_folders(root: Path) -> list[tuple[str, str, str]]:
    """Return (path below the root, name, version) of the folders that hold a model."""
    found = []
    for name in _subfolders(root):
        if (root / name / "config.json").is_file():
            found.append((name, name, "1"))
            continue
        found += [
            (f"{name}/{version}", name, version)
            for version in _subfolders(root / name)
            if (root / name / version / "config.json").is_file()
        ]
    return found


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as items:
            return sorted(item.name for item in items if is_plain_name(item.name) and item.is_dir())
    except OSError:
        return []
