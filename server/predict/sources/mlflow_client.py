"""The MLflow client, as a process of its own that lives as long as one fetch.

MLflow brings many packages, settings of its own for logging, tracing and telemetry, and downloads that cannot
be stopped: all of it stays out of the process that computes, and ends when that one says so. Requests and
answers are one JSON object a line (standard input and output)::

    {"op": "find", "uri", "name", "version" | "alias"}  ->  {"version", "location"}
    {"op": "list", "uri", "location", "max_files", "max_folders"}  ->  {"files": [[path, bytes], ...]}
    {"op": "fetch", "uri", "location", "path", "folder"}  ->  {}
    whatever fails  ->  {"error": "missing" | "denied" | "not ready" | "failed", "text": for the log}

It only looks up, lists and copies: nothing that was fetched is read here, let alone loaded, and the modules
that could load a model are kept out (which also halves the time that MLflow takes to import).
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

__all__ = ["main"]

_MAX_TEXT = 2000
_KEPT_OUT = (
    *("cloudpickle", "dill", "joblib", "numpy", "onnx", "pandas", "pyarrow", "scipy", "skops", "sklearn"),
    *("matplotlib", "tensorflow", "torch", "transformers"),
)
"""All optional to MLflow's client."""
_MISSING = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
_DENIED = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}


def main() -> None:
    """Answer requests until standard input ends; nobody waits for what is being answered then."""
    for name in _KEPT_OUT:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails
    # Standard output carries answers alone; what libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: SimpleQueue[str] = SimpleQueue()
    is_busy = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            is_busy.set()
            lines.put(line)
        if is_busy.is_set():
            # The process that asked is gone: a download may have minutes to go.
            os._exit(1)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while line := lines.get():
        answer = json.dumps(_answer(json.loads(line)))
        is_busy.clear()
        print(answer, file=answers, flush=True)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from mlflow.exceptions import MlflowException

    operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "find": _find,
        "list": _list,
        "fetch": _fetch,
    }
    try:
        return operations[request["op"]](request)
    except MlflowException as error:
        code = str(error.error_code)
        is_missing = code in _MISSING and request["op"] == "find"
        kind = "missing" if is_missing else "denied" if code in _DENIED else "failed"
        return {"error": kind, "text": str(error)[:_MAX_TEXT]}
    except Exception as error:  # noqa: BLE001 - it is answered, and logged by whoever asked
        return {"error": "failed", "text": f"{type(error).__name__}: {error}"[:_MAX_TEXT]}


def _find(request: dict[str, Any]) -> dict[str, Any]:
    """Find where a version's files are; an alias is resolved first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=request["uri"], registry_uri=request["uri"])
    name = request["name"]
    if request["version"] is not None:
        found = client.get_model_version(name, request["version"])
    else:
        found = client.get_model_version_by_alias(name, request["alias"])
    if str(found.status) != "READY":
        return {"error": "not ready", "text": f"its status is {found.status}"}
    location = client.get_model_version_download_uri(name, str(found.version))
    if location.startswith("models:/m-"):
        location = client.get_logged_model(location.removeprefix("models:/")).artifact_location
    return {"version": str(found.version), "location": location}


def _list(request: dict[str, Any]) -> dict[str, Any]:
    """List all files, folder by folder; stop where there are more than was asked for."""
    repository = _repository(request)
    files: list[tuple[str, int | None]] = []
    pending: list[str | None] = [None]
    num_folders = 0
    while pending and len(files) <= request["max_files"] and num_folders <= request["max_folders"]:
        num_folders += 1
        for info in repository.list_artifacts(pending.pop()):
            if info.is_dir:
                pending.append(info.path)
            else:
                files.append((info.path, info.file_size))
    return {"files": files[: request["max_files"] + 1], "is_complete": not pending}


def _fetch(request: dict[str, Any]) -> dict[str, Any]:
    """Copy one file to ``folder``/``path``. The caller has checked the path."""
    _repository(request).download_artifacts(request["path"], dst_path=request["folder"])
    return {}


def _repository(request: dict[str, Any]) -> Any:
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    mlflow.set_tracking_uri(request["uri"])
    return get_artifact_repository(request["location"], tracking_uri=request["uri"])


if __name__ == "__main__":
    main()
