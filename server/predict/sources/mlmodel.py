"""What an MLflow model must be to be served, decided from its list of files and its ``MLmodel`` alone.

MLflow's ``transformers`` flavour keeps a model in two folders, which a loader wants as one::

    MLmodel                      what it is: flavours, components
    model/config.json            \\
    model/model.safetensors       > <folder>/
    components/tokenizer/*       /
    requirements.txt, ...        not fetched

Every other flavour runs code of its own when it is loaded, most of them a pickle: none of them is served.
Code and pickles beside a good model refuse it as well: then it is not what its ``MLmodel`` says.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from server.predict.errors import ModelRefusedError
from server.predict.sources.names import check_relative_path

__all__ = [
    "MAX_FILES",
    "MLMODEL",
    "ArtifactFile",
    "check_listing",
    "check_location",
    "choose_files",
    "read_mlmodel",
]

MLMODEL = "MLmodel"
MAX_FILES = 1000
MAX_DEPTH = 8
MAX_MLMODEL_BYTES = 256 << 10

_TOKENIZER = "components/tokenizer"
_LOADED_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja"}
_PICKLES = {
    ".bin", ".ckpt", ".cloudpickle", ".dill", ".h5", ".joblib", ".keras", ".msgpack", ".npy", ".npz",
    ".pickle", ".pkl", ".pt", ".pt2", ".pth", ".skops", ".tar", ".zip",
}  # fmt: skip
_CODE = {".dll", ".dylib", ".egg", ".py", ".pyc", ".pyd", ".so", ".whl"}
_OTHER_ENGINES = {".onnx", ".pb", ".tflite", ".engine"}
_LOCAL_REGISTRIES = {"", "file", "sqlite"}
_OBJECT_STORES = {"abfss", "gs", "r2", "s3", "wasbs"}


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """A file of the artifact."""

    path: str
    """In the artifact, with forward slashes."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class MlModel:
    """What of an ``MLmodel`` matters here."""

    weights: str
    """Folder of the configuration and the weights."""


def check_location(location: str, *, uri: str) -> None:
    """Refuse a place for files that the registry at ``uri`` should not send us to.

    A registry on another machine may name its own store of artifacts or an object store, not files of this
    machine, nor some other server, which would be sent our credentials.
    """
    at, registry = urlsplit(location), urlsplit(uri)
    if registry.scheme in _LOCAL_REGISTRIES:
        is_allowed = at.scheme in ("", "file")
    elif at.scheme == "mlflow-artifacts":
        is_allowed = not at.netloc or at.netloc == registry.netloc.rpartition("@")[2]
    else:
        is_allowed = at.scheme in _OBJECT_STORES
    if not is_allowed or ".." in at.path or "%" in at.path:
        raise ModelRefusedError(
            "the registry names a place for the model's files that is not its own; let it serve its artifacts"
        )


def check_listing(files: Sequence[ArtifactFile]) -> None:
    """Refuse an artifact by the names and sizes of its files. Raises ``ModelRefusedError``."""
    if len(files) > MAX_FILES:
        raise ModelRefusedError(f"the MLflow model has more than {MAX_FILES} files")
    for file in files:
        check_relative_path(file.path, what="a file name of the MLflow model", max_parts=MAX_DEPTH)
        suffix = posixpath.splitext(file.path)[1].lower()
        if suffix in _PICKLES:
            raise ModelRefusedError(f"{file.path}: pickled or packed files can run code; use safetensors")
        if suffix in _CODE or file.path.startswith("code/"):
            raise ModelRefusedError(f"{file.path}: the MLflow model brings code of its own")
        if suffix in _OTHER_ENGINES:
            raise ModelRefusedError(
                f"{file.path}: only transformers models with safetensors weights are served"
            )
    mlmodel = [file for file in files if file.path == MLMODEL]
    if len(mlmodel) != 1 or mlmodel[0].num_bytes > MAX_MLMODEL_BYTES:
        raise ModelRefusedError("the artifact is no MLflow model (no plausible MLmodel file)")


def read_mlmodel(text: bytes) -> MlModel:
    """Check an ``MLmodel``: the transformers flavour, its weights inside, nothing that would run."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        raise ModelRefusedError("the MLmodel file can not be read as YAML") from None
    flavors = content.get("flavors") if isinstance(content, dict) else None
    if not isinstance(flavors, dict) or not all(isinstance(flavor, dict) for flavor in flavors.values()):
        raise ModelRefusedError("the MLmodel file names no flavours")
    transformers = flavors.get("transformers")
    if transformers is None:
        raise ModelRefusedError("only MLflow's transformers flavour is served; others run code when loaded")
    if not set(flavors) <= {"transformers", "python_function"}:
        raise ModelRefusedError("the MLflow model has flavours besides transformers")
    _check_function(flavors.get("python_function", {}))
    _check_flavor(transformers)
    weights = transformers.get("model_binary")
    if not isinstance(weights, str):
        raise ModelRefusedError("the MLflow model has no weights of its own (saved as a reference to a hub)")
    check_relative_path(weights, what="the folder of the weights", max_parts=MAX_DEPTH - 1)
    return MlModel(weights)


def _check_function(function: dict[str, Any]) -> None:
    if function and function.get("loader_module") != "mlflow.transformers":
        raise ModelRefusedError("the MLflow model names a loader of its own")
    if function.get("code") or "python_model" in function:
        raise ModelRefusedError("the MLflow model brings code of its own")


def _check_flavor(flavor: dict[str, Any]) -> None:
    if flavor.get("code"):
        raise ModelRefusedError("the MLflow model brings code of its own")
    if "peft" in flavor or "peft_adaptor" in flavor:
        raise ModelRefusedError("the MLflow model is an adapter; adapters are not served")
    if flavor.get("framework", "pt") != "pt":
        raise ModelRefusedError("only PyTorch models with safetensors weights are served")
    components = flavor.get("components")
    if components != ["tokenizer"]:
        raise ModelRefusedError(
            "the MLflow model is none over texts: it must have a tokenizer and nothing else"
        )


def choose_files(model: MlModel, files: Sequence[ArtifactFile]) -> dict[str, ArtifactFile]:
    """Return what is fetched, by the name it gets in the model's folder. Raises ``ModelRefusedError``."""
    chosen: dict[str, ArtifactFile] = {}
    # What both folders have is the tokenizer's, but for the model's configuration.
    for folder in (_TOKENIZER, model.weights):
        for file in files:
            if not file.path.startswith(f"{folder}/"):
                continue
            name = file.path.removeprefix(f"{folder}/")
            suffix = posixpath.splitext(name)[1].lower()
            if "/" in name or suffix not in _LOADED_SUFFIXES:
                continue
            if folder == _TOKENIZER and (suffix == ".safetensors" or name == "config.json"):
                continue
            chosen.setdefault(name, file)
    if "config.json" not in chosen or not any(name.endswith(".safetensors") for name in chosen):
        raise ModelRefusedError("the MLflow model has no configuration, or no safetensors weights")
    if not any(file.path.startswith(f"{_TOKENIZER}/") for file in chosen.values()):
        raise ModelRefusedError("the MLflow model has no tokenizer")
    return chosen
