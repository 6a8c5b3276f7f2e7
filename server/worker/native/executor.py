"""The fused executor: a Llama-like model's whole step in one native call.

Weights keep their type (float32 or bfloat16); activations are float32 from the embedding to the logits, and
KV is stored in the type of ``KvMemory``. So a bfloat16 model's logits are nearer to its float32 reference
than those of bfloat16 arithmetic. A row's logits are the same bits whatever else is in the batch, however
its prompt was chunked, and whatever the number of threads.
"""

from __future__ import annotations

from ctypes import byref, c_void_p
from typing import Any

import torch

from server.worker.batch import PackedBatch
from server.worker.kv_memory import KvMemory
from server.worker.native.build import NativeUnavailable
from server.worker.native.library import (
    Matrix,
    ModelConfig,
    Vector,
    batch_view,
    check,
    dtype_code,
    kv_view,
    load,
)

__all__ = ["NativeExecutor"]

_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_STATIC_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
_PROJECTIONS = (
    (Matrix.Q, "self_attn", "q_proj"),
    (Matrix.K, "self_attn", "k_proj"),
    (Matrix.V, "self_attn", "v_proj"),
    (Matrix.O, "self_attn", "o_proj"),
    (Matrix.GATE, "mlp", "gate_proj"),
    (Matrix.UP, "mlp", "up_proj"),
    (Matrix.DOWN, "mlp", "down_proj"),
)


