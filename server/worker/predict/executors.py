"""Computing a batch of tokens: one small interface, and the executor that runs transformers' own forward.

An executor returns what the model says of each input, before any softmax, always float32::

    classify, regress    [labels]
    classify_tokens      [tokens, labels]
    embed                [dimensions], pooled, not yet of length 1
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from server.predict.messages import Task
from server.worker.errors import ModelLoadError
from server.worker.predict.recipe import Recipe
from server.worker.predict.tokenizer import EncodedText, Ids

__all__ = [
    "Executor",
    "Floats",
    "Grouping",
    "Ids",
    "TransformersExecutor",
    "num_token_ids",
    "pool",
    "position_offset",
]

_MAX_GROUP_TOKENS = 16_384
_SLACK_TOKENS = 16
_SLACK_SHARE = 0.05

Floats = npt.NDArray[np.float32]


class Executor(Protocol):
    """Computes batches; the compute thread alone."""

    @property
    def name(self) -> str: ...

    @property
    def num_padding_tokens(self) -> int:
        """Return how many tokens were computed for nothing so far."""
        ...

    @property
    def num_bytes(self) -> int:
        """Return the bytes of weights that it holds beside the model's own."""
        ...

    def run(self, batch: Sequence[EncodedText]) -> list[Floats]:
        """Return each input's numbers, in the batch's order."""
        ...


class Grouping(IntEnum):
    """What may be computed in one forward pass; later ones are slower and ask less of a family."""

    PADDED = 0
    """Similar lengths, the shorter ones padded at their right."""
    EQUAL_LENGTHS = 1
    ONE_BY_ONE = 2


class TransformersExecutor:
    """The reference: the model's own forward over groups of similar lengths."""

    name = "transformers"
    num_bytes = 0

    def __init__(
        self, model: PreTrainedModel, recipe: Recipe, *, grouping: Grouping = Grouping.PADDED
    ) -> None:
        self.grouping = grouping
        self.num_padding_tokens = 0
        self._model = model
        self._recipe = recipe
        self._device = model.device
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        config = model.config.get_text_config()
        self._num_ids = num_token_ids(model)
        stated = config.pad_token_id
        # None, and -1 for the same: such a head takes the last token of all.
        self._pad_id = stated if isinstance(stated, int) and 0 <= stated < self._num_ids else None
        # These heads read the last end token, and want as many of them in every row.
        self._eos_id = config.eos_token_id if model.config.is_encoder_decoder else None

    def run(self, batch: Sequence[EncodedText]) -> list[Floats]:
        results: list[Floats | None] = [None] * len(batch)
        with torch.inference_mode():
            for group in self._groups(batch):
                texts = [batch[i] for i in group]
                for index, row in zip(group, self._run_group(texts), strict=True):
                    results[index] = row
        return [row for row in results if row is not None]

    def _groups(self, batch: Sequence[EncodedText]) -> Iterator[list[int]]:
        """Yield indices of what is computed together, longest first, with next to no padding."""

        def key(index: int) -> tuple[int, int]:
            text = batch[index]
            return (int((text.ids == self._eos_id).sum()) if self._eos_id is not None else 0), -len(text)

        group: list[int] = []
        num_real = 0
        for index in sorted(range(len(batch)), key=key):
            num_tokens = len(batch[index])
            if group and not self._may_join(batch, group, index, num_real):
                yield group
                group, num_real = [], 0
            group.append(index)
            num_real += num_tokens
        if group:
            yield group

    def _may_join(self, batch: Sequence[EncodedText], group: list[int], index: int, num_real: int) -> bool:
        if self.grouping is Grouping.ONE_BY_ONE:
            return False
        first, text = batch[group[0]], batch[index]
        if self.grouping is Grouping.EQUAL_LENGTHS and len(text) != len(first):
            return False
        if self._eos_id is not None and (first.ids == self._eos_id).sum() != (text.ids == self._eos_id).sum():
            return False
        num_all = len(first) * (len(group) + 1)
        num_padding = num_all - num_real - len(text)
        return num_all <= _MAX_GROUP_TOKENS and num_padding <= _SLACK_TOKENS + _SLACK_SHARE * num_real

    def _run_group(self, texts: list[EncodedText]) -> Iterator[Floats]:
        lengths = [len(text) for text in texts]
        width = max(lengths)
        self.num_padding_tokens += width * len(texts) - sum(lengths)
        ids = np.full((len(texts), width), self._choose_pad_id(texts), np.int64)
        mask = np.zeros_like(ids)
        types = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text.ids
            mask[row, : len(text)] = 1
            if text.type_ids is not None:
                types[row, : len(text)] = text.type_ids
        inputs = {"input_ids": ids, "attention_mask": mask}
        if texts[0].type_ids is not None:
            inputs["token_type_ids"] = types
        tensors = {k: torch.from_numpy(v).to(self._device) for k, v in inputs.items() if k in self._takes}
        output = self._model(**tensors)
        yield from self._read(output, lengths)

    def _choose_pad_id(self, texts: list[EncodedText]) -> int:
        """Return an id to pad with. Without one of its own the head must not see it in any text."""
        if self._pad_id is not None:
            return self._pad_id
        used = np.unique(np.concatenate([text.ids for text in texts]))
        free = np.setdiff1d(np.arange(min(len(used) + 1, self._num_ids)), used)
        pad_id = int(free[0]) if len(free) else 0
        for config in (self._model.config, self._model.config.get_text_config()):
            config.pad_token_id = pad_id
        return pad_id

    def _read(self, output: Any, lengths: list[int]) -> Iterator[Floats]:
        if self._recipe.task is Task.EMBED:
            hidden = output.last_hidden_state
            pooled = [pool(hidden[row, :n], self._recipe.pooling) for row, n in enumerate(lengths)]
            yield from torch.stack(pooled).cpu().numpy()
            return
        scores: Floats = output.logits.float().cpu().numpy()
        if self._recipe.task is Task.CLASSIFY_TOKENS:
            yield from (scores[row, :n] for row, n in enumerate(lengths))
        else:
            yield from scores


def pool(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return one vector, float32, for a text's last hidden states ``[tokens, dimensions]``."""
    if pooling == "mean":
        return hidden.float().mean(0)
    return (hidden[0] if pooling == "cls" else hidden[-1]).float()


def num_token_ids(model: PreTrainedModel) -> int:
    """Return how many tokens the model knows. Raises ``ModelLoadError``."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):
        raise ModelLoadError("the family has no table of tokens; it is not served") from None


def position_offset(model: PreTrainedModel) -> int:
    """Return how many positions of its table the family leaves out: RoBERTa's begin after the padding id."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings"):
            padding = getattr(module, "padding_idx", None)
            return 0 if padding is None else int(padding) + 1
    return 0
