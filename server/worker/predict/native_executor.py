"""The fast executor: the native encoder over packed tokens, no padding, and the model's own head on top.

The head is the family's own code. It runs on a copy of the model whose encoder is replaced by one that hands
out the hidden states which the native encoder has computed::

    classify, regress    the first state of each text    [texts, 1, hidden] -> [texts, labels]
    classify_tokens      all states, packed              [1, tokens, hidden] -> [1, tokens, labels]

A head that wants to see more (a mean over the text, the last token) comes out wrong, and the probe at load
(:mod:`server.worker.predict.executor_choice`) refuses it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from server.predict.messages import Task
from server.worker.predict.executors import Floats, Ids, position_offset
from server.worker.predict.recipe import Recipe
from server.worker.predict.tokenizer import EncodedText

__all__ = ["NativeExecutor", "PackedEncoder"]


class PackedEncoder(Protocol):
    """As ``server.worker.predict.native.NativeEncoder``."""

    num_bytes: int
    """Embedding tables, which it shares with the model, and all that it packed."""

    def forward(self, token_ids: Ids, position_ids: Ids, type_ids: Ids, lengths: Ids) -> torch.Tensor:
        """Return the last hidden states, float32 ``[tokens, hidden]``, of texts one after another."""
        ...


class NativeExecutor:
    """Computes a batch in one pass, whatever its lengths."""

    name = "native"
    num_padding_tokens = 0

    def __init__(self, encoder: PackedEncoder, model: PreTrainedModel, recipe: Recipe) -> None:
        self._encoder = encoder
        self._recipe = recipe
        self._offset = position_offset(model)
        self._dtype = model.dtype
        tables = {
            id(t): t.weight.nbytes for t in model.base_model.modules() if isinstance(t, torch.nn.Embedding)
        }
        self.num_bytes = max(0, encoder.num_bytes - sum(tables.values()))
        self._head = None if recipe.task is Task.EMBED else _head_of(model)

    def run(self, batch: Sequence[EncodedText]) -> list[Floats]:
        if not batch:
            return []
        lengths = np.array([len(text) for text in batch], np.int32)
        starts = np.cumsum(lengths) - lengths
        ids = np.concatenate([text.ids for text in batch])
        positions = np.arange(len(ids), dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
        types = [np.zeros_like(text.ids) if text.type_ids is None else text.type_ids for text in batch]
        with torch.inference_mode():
            hidden = self._encoder.forward(ids, positions + self._offset, np.concatenate(types), lengths)
            return self._read(hidden, starts, lengths)

    def _read(self, hidden: torch.Tensor, starts: Any, lengths: Any) -> list[Floats]:
        match self._recipe.task, self._recipe.pooling:
            case Task.EMBED, "mean":
                # Sums in float64: the order of additions then shows in no digit that counts.
                sums = np.add.reduceat(hidden.numpy(), starts, axis=0, dtype=np.float64)
                return list((sums / lengths[:, None]).astype(np.float32))
            case Task.EMBED, pooling:
                return list(hidden.numpy()[starts if pooling == "cls" else starts + lengths - 1])
            case Task.CLASSIFY_TOKENS, _:
                scores = self._score(hidden[None])[0]
                return [scores[start : start + n] for start, n in zip(starts, lengths, strict=True)]
            case _:
                return list(self._score(hidden[torch.from_numpy(starts)][:, None]))

    def _score(self, states: torch.Tensor) -> Floats:
        assert self._head is not None
        output = self._head(states.to(self._dtype))
        scores: Floats = output.float().numpy()
        return scores


class _Replay(torch.nn.Module):
    """Stands in for an encoder: gives the states it was handed, pooled by the encoder's own pooler."""

    def __init__(self, pooler: torch.nn.Module | None, config: Any) -> None:
        super().__init__()
        self.pooler = pooler
        self.config = config
        self.states: torch.Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPooling:
        assert self.states is not None
        pooled = None if self.pooler is None else self.pooler(self.states)
        return BaseModelOutputWithPooling(last_hidden_state=self.states, pooler_output=pooled)


class _Head:
    def __init__(self, model: PreTrainedModel, replay: _Replay) -> None:
        self._model = model
        self._replay = replay
        self._ids = torch.zeros(1, 1, dtype=torch.int64)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        self._replay.states = states
        # Some heads look at the shape of the ids.
        output = self._model(input_ids=self._ids.expand(states.shape[0], states.shape[1]))
        self._replay.states = None
        scores: torch.Tensor = output.logits
        return scores


def _head_of(model: PreTrainedModel) -> _Head:
    """Return the model's head alone; the model itself stays as it is."""
    replay = _Replay(getattr(model.base_model, "pooler", None), model.config)
    head = copy.copy(model)
    # A shallow copy shares the table of modules: give it one of its own.
    head._modules = {**model._modules, model.base_model_prefix: replay}
    return _Head(head, replay)
