"""Refuse at load what this server would compute wrongly.

Three steps, each cheap::

    check_config     what the configuration alone rules out; caps the length where only a part is right
    trace_attention  one forward over a few tokens: do all layers come to our attention, how shaped, and
                     what does the mask that the model asks for let a query see
    equivalence      two requests, packed, chunked, over shuffled and shared blocks, against the
                     model's own plain forward
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from server.worker.equivalence import ProbePiece, pack_pieces
from server.worker.errors import UnsupportedModel
from server.worker.hf_executor import ATTENTION_NAME, TRACE_NAME, AttentionCall, call_model
from server.worker.mask_reader import MaskReader

__all__ = ["AttentionShape", "check_cache_window", "check_config", "trace_attention"]

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What KV memory a model needs, found by running it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    """The widest of keys and values, of all layers."""
    vocab_size: int
    """Width of the logits."""
    windows: tuple[int | None, ...]
    """Per layer: how many positions a query sees, its own included. None: all."""
    needs_plain_math: bool
    """Whether a layer has a softcap or sinks, which not every kernel knows."""


def check_config(config: PreTrainedConfig) -> tuple[int | None, list[str]]:
    """Return a cap on the length (None: no cap) and notes. Raises ``UnsupportedModel``."""
    family = config.model_type
    types = set(getattr(config, "layer_types", None) or []) - _SERVED_LAYER_TYPES
    if types:
        raise UnsupportedModel(f"{family} has layers without plain attention ({', '.join(sorted(types))})")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(f"{family} attends to an encoder")
    if getattr(config, "alibi", False):
        raise UnsupportedModel(f"{family} adds position biases to its attention (alibi)")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModel(f"{family} attends in both directions")
    cap: int | None = None
    notes: list[str] = []
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk:
        cap = int(chunk)
        notes.append(f"length capped at {cap}: attention in chunks is not served beyond the first one")
    rope_limit = _rope_limit(config)
    if rope_limit is not None and (cap is None or rope_limit < cap):
        cap = rope_limit
        notes.append(
            f"length capped at {cap}: beyond, this rotary embedding depends on the longest request of a batch"
        )
    return cap, notes


def _rope_limit(config: PreTrainedConfig) -> int | None:
    """Return the length up to which the rotary embedding is the same whatever else is in the batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = []
    for rope in nested or [parameters]:
        kind = rope.get("rope_type")
        own = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if kind in ("dynamic", "longrope"):
            limits.append(own or config.max_position_embeddings)
    return min((int(limit) for limit in limits), default=None)


def check_cache_window(
    config: PreTrainedConfig, windows: Sequence[int | None]
) -> tuple[int | None, list[str]]:
    """Return a cap on the length where transformers' own cache forgets what its attention would see.

    Its cache keeps ``sliding_window`` positions of a layer if the configuration has that field, whether
    the model masks by it or not; up to there, ``generate`` and the plain forward agree.
    """
    cached = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(windows)
    for kind, window in zip(types, windows, strict=True):
        if cached and kind == "sliding_attention" and (window is None or window > cached):
            return int(cached), [f"length capped at {cached}: beyond, the model's window is not well defined"]
    return None, []


class _Tracer:
    """Record every attention call of one forward pass; answer with zeros."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return call.query.new_zeros(*call.query.shape[:2], call.values.shape[-1])


def trace_attention(model: PreTrainedModel) -> AttentionShape:
    """Set our attention on ``model`` and run a few tokens. Raises ``UnsupportedModel``."""
    config = model.config.get_text_config()
    family, num_layers = config.model_type, config.num_hidden_layers
    tracer, masks = _Tracer(), MaskReader()
    ids = np.arange(3) % config.vocab_size
    batch = pack_pieces([ProbePiece(ids, 0, [0])], block_size=16, device=model.device)
    AttentionMaskInterface.register(TRACE_NAME, masks.make)
    try:
        model.set_attn_implementation(TRACE_NAME)
        logits = call_model(model, tracer, batch)
        model.set_attn_implementation(ATTENTION_NAME)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{family}: {error.reason}") from None
    except Exception as error:
        logger.info("tracing %s failed", family, exc_info=error)
        raise UnsupportedModel(f"{family} can not run over packed input ({type(error).__name__})") from None
    if len(tracer.calls) != num_layers:
        raise UnsupportedModel(
            f"{family} brought {len(tracer.calls)} of {num_layers} layers to the paged attention; "
            "the others use attention of their own"
        )
    if masks.has_chunks and not getattr(config, "attention_chunk_size", None):
        raise UnsupportedModel(f"{family} has an attention mask that is neither full nor a window")
    for layer, call in enumerate(tracer.calls):
        _check_call(family, layer, call, masks)
    heads = {call.keys.shape[1] for call in tracer.calls}
    if len(heads) != 1:
        raise UnsupportedModel(f"{family} has layers with different numbers of KV heads")
    return AttentionShape(
        num_layers=num_layers,
        num_kv_heads=heads.pop(),
        head_dim=max(max(call.keys.shape[2], call.values.shape[2]) for call in tracer.calls),
        vocab_size=logits.shape[-1],
        windows=tuple(_window(config, layer, call, masks) for layer, call in enumerate(tracer.calls)),
        needs_plain_math=any(
            call.kwargs.get("softcap") is not None or call.kwargs.get("s_aux") is not None
            for call in tracer.calls
        ),
    )


def _window(config: PreTrainedConfig, layer: int, call: AttentionCall, masks: MaskReader) -> int | None:
    """Return a layer's window: by its mask if there is one, else the module's or the configuration's word."""
    if call.mask is not None:
        return masks.window(call.mask)
    window = call.kwargs.get("sliding_window")
    layer_types = getattr(config, "layer_types", None)
    if window is None and layer_types and layer_types[layer] == "sliding_attention":
        window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def _check_call(family: str, layer: int, call: AttentionCall, masks: MaskReader) -> None:
    if getattr(call.module, "layer_idx", layer) != layer:
        raise UnsupportedModel(f"{family} runs its layers in another order than it numbers them")
    if (call.mask is not None and not masks.knows(call.mask)) or call.kwargs.get("position_bias") is not None:
        raise UnsupportedModel(f"{family} adds a mask or bias of its own to its attention")
    causal = call.kwargs.get("is_causal")
    if causal is False or (causal is None and getattr(call.module, "is_causal", True) is False):
        raise UnsupportedModel(f"{family} attends in both directions")
    if call.keys.shape[0] != call.query.shape[0]:
        raise UnsupportedModel(f"{family} attends to keys of other positions than its queries'")
