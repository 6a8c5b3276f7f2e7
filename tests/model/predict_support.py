"""What tests of text models share: loading, asking, and the same computed by transformers, one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from server.predict.messages import Inputs, Output, Task, TextItem
from server.predict.model import PredictModel, Prepared
from server.predict.options import ModelSpec
from server.worker.predict import load_text_model

__all__ = ["Reference", "answer", "load", "prepare", "values"]


def load(folder: Path, **spec: Any) -> Any:
    """Return the folder's model, on the CPU."""
    return load_text_model(
        folder,
        root=folder,
        spec=ModelSpec(name="tested", source="tested", **spec),
        device="cpu",
        on_progress=lambda *_: None,
    )


def as_items(texts: Sequence[Any]) -> tuple[TextItem, ...]:
    """Return items for texts, pairs of them, or items."""
    return tuple(
        t if isinstance(t, TextItem) else TextItem(t) if isinstance(t, str) else TextItem(*t) for t in texts
    )


def prepare(model: PredictModel, texts: Sequence[Any], *, truncate: bool = False) -> list[Prepared]:
    return model.prepare(Inputs(as_items(texts)), truncate=truncate, reuse=True, tenant="")


def answer(model: PredictModel, texts: Sequence[Any], *, truncate: bool = False) -> list[Output]:
    """Return the answers, all computed in one batch."""
    return model.run(prepare(model, texts, truncate=truncate))


def values(output: Output) -> Any:
    """Return an answer's numbers."""
    return np.frombuffer(output.values, "<f4")


class Reference:
    """transformers alone: its own tokenizer and forward pass, one input at a time, float32."""

    def __init__(self, folder: Path, task: Task, **tokenizer_options: Any) -> None:
        kind: Any = {Task.EMBED: AutoModel, Task.CLASSIFY_TOKENS: AutoModelForTokenClassification}.get(
            task, AutoModelForSequenceClassification
        )
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        self.model: PreTrainedModel = (
            model.get_encoder() if task is Task.EMBED and model.config.is_encoder_decoder else model
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **tokenizer_options)
        self._takes = inspect.signature(self.model.forward).parameters

    def of(self, text: Any, **options: Any) -> Any:
        """Return the model's output for a text or a pair, batch of one."""
        parts = [text] if isinstance(text, str) else list(text)
        return self.of_inputs(self.tokenizer(*parts, return_tensors="pt", **options))

    def of_inputs(self, inputs: Any) -> Any:
        with torch.inference_mode():
            return self.model(**{name: value for name, value in inputs.items() if name in self._takes})

    def of_ids(self, ids: Any) -> Any:
        tensor = torch.tensor(ids, dtype=torch.int64)[None]
        return self.of_inputs({"input_ids": tensor, "attention_mask": torch.ones_like(tensor)})
