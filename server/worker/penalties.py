"""Penalties, logit bias and suppressed tokens, applied to all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from server.engine.plan import SamplingSpec

__all__ = ["HasHistory", "adjust_logits"]


class HasHistory(Protocol):
    """A row's sampling parameters and tokens so far (:class:`server.worker.sampler.Draw`)."""

    @property
    def spec(self) -> SamplingSpec: ...

    @property
    def history(self) -> Sequence[int]: ...

    @property
    def num_prompt_tokens(self) -> int: ...


def adjust_logits(logits: torch.Tensor, draws: Sequence[HasHistory]) -> torch.Tensor:
    """Change float32 ``logits`` ``[R, vocab]`` in place, row by row of ``draws``; return them.

    Repetition penalty ``r`` as in transformers, over prompt and generated tokens: a positive logit is
    divided by ``r``, a negative one multiplied. Presence and frequency penalties as in the OpenAI API,
    over generated tokens: ``logit - presence - frequency * count``. A bias is added; a suppressed
    token's logit becomes -inf.
    """
    repeated = _Cells()
    generated = _Cells()
    biased = _Cells()
    suppressed = _Cells()
    vocab = logits.shape[1]
    for row, draw in enumerate(draws):
        spec = draw.spec
        if spec.needs_history:
            history = np.asarray(draw.history, dtype=np.int64)
            if spec.repetition_penalty != 1.0:
                ids = np.unique(history)
                repeated.add(row, ids, np.full(len(ids), spec.repetition_penalty))
            if spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0:
                ids, counts = np.unique(history[draw.num_prompt_tokens :], return_counts=True)
                generated.add(row, ids, spec.presence_penalty + spec.frequency_penalty * counts)
        if spec.logit_bias:
            merged: dict[int, float] = {}
            for token, bias in spec.logit_bias:
                merged[token] = merged.get(token, 0.0) + bias
            biased.add(row, np.fromiter(merged, np.int64), np.fromiter(merged.values(), np.float64))
        if spec.suppressed_token_ids:
            ids = np.unique(np.asarray(spec.suppressed_token_ids, dtype=np.int64))
            # An end-of-sequence id may lie outside a cut vocabulary; it can then not be drawn anyway.
            suppressed.add(row, ids[(ids >= 0) & (ids < vocab)], None)
    if repeated:
        index, penalty = repeated.place(logits.device)
        before = logits[index]
        logits[index] = torch.where(before > 0, before / penalty, before * penalty)
    if generated:
        index, penalty = generated.place(logits.device)
        logits[index] = logits[index] - penalty
    if biased:
        index, added = biased.place(logits.device)
        logits[index] = logits[index] + added
    if suppressed:
        index, _ = suppressed.place(logits.device)
        logits.index_put_(index, logits.new_tensor(float("-inf")))
    return logits


class _Cells:
    """Cells of ``[R, vocab]``, each at most once, and a number for each."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, ids: np.ndarray, values: np.ndarray | None) -> None:
        self._rows.append(np.full(len(ids), row, dtype=np.int64))
        self._ids.append(ids)
        self._values.append(np.zeros(len(ids)) if values is None else values)

    def place(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return ``(rows, ids)`` to index with, and the numbers as float32."""
        rows = torch.from_numpy(np.concatenate(self._rows)).to(device)
        ids = torch.from_numpy(np.concatenate(self._ids)).to(device)
        values = torch.from_numpy(np.concatenate(self._values).astype(np.float32)).to(device)
        return (rows, ids), values
