"""Paged attention with native kernels, for executors that keep the rest of the model in torch."""

from __future__ import annotations

from ctypes import byref

import torch

from server.worker.batch import AttentionSpec, PackedBatch
from server.worker.kv_memory import KvMemory
from server.worker.native.library import (
    AttnParams,
    NativeTools,
    QueryView,
    batch_view,
    check,
    dtype_code,
    kv_view,
    load,
)

__all__ = ["NativeAttention"]

MAX_HEAD_DIM = 256


class NativeAttention:
    """Implement ``AttentionBackend`` on the CPU: float32 or bfloat16 queries, float32 inside.

    A row's result is the same bits alone or in any batch, grouped or not, however its prompt was chunked.
    """

    name = "native"

    def __init__(self, num_threads: int) -> None:
        """Start ``num_threads - 1`` threads. Raises ``NativeUnavailable`` where kernels cannot be built."""
        self._library = load()
        self._tools = NativeTools(num_threads)

    def attend(
        self, query: torch.Tensor, memory: KvMemory, batch: PackedBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        """Return ``[T, num_heads, head_dim]`` for ``query`` of the same shape and type."""
        layout = memory.layout
        num_tokens, num_heads, head_dim = query.shape
        if head_dim != layout.head_dim or head_dim % 8 or head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be the KV memory's, a multiple of 8 up to {MAX_HEAD_DIM}")
        if num_heads % layout.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        if num_tokens != batch.num_tokens:
            raise ValueError("query and batch differ in their number of tokens")
        if query.stride(2) != 1:
            query = query.contiguous()
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype)
        sinks = None
        if spec.sinks is not None:
            sinks = spec.sinks.detach().to(device="cpu", dtype=torch.float32).contiguous()
            if sinks.numel() != num_heads:
                raise ValueError("one sink per head is needed")
        view, groups = batch_view(batch)
        io = QueryView(
            query.data_ptr(),
            out.data_ptr(),
            query.stride(0),
            query.stride(1),
            out.stride(0),
            out.stride(1),
            dtype_code(query.dtype),
        )
        params = AttnParams(
            spec.scaling,
            spec.softcap or 0.0,
            spec.window or 0,
            sinks.data_ptr() if sinks is not None else None,
        )
        if num_tokens:
            check(
                self._library.kvn_attend(
                    self._tools.handle,
                    byref(view),
                    byref(io),
                    byref(kv_view(memory, spec.layer)),
                    memory.num_blocks,
                    num_heads,
                    layout.num_kv_heads,
                    head_dim,
                    byref(params),
                )
            )
        del groups
        return out
