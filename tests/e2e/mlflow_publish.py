"""Publish models in an MLflow registry as their authors would. A process of its own: MLflow warns a lot.

    python mlflow_publish.py <registry> <folder for scratch> <canary>

The names of the registered models say what is wrong with them; ``good`` has version 1 and 2, and alias
``champion`` on 1. Whatever code runs from one of them makes the file ``canary``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "TOKENIZERS_PARALLELISM": "false"}

import cloudpickle  # type: ignore[import-untyped]
import mlflow
import mlflow.pyfunc
import mlflow.transformers
import torch
from mlflow import MlflowClient
from mlflow.pyfunc.model import PythonModel
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, pipeline

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "day"]


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mknod, (self.path,)


class Function(PythonModel):
    """A model that is a pickle of its own code."""

    def predict(self, context: Any, model_input: list[str], params: Any = None) -> list[str]:
        return model_input


def make_pipeline(scratch: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    (scratch / "vocab.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return pipeline(
        "text-classification",
        model=BertForSequenceClassification(config).eval(),
        tokenizer=BertTokenizerFast(str(scratch / "vocab.txt")),
    )


def wait_for(uri: str) -> None:
    for _ in range(3000):
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the registry does not answer")


def main(uri: str, scratch: Path, canary: Path) -> None:
    good = make_pipeline(scratch, 1)
    with torch.no_grad():
        logits = good.model(**good.tokenizer("good day", return_tensors="pt")).logits
    (scratch / "logits.json").write_text(json.dumps(logits.tolist()))
    folder = scratch / "good"
    mlflow.transformers.save_model(good, folder, pip_requirements=["transformers"])
    code = scratch / "helper.py"
    code.write_text(f"open({str(canary)!r}, 'w')")
    planted = cloudpickle.dumps(Canary(str(canary)))
    function = scratch / "function"
    mlflow.pyfunc.save_model(function, python_model=Function(), pip_requirements=["mlflow"])
    (function / "python_model.pkl").write_bytes(planted)

    wait_for(uri)
    mlflow.set_tracking_uri(uri)
    client = MlflowClient()

    def register(name: str, folder: Path) -> None:
        run = client.create_run("0").info.run_id
        client.log_artifacts(run, str(folder), "model")
        client.create_registered_model(name)
        source = f"{client.get_run(run).info.artifact_uri}/model"
        client.create_model_version(name, source, run_id=run, await_creation_for=0)

    def spoil(name: str, change: Callable[[Path], object]) -> None:
        copy = scratch / name
        # What no rule looks at is left out: each file is a request.
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.yaml", "LICENSE*", "requirements*"))
        change(copy)
        register(name, copy)

    def edit(old: str, new: str) -> Callable[[Path], object]:
        def change(copy: Path) -> None:
            text = (copy / "MLmodel").read_text()
            assert old in text
            (copy / "MLmodel").write_text(text.replace(old, new))

        return change

    for seed in (1, 2):
        with mlflow.start_run():
            model = good if seed == 1 else make_pipeline(scratch, seed)
            mlflow.transformers.log_model(
                model, name="model", registered_model_name="good", pip_requirements=["transformers"]
            )
    client.set_registered_model_alias("good", "champion", "1")
    with ThreadPoolExecutor(6) as pool:
        made = [pool.submit(register, "function", function)]
        spoiled: dict[str, Callable[[Path], object]] = {
            "code": lambda copy: shutil.copytree(_folder_of(code), copy / "code"),
            "loader": edit("loader_module: mlflow.transformers", "loader_module: helper"),
            "pickle beside": lambda copy: (copy / "model" / "pytorch_model.bin").write_bytes(planted),
            "renamed pickle": lambda copy: (copy / "model" / "model.safetensors").write_bytes(planted),
            "yaml": lambda copy: (copy / "MLmodel").write_text(f"!!python/object/apply:os.mknod [{canary}]"),
        }
        for name, change in spoiled.items():
            made.append(pool.submit(spoil, name, change))
        for each in made:
            each.result()


def _folder_of(code: Path) -> Path:
    folder = code.parent / "code_only"
    folder.mkdir()
    shutil.copy(code, folder)
    return folder


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    # Not through MLflow's own exit, which waits several seconds for queues that nobody needs.
    os._exit(0)
