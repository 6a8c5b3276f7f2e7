"""Attention over a part of the keys, and the merge of such parts by log-sum-exp.

Attention over disjoint key sets A and B is exactly recovered from the two partial results::

    lse = logaddexp(lse_A, lse_B)          out = out_A * exp(lse_A - lse) + out_B * exp(lse_B - lse)

(the merge step of online softmax: Milakov and Gimelshein 2018; Dao et al. 2022). A part that sees no
key at all has ``lse`` -inf and ``out`` 0.
"""

from __future__ import annotations

import torch

__all__ = ["PartialAttention", "apply_sinks", "attend_dense"]

_TILE_SCORES = 1 << 21
"""At most this many scores are held at once in the tiled path (8 MiB in float32)."""


class PartialAttention:
    """The running result for all queries of a batch: float32 ``out [T, H, D]`` and ``lse [T, H]``."""

    def __init__(self, num_tokens: int, num_heads: int, head_dim: int, device: torch.device) -> None:
        self.out = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.float32, device=device)
        self.lse = torch.full((num_tokens, num_heads), float("-inf"), dtype=torch.float32, device=device)

    def merge(self, rows: slice | torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Add a part seen by ``rows`` (unique): ``out [n, H, D]`` and ``lse [n, H]``, any float type."""
        old_lse = self.lse[rows]
        new_lse = torch.logaddexp(old_lse, lse.float())
        safe_lse = torch.where(torch.isneginf(new_lse), torch.zeros_like(new_lse), new_lse)
        old_weight = torch.exp(old_lse - safe_lse)[..., None]
        weight = torch.exp(lse.float() - safe_lse)[..., None]
        self.out[rows] = self.out[rows] * old_weight + out.float() * weight
        self.lse[rows] = new_lse


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Let a logit per head join the denominators of finished attention ``out [T, H, D]``, ``lse [T, H]``."""
    return out * torch.sigmoid(lse - sinks.float())[..., None]


def attend_dense(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    may_see_nothing: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend ``query [B, H, M, D]`` to ``keys`` and ``values [B, H, L, D]``.

    ``mask`` is bool, True where visible, ``[.., L]``, broadcastable to ``[B, H, M, L]``. Returns float32
    ``out [B, H, M, D]`` and ``lse [B, H, M]``. With ``may_see_nothing`` a row may be masked throughout.
    On CPU the fused kernel does the work where it can; else the scores are tiled over L.
    """
    if query.device.type == "cpu" and softcap is None and not may_see_nothing:
        additive = None
        if mask is not None:
            additive = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
            additive = additive.expand(query.shape[0], query.shape[1], query.shape[2], keys.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=additive, scale=scaling
        )
        return out.float(), lse
    return _attend_tiled(query, keys, values, scaling, mask, softcap)


def _attend_tiled(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, num_queries, head_dim = query.shape
    length = keys.shape[2]
    tile = max(64, _TILE_SCORES // max(1, batch * heads * num_queries))
    scaled = query.float() * scaling
    running_max = torch.full((batch, heads, num_queries, 1), float("-inf"), device=query.device)
    denominator = torch.zeros_like(running_max)
    out = torch.zeros(batch, heads, num_queries, head_dim, device=query.device)
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        scores = scaled @ keys[:, :, start:stop].float().transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., start:stop], float("-inf"))
        new_max = torch.maximum(running_max, scores.amax(-1, keepdim=True))
        safe_max = torch.where(torch.isneginf(new_max), torch.zeros_like(new_max), new_max)
        weights = torch.exp(scores - safe_max)
        correction = torch.exp(running_max - safe_max)
        denominator = denominator * correction + weights.sum(-1, keepdim=True)
        out = out * correction + weights @ values[:, :, start:stop].float()
        running_max = new_max
    sees_nothing = denominator == 0
    out = out / torch.where(sees_nothing, torch.ones_like(denominator), denominator)
    lse = torch.where(sees_nothing, running_max, torch.log(denominator) + running_max)
    return out, lse.squeeze(-1)
