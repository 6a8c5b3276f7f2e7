"""Choose what computes a model: the native encoder where it gives the same, else transformers' forward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from server.worker.predict.executors import Executor, Floats, TransformersExecutor, num_token_ids
from server.worker.predict.native_executor import NativeExecutor
from server.worker.predict.probe import agree, choose_grouping, make_probe, run_alone
from server.worker.predict.recipe import Recipe
from server.worker.predict.tokenizer import EncodedText, TextTokenizer

try:
    from server.worker.predict.native import build_native_encoder
except ImportError:

    def build_native_encoder(model: PreTrainedModel, *, dtype: str) -> Any:
        return None


__all__ = ["choose_executor"]

logger = logging.getLogger(__name__)


def choose_executor(
    model: PreTrainedModel,
    recipe: Recipe,
    tokenizer: TextTokenizer,
    *,
    dtype: torch.dtype,
    wanted: str,
    max_length: int,
    notes: list[str],
) -> Executor:
    """Return a probed executor. Raises ``ModelLoadError``."""
    num_ids = num_token_ids(model)
    probe = make_probe(tokenizer, num_ids=num_ids, max_length=max_length)
    precision = str(dtype).removeprefix("torch.")
    reference = TransformersExecutor(model, recipe)
    alone = run_alone(reference, probe)
    if wanted != "transformers":
        native = _try_native(model, recipe, probe, alone, precision, notes)
        if native is not None:
            return native
    choose_grouping(reference, probe, alone, dtype=precision, notes=notes)
    reference.num_padding_tokens = 0
    return reference


def _try_native(
    model: PreTrainedModel,
    recipe: Recipe,
    probe: Sequence[EncodedText],
    alone: Sequence[Floats],
    precision: str,
    notes: list[str],
) -> Executor | None:
    if model.device.type != "cpu":
        notes.append("the native executor is for CPUs")
        return None
    try:
        encoder = build_native_encoder(model.base_model, dtype=precision)
    except (RuntimeError, ValueError, OSError) as error:
        logger.info("building the native encoder failed", exc_info=error)
        notes.append("the native executor could not be built; transformers computes the model")
        return None
    if encoder is None:
        notes.append(
            "the native executor does not know this family or shape; transformers computes the model"
        )
        return None
    native = NativeExecutor(encoder, model, recipe)
    if not agree(native, probe, alone, dtype=precision):
        notes.append("the native executor gives other numbers here; transformers computes the model")
        return None
    return native
