"""A loaded text model: texts in, answers out, whatever executor computes them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import numpy as np
import torch

from server.predict.errors import ComputeError, InputError, WrongTaskError
from server.predict.messages import Inputs, ModelInfo, Output, Task
from server.predict.model import Prepared
from server.worker.predict.executors import Executor, Floats
from server.worker.predict.recipe import Recipe
from server.worker.predict.tokenizer import EncodedText, TextTokenizer

__all__ = ["TextModel"]

logger = logging.getLogger(__name__)


class TextModel:
    """A ``server.predict.model.PredictModel`` over texts."""

    def __init__(
        self, info: ModelInfo, recipe: Recipe, tokenizer: TextTokenizer, executor: Executor, *, num_ids: int
    ) -> None:
        """``num_ids``: how many tokens the model knows; a tokenizer may have more."""
        self._info = info
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._executor: Executor | None = executor
        self._num_ids = num_ids

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def num_padding_tokens(self) -> int:
        """Return how many tokens were computed for nothing so far."""
        return 0 if self._executor is None else self._executor.num_padding_tokens

    def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
        if inputs.num_rows:
            raise WrongTaskError("the model takes texts, not rows of features")
        with_spans = self._recipe.task is Task.CLASSIFY_TOKENS
        encoded = self._tokenizer.encode(inputs.texts, truncate=truncate, with_spans=with_spans)
        for index, text in enumerate(encoded):
            if int(text.ids.max()) >= self._num_ids:
                raise InputError("has a token that the model does not know", index=index, part="text")
        return [
            Prepared(len(text), text, truncated=text.truncated, reuse=reuse, tenant=tenant)
            for text in encoded
        ]

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        texts: list[EncodedText] = [item.payload for item in batch]
        if self._executor is None:
            raise ComputeError("the model was closed")
        try:
            rows = self._executor.run(texts)
        except (MemoryError, torch.OutOfMemoryError):
            raise ComputeError("there is no memory for a batch of this size") from None
        except Exception as error:  # whatever a family's forward raises
            logger.exception("the model failed on a batch of %d inputs", len(texts))
            raise ComputeError("the model failed on this input") from error
        if not all(np.isfinite(row).all() for row in rows):
            raise ComputeError("the model gave numbers that are none")
        return [self._output(item, text, row) for item, text, row in zip(batch, texts, rows, strict=True)]

    def close(self) -> None:
        self._executor = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _output(self, item: Prepared, text: EncodedText, row: Floats) -> Output:
        tokens: tuple[tuple[int, int, int, int], ...] = ()
        values = row
        match self._recipe.task:
            case Task.CLASSIFY:
                values = _sigmoid(row) if self._recipe.multi_label else _softmax(row)
            case Task.CLASSIFY_TOKENS:
                shares = _softmax(row[[position for position, *_ in text.spans]])
                best = shares.argmax(-1)
                values = shares.max(-1, initial=0.0)
                tokens = tuple(
                    (int(label), start, end, part)
                    for label, (_, start, end, part) in zip(best, text.spans, strict=True)
                )
            case Task.EMBED if self._recipe.normalize:
                values = row / max(float(np.linalg.norm(row)), 1e-12)
        return Output(
            np.ascontiguousarray(values, "<f4").tobytes(),
            num_tokens=item.num_tokens,
            truncated=item.truncated,
            tokens=tokens,
        )


def _softmax(scores: Floats) -> Floats:
    raised = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    shares: Floats = raised / raised.sum(-1, keepdims=True)
    return shares


def _sigmoid(scores: Floats) -> Floats:
    # By tanh: no overflow at either end.
    shares: Floats = 0.5 * (1 + np.tanh(0.5 * scores))
    return shares
