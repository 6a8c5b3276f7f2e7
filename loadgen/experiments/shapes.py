"""Shapes of known models, for random weights: the arithmetic is the real one's, the text is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SHAPES", "ModelShape", "write_model_folder"]

BYTES_PER_WEIGHT = 2
"""bfloat16."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of Llama architecture."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool
    max_model_length: int = 4096

    @property
    def head_dim(self) -> int:
        """Return the width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def weights_read_per_step(self) -> int:
        """Return how many weights one decode step reads: every matrix once, the output matrix included."""
        kv_width = self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * self.hidden_size + 2 * self.hidden_size * kv_width
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + feed_forward) + self.vocab_size * self.hidden_size

    @property
    def bytes_read_per_step(self) -> int:
        """Return the bytes of weights that one decode step reads; KV comes on top."""
        return self.weights_read_per_step * BYTES_PER_WEIGHT

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of KV that one position holds, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES_PER_WEIGHT

    def config(self) -> dict[str, object]:
        """Return the content of ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.is_tied,
            "max_position_embeddings": self.max_model_length,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 576, 30, 9, 3, 1536, 49152, is_tied=True),
        ModelShape("tinyllama-1.1b", 2048, 22, 32, 4, 5632, 32000, is_tied=False),
        # For tests of the machinery itself: starts in a second.
        ModelShape("tiny", 64, 2, 4, 2, 128, 512, is_tied=True),
    )
}


def write_model_folder(shape: ModelShape, folder: Path, *, tokenizer_from: Path | None = None) -> Path:
    """Write a model folder without weights and return it.

    ``tokenizer_from``: a folder with a tokenizer to copy. Any will do where prompts are token ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    if tokenizer_from is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    return folder
