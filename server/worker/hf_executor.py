"""Run a transformers model's own forward over a packed batch, with attention over paged KV.

The model is called once per step with batch size 1 and all sequences in one row. Its attention
modules reach :func:`_paged_attention` through ``AttentionInterface``; what that function needs (the
batch, the memory, which layer is next) is set around the forward in a context variable, since some
families drop keyword arguments on the way::

    model(input_ids [1, T], position_ids [1, T], use_cache=False, logits_to_keep=rows)
        layer 0: ... _paged_attention -> memory.write(0, ...), backend.attend(..., layer=0)
        layer 1: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from server.worker.batch import AttentionBackend, AttentionSpec, PackedBatch
from server.worker.kv_memory import KvMemory

__all__ = ["ATTENTION_NAME", "TRACE_NAME", "AttentionCall", "AttentionHook", "HfExecutor", "call_model"]

ATTENTION_NAME = "kvserve"
"""Our name in the attention registry. It is absent from the mask registry, so no mask is built."""
TRACE_NAME = "kvserve_trace"
"""The same attention under a second name, for which the gate registers a mask to look at."""


class AttentionHook(Protocol):
    """What stands behind the model's attention during one forward pass."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Return ``[T, num_heads, head_dim_v]``."""
        ...


class AttentionCall:
    """One attention module's call: tensors without the batch dimension, and what the module said."""

    __slots__ = ("keys", "kwargs", "mask", "module", "query", "scaling", "values")

    def __init__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        kwargs: dict[str, Any],
    ) -> None:
        self.module = module
        self.query = query
        """``[T, num_heads, head_dim]``."""
        self.keys = keys
        """``[T, num_kv_heads, head_dim]``."""
        self.values = values
        """``[T, num_kv_heads, head_dim_v]``."""
        self.mask = mask
        self.scaling = scaling
        self.kwargs = kwargs


_hook: ContextVar[AttentionHook | None] = ContextVar("kvserve_attention_hook", default=None)


def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for the model's attention; ``query`` ``[1, H, T, D]`` in, ``[1, T, H, Dv]`` out."""
    hook = _hook.get()
    if hook is None:
        raise RuntimeError("a model set up for paged attention was called outside its executor")
    call = AttentionCall(
        module,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attention_mask,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        kwargs,
    )
    return hook.attend(call).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
AttentionInterface.register(TRACE_NAME, _paged_attention)


def call_model(model: PreTrainedModel, hook: AttentionHook, batch: PackedBatch) -> torch.Tensor:
    """Run the model over ``batch`` with ``hook`` as its attention; return float32 logits ``[R, vocab]``."""
    accepted = inspect.signature(model.forward).parameters
    keeps_logits = "logits_to_keep" in accepted
    extra: dict[str, Any] = {"logits_to_keep": batch.logit_rows} if keeps_logits else {}
    token = _hook.set(hook)
    try:
        with torch.inference_mode():
            output = model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                **extra,
            )
    finally:
        _hook.reset(token)
    logits = output.logits[0]
    rows: torch.Tensor = logits if keeps_logits else logits[batch.logit_rows]
    return rows.float()


class HfExecutor:
    """The transformers forward: any family that passes the gate; the reference of the other executors.

    ``windows`` has each layer's window, as the gate found it. Not thread-safe (one step at a time). Does
    not own ``memory``.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        memory: KvMemory,
        backend: AttentionBackend,
        *,
        windows: Sequence[int | None],
    ) -> None:
        self._model = model
        self._memory = memory
        self._backend = backend
        self._windows = windows
        self._num_layers = memory.layout.num_layers
        self._batch: PackedBatch | None = None
        self._next_layer = 0

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Return float32 logits ``[R, vocab]``. Raises ``RuntimeError`` if a layer did not come to us."""
        self._batch, self._next_layer = batch, 0
        try:
            logits = call_model(self._model, self, batch)
        finally:
            self._batch = None
        if self._next_layer != self._num_layers:
            raise RuntimeError(f"{self._next_layer} of {self._num_layers} layers used the paged attention")
        return logits

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Write one layer's KV, then attend (called by the model, layer after layer)."""
        batch = self._batch
        assert batch is not None  # set by forward for as long as the model runs
        layer, self._next_layer = self._next_layer, self._next_layer + 1
        width = self._memory.layout.head_dim
        head_dim_v = call.values.shape[-1]
        # Zeros behind the key leave dot products as they are; zeros behind the value are cut off again.
        query, keys, values = (_widen(t, width) for t in (call.query, call.keys, call.values))
        self._memory.write(layer, batch.slots, keys, values)
        spec = AttentionSpec(
            layer=layer,
            scaling=call.scaling,
            window=self._windows[layer],
            softcap=call.kwargs.get("softcap"),
            sinks=call.kwargs.get("s_aux"),
        )
        return self._backend.attend(query, self._memory, batch, spec)[..., :head_dim_v]


def _widen(tensor: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - tensor.shape[-1]
    return tensor if missing == 0 else functional.pad(tensor, (0, missing))
