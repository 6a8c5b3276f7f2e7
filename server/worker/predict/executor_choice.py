"""Choose what computes a model: the native encoder where it gives the same, else transformers' forward."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from server.worker.native.build import NativeUnavailable
from server.worker.predict.executors import Executor, Floats, TransformersExecutor, num_token_ids
from server.worker.predict.native import build_native_encoder
from server.worker.predict.native_executor import NativeExecutor
from server.worker.predict.probe import agree, choose_grouping, make_probe, run_alone
from server.worker.predict.recipe import Recipe
from server.worker.predict.tokenizer import EncodedText, TextTokenizer

__all__ = ["NativeDisagreesError", "choose_executor"]

logger = logging.getLogger(__name__)


class NativeDisagreesError(Exception):
    """The native executor gives other numbers, and has taken the model apart: it must be loaded again."""


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
    """Return a probed executor; the native one takes the encoder's matrices out of ``model``.

    Raises ``ModelLoadError``, ``NativeDisagreesError``.
    """
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
    if model.device.type != "cpu" or precision == "float16":
        notes.append(
            "the native executor is for float32 and bfloat16 on CPUs; transformers computes the model"
        )
        return None
    try:
        encoder = build_native_encoder(model, dtype=precision, release_source=True)
    except NativeUnavailable as error:
        logger.info("building the native encoder failed", exc_info=error)
        raise NativeDisagreesError("the native executor is not available here") from error
    if encoder is None:
        notes.append(
            "the native executor does not know this family or shape; transformers computes the model"
        )
        return None
    native = NativeExecutor(encoder, model, recipe)
    if not agree(native, probe, alone, dtype=precision):
        raise NativeDisagreesError("the native executor gives other numbers for this model")
    return native
