"""Where the parts of a BERT-like model lie in each family of transformers.

One shape covers them all: embeddings and their norm, (a projection,) then layers of attention, norm, two
dense layers and norm; a norm follows what it norms. What deviates from that is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import nn

__all__ = ["Activation", "EncoderParts", "LayerParts", "UnsupportedEncoderError", "read_parts"]

_MAX_HEAD_DIM = 256


class UnsupportedEncoderError(ValueError):
    """Say what about a model the native encoder does not know; another executor can serve it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Activation(IntEnum):
    """``kv::Activation``."""

    GELU = 0
    GELU_TANH = 1
    RELU = 2
    SILU = 3


_ACTIVATIONS = {
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_python_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer's modules."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    attention_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    output_norm: nn.LayerNorm

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.out, self.up, self.down


@dataclass(frozen=True, slots=True)
class EncoderParts:
    """A whole encoder's modules, without its pooler and head."""

    words: nn.Embedding
    positions: nn.Embedding
    types: nn.Embedding | None
    embedding_norm: nn.LayerNorm
    projection: nn.Linear | None
    """From the embeddings' width to the layers', where these differ."""
    layers: tuple[LayerParts, ...]
    num_heads: int
    activation: Activation
    distance_bias: torch.Tensor | None = None
    """``[heads, 2 n - 1]``: added to the scores of key minus query = ``-(n - 1)`` to ``n - 1``."""

    @property
    def hidden(self) -> int:
        return int(self.layers[0].query.in_features)

    @property
    def intermediate(self) -> int:
        return int(self.layers[0].up.out_features)

    @property
    def norm_eps(self) -> float:
        return float(self.embedding_norm.eps)

    @property
    def tables(self) -> tuple[nn.Embedding, ...]:
        return tuple(t for t in (self.words, self.positions, self.types) if t is not None)


def read_parts(model: nn.Module) -> EncoderParts:
    """Find the parts of a model, with or without a head. Raises :class:`UnsupportedEncoderError`."""
    body: Any = getattr(model, "base_model", model)
    config: Any = body.config
    reader = _READERS.get(getattr(config, "model_type", ""))
    if reader is None:
        raise UnsupportedEncoderError(f"model family {getattr(config, 'model_type', None)}")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedEncoderError("a decoder")
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        raise UnsupportedEncoderError("relative position embeddings")
    try:
        parts = reader(body, config)
    except AttributeError as error:
        raise UnsupportedEncoderError(f"modules of another shape ({error.name})") from error
    _check(parts)
    return parts


def _bert(body: Any, config: Any) -> EncoderParts:
    return EncoderParts(
        words=body.embeddings.word_embeddings,
        positions=body.embeddings.position_embeddings,
        types=body.embeddings.token_type_embeddings,
        embedding_norm=body.embeddings.LayerNorm,
        projection=getattr(body, "embeddings_project", None),  # ELECTRA
        layers=tuple(
            LayerParts(
                query=layer.attention.self.query,
                key=layer.attention.self.key,
                value=layer.attention.self.value,
                out=layer.attention.output.dense,
                attention_norm=layer.attention.output.LayerNorm,
                up=layer.intermediate.dense,
                down=layer.output.dense,
                output_norm=layer.output.LayerNorm,
            )
            for layer in body.encoder.layer
        ),
        num_heads=config.num_attention_heads,
        activation=_activation(config.hidden_act),
    )


def _distilbert(body: Any, config: Any) -> EncoderParts:
    return EncoderParts(
        words=body.embeddings.word_embeddings,
        positions=body.embeddings.position_embeddings,
        types=None,
        embedding_norm=body.embeddings.LayerNorm,
        projection=None,
        layers=tuple(
            LayerParts(
                query=layer.attention.q_lin,
                key=layer.attention.k_lin,
                value=layer.attention.v_lin,
                out=layer.attention.out_lin,
                attention_norm=layer.sa_layer_norm,
                up=layer.ffn.lin1,
                down=layer.ffn.lin2,
                output_norm=layer.output_layer_norm,
            )
            for layer in body.transformer.layer
        ),
        num_heads=config.n_heads,
        activation=_activation(config.activation),
    )


def _mpnet(body: Any, config: Any) -> EncoderParts:
    longest = body.embeddings.position_embeddings.num_embeddings
    distances = torch.arange(-(longest - 1), longest)
    buckets = body.encoder.relative_position_bucket(distances)
    return EncoderParts(
        words=body.embeddings.word_embeddings,
        positions=body.embeddings.position_embeddings,
        types=None,
        embedding_norm=body.embeddings.LayerNorm,
        projection=None,
        layers=tuple(
            LayerParts(
                query=layer.attention.attn.q,
                key=layer.attention.attn.k,
                value=layer.attention.attn.v,
                out=layer.attention.attn.o,
                attention_norm=layer.attention.LayerNorm,
                up=layer.intermediate.dense,
                down=layer.output.dense,
                output_norm=layer.output.LayerNorm,
            )
            for layer in body.encoder.layer
        ),
        num_heads=config.num_attention_heads,
        activation=_activation(config.hidden_act),
        distance_bias=body.encoder.relative_attention_bias.weight.detach()[buckets].T.contiguous(),
    )


_READERS: dict[str, Callable[[Any, Any], EncoderParts]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "camembert": _bert,
    "electra": _bert,
    "distilbert": _distilbert,
    "mpnet": _mpnet,
}


def _activation(name: object) -> Activation:
    known = _ACTIVATIONS.get(name) if isinstance(name, str) else None
    if known is None:
        raise UnsupportedEncoderError(f"activation {name}")
    return known


def _check(parts: EncoderParts) -> None:
    """Refuse what the native encoder would compute wrongly."""
    if not parts.layers:
        raise UnsupportedEncoderError("no layers")
    for module, kind in _modules(parts):
        # A subclass computes something else (quantised, adapted).
        if type(module) is not kind:
            raise UnsupportedEncoderError(f"a {type(module).__name__} where {kind.__name__} belongs")
        weight: Any = module.weight
        if weight is None or weight.device.type != "cpu" or not weight.dtype.is_floating_point:
            raise UnsupportedEncoderError("weights that are not floating point numbers on the CPU")
    hidden, inner, width = parts.hidden, parts.intermediate, parts.words.embedding_dim
    if hidden % parts.num_heads or hidden // parts.num_heads > _MAX_HEAD_DIM:
        raise UnsupportedEncoderError(f"{parts.num_heads} heads over a width of {hidden}")
    if (width == hidden) != (parts.projection is None):
        raise UnsupportedEncoderError("embeddings of another width than the layers, or a projection of one")
    norms = [parts.embedding_norm]
    for layer in parts.layers:
        shapes = [tuple(linear.weight.shape) for linear in layer.linears]
        if shapes != [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]:
            raise UnsupportedEncoderError("layers of different shapes")
        norms += [layer.attention_norm, layer.output_norm]
    if any(norm.eps != parts.norm_eps for norm in norms):
        raise UnsupportedEncoderError("norms of different epsilon")


def _modules(parts: EncoderParts) -> Iterator[tuple[Any, type[nn.Module]]]:
    yield from ((table, nn.Embedding) for table in parts.tables)
    yield parts.embedding_norm, nn.LayerNorm
    if parts.projection is not None:
        yield parts.projection, nn.Linear
    for layer in parts.layers:
        yield from ((linear, nn.Linear) for linear in layer.linears)
        yield layer.attention_norm, nn.LayerNorm
        yield layer.output_norm, nn.LayerNorm
