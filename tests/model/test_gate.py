"""Families and configurations that paged attention would get wrong are refused at load, with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.engine.options import EngineOptions
from server.worker.attention.grouped import GroupedAttention
from server.worker.batch import PackedBatch
from server.worker.equivalence import EquivalenceProbe
from server.worker.errors import UnsupportedModel
from server.worker.gate import check_cache_window, check_config, trace_attention
from server.worker.hf_executor import HfExecutor
from server.worker.kv_memory import KvLayout, KvMemory
from server.worker.runner import ModelRunner
from tests.model.families import save_tiny, tiny_config, tiny_model

torch.set_num_threads(2)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "0 of 3 layers"),
    "falcon": ({"new_decoder_architecture": False}, "0 of 3 layers"),
    "falcon alibi": ({"alibi": True, "new_decoder_architecture": False}, "alibi"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "layers"),
    "gpt_neo": ({"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]}, "0 of 3 layers"),
    "gptj": ({"rotary_dim": 4}, "0 of 3 layers"),
    "codegen": ({"rotary_dim": 4}, "0 of 3 layers"),
    "xglm": ({"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, "layers"),
    "bert": ({}, "not causal"),
    "mamba": ({"state_size": 4}, "linear_attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
    "qwen3_next": (
        {"head_dim": 8, "num_experts": 4, "layer_types": ["linear_attention"] * 3},
        "linear_attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    changes, reason = REFUSED[name]
    save_tiny(name.split()[0], tmp_path, **changes)
    options = EngineOptions(model=str(tmp_path), dtype="float32", block_size=4, num_blocks=8, num_threads=2)
    with pytest.raises(UnsupportedModel, match=reason):
        ModelRunner.build(options)


def test_chunked_attention_caps_the_length():
    cap, notes = check_config(tiny_config("llama4_text", attention_chunk_size=64))
    assert cap == 64
    assert "chunks" in notes[0]


def test_rotary_embedding_that_depends_on_the_batch_caps_the_length():
    dynamic = tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    assert check_config(dynamic)[0] == 256
    long = tiny_config(
        "phi3",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    assert check_config(long)[0] == 64


WINDOWS = {
    "mistral": (11, 11, 11),
    "phimoe": (7, 7, 7),  # in its mask alone: its modules do not say it
    "gemma3_text": (9, 9, 9, 9, 9, None),
    "gpt_oss": (10, None, 10),
    "qwen3": (None, None, None),
    "llama4_text": (None, None, None),
}


@pytest.mark.parametrize("family", WINDOWS)
def test_trace_reads_windows_out_of_the_models_own_masks(family):
    changes = {"sliding_window": 7} if family == "phimoe" else {}
    assert trace_attention(tiny_model(family, **changes)).windows == WINDOWS[family]


def test_window_that_only_the_cache_knows_caps_the_length():
    config = tiny_config("llama", sliding_window=40)
    cap, notes = check_cache_window(config, (None, None, None))
    assert cap == 40
    assert "window" in notes[0]
    assert check_cache_window(tiny_config("mistral"), (11, 11, 11)) == (None, [])
    assert check_cache_window(tiny_config("llama"), (None, None, None)) == (None, [])


def test_plain_configuration_has_no_cap():
    assert check_config(tiny_config("llama")) == (None, [])


def test_trace_finds_the_shape_of_kv():
    shape = trace_attention(tiny_model("qwen3"))
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.vocab_size) == (3, 2, 12, 97)
    assert not shape.needs_plain_math
    latent = trace_attention(tiny_model("deepseek_v3"))
    assert (latent.num_kv_heads, latent.head_dim) == (4, 12)  # values of 6 are padded
    assert trace_attention(tiny_model("gpt_oss")).needs_plain_math


class Forgetful(GroupedAttention):
    """Sees this step's tokens only: the mistake of an executor that loses earlier chunks."""

    def attend(self, query, memory, batch, spec):
        with torch.inference_mode():
            memory.storage[:, :, 1] *= 0.5
        return super().attend(query, memory, batch, spec)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 16, 64])
@pytest.mark.parametrize("max_length", [1, 5, 256])
def test_probe_passes_what_is_right(block_size, max_length):
    model = tiny_model("llama")
    probe = EquivalenceProbe(model, block_size=block_size, max_length=max_length)
    shape = trace_attention(model)
    layout = KvLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, block_size, torch.float32)
    memory = KvMemory(layout, 4, torch.device("cpu"))
    assert (
        probe.check(HfExecutor(model, memory, GroupedAttention(), windows=shape.windows).forward, memory)
        < 1e-4
    )
    assert not memory.storage.any(), "the probe leaves nothing behind"


def broken(batch: PackedBatch) -> torch.Tensor:
    raise ZeroDivisionError


def test_probe_refuses_what_is_wrong():
    model = tiny_model("llama")
    probe = EquivalenceProbe(model, block_size=4, max_length=256)
    shape = trace_attention(model)
    layout = KvLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, 4, torch.float32)
    memory = KvMemory(layout, 4, torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="differs"):
        probe.check(HfExecutor(model, memory, Forgetful(), windows=shape.windows).forward, memory)
    with pytest.raises(UnsupportedModel, match="ZeroDivisionError"):
        probe.check(broken, memory)