class NativeExecutor:
    """Run llama, mistral, qwen2 and qwen3 (and models that share their code, such as SmolLM) on the CPU."""

    name = "native"
    _handle: c_void_p | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        memory: KvMemory,
        num_threads: int,
        *,
        max_batch_tokens: int = 2048,
        max_logit_rows: int = 256,
    ) -> None:
        """Pack a transformers model's weights (the model stays usable).

        Blocks while compiling (first use on a machine) and packing. Starts ``num_threads - 1`` threads; the
        caller of ``forward`` is the last one. Scratch memory is made for ``max_batch_tokens`` and
        ``max_logit_rows`` and grows if a step brings more. Raises ``NativeUnavailable``.
        """
        self._start(model, memory, num_threads)
        self._pack(model, _keep)
        check(self._library.kvn_model_reserve(self._handle, max_batch_tokens, max_logit_rows))

    @classmethod
    def consume(
        cls,
        model: torch.nn.Module,
        memory: KvMemory,
        num_threads: int,
        *,
        max_batch_tokens: int = 2048,
        max_logit_rows: int = 256,
    ) -> NativeExecutor:
        """Do what the constructor does, but empty every weight of ``model`` as soon as it is packed.

        So memory peaks at one copy of the weights and one layer.
        """
        self = cls.__new__(cls)
        self._start(model, memory, num_threads)
        self._pack(model, _release)
        check(self._library.kvn_model_reserve(self._handle, max_batch_tokens, max_logit_rows))
        return self

    @staticmethod
    def supports(config: Any) -> str | None:
        """Return why a transformers config cannot be served by this executor, or None if it can."""
        family = getattr(config, "model_type", None)
        if family not in _FAMILIES:
            return f"the native executor does not know the model family {family}"
        if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
            return f"the native executor knows silu only, not {config.hidden_act}"
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in _STATIC_ROPES:
            return f"the native executor does not know rotary embeddings of type {rope_type}"
        if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
            return "the native executor does not know partial rotary embeddings"
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if head_dim % 8 or head_dim > 256:
            return f"the native executor needs a head size that is a multiple of 8 up to 256, not {head_dim}"
        if config.num_attention_heads % config.num_key_value_heads:
            return "the native executor needs query heads in whole groups per KV head"
        if getattr(config, "quantization_config", None) is not None:
            return "the native executor does not read quantised weights"
        return None

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Return float32 logits ``[R, vocab]``.

        Blocks, without the GIL; raises ValueError for a batch that does not fit its KV memory or model.
        """
        view, groups = batch_view(batch)
        logits = torch.empty((view.num_logit_rows, self._vocab), dtype=torch.float32)
        check(self._library.kvn_model_forward(self._handle, byref(view), logits.data_ptr()))
        del groups
        return logits

    def __del__(self) -> None:
        if self._handle is not None:
            self._library.kvn_model_free(self._handle)
            self._handle = None

    def _start(self, model: torch.nn.Module, memory: KvMemory, num_threads: int) -> None:
        config: Any = model.config
        reason = self.supports(config)
        if reason is not None:
            raise NativeUnavailable(reason)
        if num_threads < 1:
            raise ValueError("num_threads must be at least 1")
        body: Any = model.model
        attention = body.layers[0].self_attn
        weight = body.embed_tokens.weight
        layout = memory.layout
        if (layout.num_layers, layout.num_kv_heads, layout.head_dim) != (
            config.num_hidden_layers,
            config.num_key_value_heads,
            attention.head_dim,
        ):
            raise ValueError("the KV memory's layout is not this model's")
        self._library = load()
        self._memory = memory
        self._vocab = int(weight.shape[0])
        self._tied = model.lm_head.weight.data_ptr() == weight.data_ptr()  # type: ignore[operator, union-attr]
        native = ModelConfig(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            vocab=self._vocab,
            norm_eps=config.rms_norm_eps,
            rope_scaling=float(body.rotary_emb.attention_scaling),
            attention_scaling=float(attention.scaling),
            weight_dtype=dtype_code(weight.dtype),
            tied=int(self._tied),
            num_threads=num_threads,
        )
        handle = self._library.kvn_model_new(byref(native))
        if handle is None:
            raise NativeUnavailable("there is not enough memory (or threads) for the packed model")
        self._handle = c_void_p(handle)
        self._dtype = weight.dtype

    def _pack(self, model: torch.nn.Module, done_with: Any) -> None:
        config: Any = model.config
        body: Any = model.model
        head: Any = model.lm_head
        with torch.no_grad():
            self._set_vector(0, Vector.FINAL_NORM, body.norm.weight)
            self._set_vector(0, Vector.INV_FREQ, body.rotary_emb.inv_freq)
            for index, layer in enumerate(body.layers):
                self._pack_layer(index, layer, done_with)
                view = kv_view(self._memory, index)
                window = _window(config, index)
                check(
                    self._library.kvn_model_set_kv(
                        self._handle, index, byref(view), self._memory.num_blocks, window or 0
                    )
                )
            self._pack_matrix(0, Matrix.HEAD, head.weight)
            self._embedding: torch.Tensor | None = None
            if not self._tied:
                self._embedding = body.embed_tokens.weight.detach().contiguous()
                self._library.kvn_model_set_embedding(self._handle, self._embedding.data_ptr())
            done_with(head)
            done_with(body.embed_tokens)

    def _pack_layer(self, index: int, layer: Any, done_with: Any) -> None:
        self._set_vector(index, Vector.INPUT_NORM, layer.input_layernorm.weight)
        self._set_vector(index, Vector.POST_NORM, layer.post_attention_layernorm.weight)
        biases: dict[Matrix, torch.Tensor | None] = {}
        for matrix, part, name in _PROJECTIONS:
            linear = getattr(getattr(layer, part), name)
            self._pack_matrix(index, matrix, linear.weight)
            biases[matrix] = linear.bias
            done_with(linear)
        for vector, matrices in (
            (Vector.QKV_BIAS, (Matrix.Q, Matrix.K, Matrix.V)),
            (Vector.O_BIAS, (Matrix.O,)),
            (Vector.GATE_UP_BIAS, (Matrix.GATE, Matrix.UP)),
            (Vector.DOWN_BIAS, (Matrix.DOWN,)),
        ):
            present = [bias for m in matrices if (bias := biases[m]) is not None]
            if present:
                self._set_vector(index, vector, torch.cat(present))
        for vector, name in ((Vector.Q_NORM, "q_norm"), (Vector.K_NORM, "k_norm")):
            norm = getattr(layer.self_attn, name, None)
            if norm is not None:
                self._set_vector(index, vector, norm.weight)

    def _pack_matrix(self, layer: int, matrix: Matrix, weight: torch.Tensor) -> None:
        if weight.dtype is not self._dtype:
            raise NativeUnavailable("the native executor needs weights of one type")
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        rows, cols = weight.shape
        check(
            self._library.kvn_model_pack(
                self._handle, layer, matrix, weight.data_ptr(), rows, cols, weight.stride(0)
            )
        )

    def _set_vector(self, layer: int, vector: Vector, values: torch.Tensor) -> None:
        values = values.detach().to(torch.float32).contiguous()
        check(
            self._library.kvn_model_set_vector(self._handle, layer, vector, values.data_ptr(), values.numel())
        )


def _keep(module: Any) -> None:
    """Leave the source weight where it is."""


def _release(module: Any) -> None:
    """Drop the source weight; tied modules share it until both are released."""
    module.weight.data = torch.empty(0, dtype=module.weight.dtype)


def _window(config: Any, layer: int) -> int | None:
    """Return the sliding window of one layer, or None."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return window if kinds[layer] == "sliding_attention" else None
    return window if config.model_type == "mistral" else None
