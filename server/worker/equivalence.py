"""The equivalence probe: two requests over paged KV against the model's own plain forward.

They share a block, whose tokens the first one computes; the block ids are out of order, the prompts come in
chunks, and the last step attends to the shared block as a prefix group::

    step 1    first  [0, size - 3)
    step 2    first  [size - 3, size + 1)       second [size, size + 1)
    step 3    first  [size + 1, size + 5)       second [size + 1, size + 2)       group: block 0 of both
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from server.engine.plan import PrefixGroup
from server.worker.batch import PackedBatch
from server.worker.errors import UnsupportedModel
from server.worker.kv_memory import KvMemory

__all__ = ["EquivalenceProbe", "ProbePiece", "pack_pieces"]

_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Of the relative error of centred logits. Attention that misses a chunk is off by more than one."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProbePiece:
    """A part of one probe request in one step."""

    token_ids: np.ndarray
    num_computed: int
    blocks: list[int]


class EquivalenceProbe:
    """Two short requests with one shared block, and what the model itself says about them.

    Made before our attention is set on the model; used on every executor that is to serve it.
    """

    def __init__(self, model: PreTrainedModel, *, block_size: int, max_length: int) -> None:
        config = model.config.get_text_config()
        self._family = config.model_type
        self._dtype = model.dtype
        self._block_size = block_size
        size = block_size
        own = [min(5, size), min(2, size)] if size + 5 <= max_length else [0, 0]
        # A length too short for a shared block leaves one request of a single block.
        generator = np.random.default_rng(0)
        shared = generator.integers(0, config.vocab_size, min(size, max_length))
        self._prompts = [np.concatenate([shared, generator.integers(0, config.vocab_size, n)]) for n in own]
        self._expected = [_plain_logits(model, prompt) for prompt in self._prompts]

    def check(self, forward: Callable[[PackedBatch], torch.Tensor], memory: KvMemory) -> float:
        """Run the probe over the first blocks of ``memory``, clear them; return the relative error.

        Raises ``UnsupportedModel`` if ``forward`` differs by more than rounding explains.
        """
        size = self._block_size
        first, second = self._prompts
        tables = [[2, 0], [2, 1]]
        early = max(1, len(first) // 2) if len(first) <= size else size - 3 if size > 3 else 1
        group = PrefixGroup(0, 2, 0, 1)
        pieces: list[tuple[list[tuple[int, int, int]], list[PrefixGroup]]] = [([(0, 0, early)], [])]
        if len(first) <= size:
            pieces.append(([(0, early, len(first))], []))
        else:
            middle = min(size + 1, len(first) - 1) if len(first) - size > 1 else size
            pieces.append(([(0, early, middle), (1, size, len(second) - 1)], []))
            pieces.append(([(0, middle, len(first)), (1, len(second) - 1, len(second))], [group]))
        error = 0.0
        device = memory.storage.device
        try:
            for ranges, groups in pieces:
                ranges = [r for r in ranges if r[1] < r[2]]
                if not ranges:
                    continue
                batch = pack_pieces(
                    [ProbePiece(self._prompts[s][a:b], a, tables[s]) for s, a, b in ranges],
                    block_size=size,
                    device=device,
                    groups=groups,
                )
                got = forward(batch).float().cpu()
                expected = torch.cat([self._expected[s][a:b] for s, a, b in ranges])
                error = max(error, _relative_error(got, expected))
        except UnsupportedModel:
            raise
        except Exception as cause:
            logger.info("the equivalence probe failed", exc_info=cause)
            raise UnsupportedModel(
                f"{self._family} can not be run over paged KV ({type(cause).__name__})"
            ) from None
        finally:
            memory.clear([0, 1, 2])
        if not error <= _TOLERANCE[self._dtype]:
            raise UnsupportedModel(
                f"{self._family} over paged KV differs from its own forward (relative error {error:.2g})"
            )
        return error


def _plain_logits(model: PreTrainedModel, prompt: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(prompt)[None].to(model.device)
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        logger.info("the model's own forward failed", exc_info=error)
        raise UnsupportedModel(
            f"{model.config.model_type} does not run on text alone ({type(error).__name__})"
        ) from None
    return logits[0].float().cpu()


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    got = got - got.mean(-1, keepdim=True)
    expected = expected - expected.mean(-1, keepdim=True)
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def pack_pieces(
    pieces: list[ProbePiece],
    *,
    block_size: int,
    device: torch.device,
    groups: list[PrefixGroup] | None = None,
) -> PackedBatch:
    """Pack probe requests by hand, with the logits of every row wanted."""
    lens = [len(piece.token_ids) for piece in pieces]
    contexts = [piece.num_computed + n for piece, n in zip(pieces, lens, strict=True)]
    positions = [np.arange(p.num_computed, c) for p, c in zip(pieces, contexts, strict=True)]
    width = max(len(piece.blocks) for piece in pieces)
    tables = np.array([p.blocks + [0] * (width - len(p.blocks)) for p in pieces], dtype=np.int32)
    slots = [
        tables[s][where // block_size] * block_size + where % block_size for s, where in enumerate(positions)
    ]

    def place(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype, device=device)

    return PackedBatch(
        token_ids=place(np.concatenate([p.token_ids for p in pieces]), torch.int64),
        positions=place(np.concatenate(positions), torch.int64),
        slots=place(np.concatenate(slots).astype(np.int64), torch.int64),
        query_starts=place(np.concatenate([[0], np.cumsum(lens)]), torch.int32),
        context_lens=place(contexts, torch.int32),
        block_tables=place(tables, torch.int32),
        logit_rows=place(np.arange(sum(lens)), torch.int64),
        query_lens_host=lens,
        context_lens_host=contexts,
        groups=groups or [],
    )
