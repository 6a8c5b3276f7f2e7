"""Which predict models to serve, from the command line or a catalogue file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from server.config.values import read_text
from server.predict.options import FeatureSpec, ModelSpec

__all__ = ["BUILTIN_FEATURES", "builtin_spec", "located", "read_predict_models", "specs_of"]

BUILTIN_FEATURES = "builtin-encoder"
"""Name of the stateful encoder that is served everywhere, unless a catalogue has something else under it."""


def builtin_spec() -> ModelSpec:
    """Return the built-in stateful encoder."""
    # Served everywhere: what it may keep (about 28 MB) must not crowd out anybody's models.
    return ModelSpec(name=BUILTIN_FEATURES, features=FeatureSpec(max_entries=20_000))


def read_predict_models(value: object) -> tuple[ModelSpec, ...] | Path:
    """Return the models, or the file that says them.

    A YAML list of models; or text: ``NAME=SOURCE,NAME=SOURCE``, else the path of a catalogue file.
    """
    if isinstance(value, list):
        return specs_of(value)
    text = read_text(value)
    if "=" not in text:
        return Path(text).expanduser()
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    return specs_of([{"name": name.strip(), "source": source.strip()} for name, _, source in pairs])


def specs_of(entries: object) -> tuple[ModelSpec, ...]:
    """Return the models of a catalogue's list. Raises ``ValueError`` that says where it is wrong."""
    if isinstance(entries, Mapping) and set(entries) == {"models"}:
        entries = entries["models"]
    if not isinstance(entries, list):
        reason = "must be a list of models, each with a name and a source or features"
        raise ValueError(reason)  # noqa: TRY004 - of a text, not of a type
    return tuple(_spec(index, entry) for index, entry in enumerate(entries))


def located(specs: tuple[ModelSpec, ...], model_root: Path | None) -> tuple[ModelSpec, ...]:
    """Return the models with their folders made absolute where they do not lie below the model root.

    "./a", "~/a" and "/a" are where a shell would look; "a" is below the model root if there is one.
    """
    return tuple(_located(spec, model_root) for spec in specs)


def _spec(index: int, entry: Any) -> ModelSpec:
    if isinstance(entry, dict) and isinstance(entry.get("version"), int):
        entry = {**entry, "version": str(entry["version"])}  # YAML reads a bare 2 as a number
    if isinstance(entry, dict) and entry.get("features") in (True, "builtin"):
        entry = {**entry, "features": {}}
    try:
        return msgspec.convert(entry, ModelSpec, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"models[{index}]: {error}") from error


def _located(spec: ModelSpec, model_root: Path | None) -> ModelSpec:
    source = spec.source
    if source is None or source.startswith(("hf:", "models:")):
        return spec
    if source.startswith(("/", "./", "../", "~")) or source in (".", "..") or model_root is None:
        # Links stay as they are written: where one leads is decided at each load.
        folder = os.path.abspath(Path(source).expanduser())  # noqa: PTH100
        return msgspec.structs.replace(spec, source=folder)
    return spec
