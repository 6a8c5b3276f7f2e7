"""Tiny random models of many families, with an initialisation wide enough that greedy outputs vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 11},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": _MOE,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8, "num_hidden_layers": 6},
    "phi": {},
    "phi3": {"sliding_window": 13},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0},
    "olmo2": {},
    "cohere": {"logit_scale": 1.0},
    "granite": {},
    "smollm3": {},
    "gpt_oss": {"head_dim": 8, "sliding_window": 10, "num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {"sliding_window": 12},
    "exaone4": {"sliding_window": 12, "sliding_window_pattern": 2},
    "glm4": {"head_dim": 8},
    "stablelm": {},
    "nemotron": {},
    "biogpt": {},
    "phimoe": {"sliding_window": 12, "num_local_experts": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 24,
    },
    "llama4_text": {
        "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 128,
    },
}  # fmt: skip


def tiny_config(family: str, **changes: Any) -> Any:
    """Return a configuration of ``family``: the base, the family's own needs, and ``changes``."""
    values = {**_BASE, **CONFIGS.get(family, {}), **changes}
    return AutoConfig.for_model(family, **{k: v for k, v in values.items() if v is not None})


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random float32 model of ``family``, in evaluation mode."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def save_tiny(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write a tiny model to ``folder`` as safetensors, and return it."""
    model = tiny_model(family, seed=seed, **changes)
    model.save_pretrained(folder)
    return model


def greedy(model: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    """Return what transformers' own ``generate`` says."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        do_sample=False,
        pad_token_id=2,
    )
    drawn: list[int] = output[0, len(prompt) :].tolist()
    return drawn
