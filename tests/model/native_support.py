"""What the tests of the native kernels share: small models, ragged batches, a driver that chunks, groups."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from server.engine.plan import PrefixGroup
from server.worker.batch import PackedBatch
from server.worker.kv_memory import KvLayout, KvMemory
from server.worker.native import NativeUnavailable
from server.worker.native.library import load


def skip_without_compiler() -> None:
    """Skip the module's tests, with the reason, where the kernels cannot be built."""
    try:
        load()
    except NativeUnavailable as error:
        pytest.skip(f"native kernels: {error.reason}", allow_module_level=True)


_FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def make_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a small random model; biases and norms are random too, so that a forgotten one shows."""
    settings: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    if family == "mistral":
        settings["sliding_window"] = 21
    settings.update(changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_FAMILIES[family](**settings), attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn_like(parameter) * 0.2
            parameter.data = noise if name.endswith("bias") else 1 + noise
        else:
            parameter.data = torch.randn_like(parameter) * (1.5 / parameter.shape[1] ** 0.5)
    return model.to(dtype).eval()


def make_memory(
    model: Any, *, num_blocks: int = 64, block_size: int = 16, dtype: torch.dtype = torch.float32
) -> KvMemory:
    """Return KV memory for a model."""
    config = model.config
    layout = KvLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=model.model.layers[0].self_attn.head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    return KvMemory(layout, num_blocks, torch.device("cpu"))


@dataclass
class Stream:
    """One sequence of a test: all of its tokens, its blocks, and how many tokens are computed."""

    tokens: list[int]
    blocks: list[int]
    computed: int = 0


@dataclass
class Driver:
    """Run parts of sequences through an executor, as a scheduler would."""

    executor: Any
    block_size: int = 16

    def step(self, work: Sequence[tuple[Stream, int]], groups: Sequence[PrefixGroup] = ()) -> torch.Tensor:
        """Compute the next ``n`` tokens of each sequence; return the logits of every token."""
        batch = pack(
            [(s.computed, s.tokens[s.computed : s.computed + n], s.blocks) for s, n in work],
            self.block_size,
            groups,
        )
        for sequence, n in work:
            sequence.computed += n
        logits: torch.Tensor = self.executor.forward(batch)
        return logits


def pack(
    work: Sequence[tuple[int, list[int], list[int]]], block_size: int, groups: Sequence[PrefixGroup] = ()
) -> PackedBatch:
    """Pack (num_computed, new tokens, blocks) triples; logits are wanted of every token."""
    lengths = [len(tokens) for _, tokens, _ in work]
    positions = [start + i for start, tokens, _ in work for i in range(len(tokens))]
    slots = [
        blocks[p // block_size] * block_size + p % block_size
        for start, tokens, blocks in work
        for p in range(start, start + len(tokens))
    ]
    widest = max(len(blocks) for _, _, blocks in work)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    contexts = [start + len(tokens) for start, tokens, _ in work]
    return PackedBatch(
        token_ids=torch.tensor([t for _, tokens, _ in work for t in tokens]),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor(
            [blocks + [0] * (widest - len(blocks)) for _, _, blocks in work], dtype=torch.int32
        ),
        logit_rows=torch.arange(sum(lengths)),
        query_lens_host=lengths,
        context_lens_host=contexts,
        groups=list(groups),
    )


def shuffled_blocks(count: int, num_blocks: int, rng: random.Random) -> list[int]:
    """Return distinct block ids in no order."""
    return rng.sample(range(num_blocks), count)
