"""Choose the executor and the attention for a loaded model, and check the choice on the spot.

::

    device   executor "auto"                              attention of the transformers executor
    cpu      native where it knows the model and a        native where there is a compiler and the heads fit,
             compiler is there, else transformers         else torch
    cuda     transformers                                 varlen kernel where it can, else torch
    mps      transformers                                 torch

Whatever is chosen must pass the equivalence probe. What "auto" chose and why is in the notes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from server.engine.options import EngineOptions
from server.process.memory import available_host_bytes
from server.worker.attention.grouped import GroupedAttention
from server.worker.batch import AttentionBackend, Executor
from server.worker.equivalence import EquivalenceProbe
from server.worker.errors import UnsupportedModel, WorkerStartError
from server.worker.gate import AttentionShape
from server.worker.hf_executor import HfExecutor
from server.worker.kv_memory import KvMemory
from server.worker.loading import LoadedModel

__all__ = ["ChosenExecutor", "choose_executor"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChosenExecutor:
    """An executor that has passed the equivalence probe."""

    executor: Executor
    attention: str
    notes: list[str] = field(default_factory=list)


def choose_executor(
    options: EngineOptions,
    loaded: LoadedModel,
    shape: AttentionShape,
    memory: KvMemory,
    probe: EquivalenceProbe,
    num_threads: int,
) -> ChosenExecutor:
    """Return the executor that ``options`` name, checked by ``probe``; may empty the model's weights.

    Raises ``UnsupportedModel`` if none computes the model rightly, ``WorkerStartError`` if the native
    one was asked for by name and can not be had.
    """
    if options.executor not in ("auto", "native", "transformers"):
        raise WorkerStartError(f"{options.executor!r} is not one of auto, native, transformers")
    notes: list[str] = []
    if options.executor != "transformers":
        native = _make_native(options, loaded, memory, num_threads)
        if isinstance(native, str):
            if options.executor == "native" or _is_emptied(loaded):
                raise WorkerStartError(f"the native executor can not be used: {native}")
            notes.append(f"the transformers executor is used: {native}")
        else:
            try:
                probe.check(native.forward, memory)
            except UnsupportedModel as error:
                if options.executor == "native" or _is_emptied(loaded):
                    raise
                notes.append(f"the transformers executor is used: native failed its check ({error.reason})")
            else:
                # Its threads are its own; torch's would spin beside them, and only the sampler needs any.
                torch.set_num_threads(1)
                return ChosenExecutor(native, "native", notes)
    backend, attention_notes = _choose_attention(loaded, shape, memory, num_threads)
    notes += attention_notes
    executor = HfExecutor(loaded.model, memory, backend, windows=shape.windows)
    try:
        probe.check(executor.forward, memory)
    except UnsupportedModel as error:
        if isinstance(backend, GroupedAttention):
            raise
        notes.append(f"attention in torch calls: {backend.name} failed its check ({error.reason})")
        backend = GroupedAttention()
        executor = HfExecutor(loaded.model, memory, backend, windows=shape.windows)
        probe.check(executor.forward, memory)
    return ChosenExecutor(executor, backend.name, notes)


def _make_native(
    options: EngineOptions, loaded: LoadedModel, memory: KvMemory, num_threads: int
) -> Executor | str:
    """Return the native executor, or why there is none."""
    if loaded.device.type != "cpu":
        return f"the native one runs on the CPU, not on {loaded.device.type}"
    if loaded.dtype not in (torch.float32, torch.bfloat16):
        return f"the native one does not compute {loaded.dtype}"
    try:
        from server.worker.native.build import NativeUnavailable
        from server.worker.native.executor import NativeExecutor
    except ImportError as error:
        logger.info("importing the native executor failed", exc_info=error)
        return "its code can not be imported"
    reason = NativeExecutor.supports(loaded.config)
    if reason is not None:
        return str(reason)
    if loaded.model.config is not loaded.config:
        return "the model is the text part of a larger one"
    weight_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    # Packing beside the weights keeps a way back; where memory is short they are emptied as it goes.
    make = NativeExecutor if available_host_bytes() > weight_bytes * 5 // 4 else NativeExecutor.consume
    try:
        executor: Executor = make(
            loaded.model,
            memory,
            num_threads,
            max_batch_tokens=options.max_batch_tokens,
            max_logit_rows=options.max_running,
        )
    except NativeUnavailable as error:
        return error.reason
    except ValueError as error:
        logger.warning("the native executor does not take this model", exc_info=error)
        return "it does not take this model's weights"
    return executor


def _is_emptied(loaded: LoadedModel) -> bool:
    return any(parameter.numel() == 0 for parameter in loaded.model.parameters())


def _choose_attention(
    loaded: LoadedModel, shape: AttentionShape, memory: KvMemory, num_threads: int
) -> tuple[AttentionBackend, list[str]]:
    if loaded.device.type == "cuda":
        from server.worker.attention.cuda import VarlenAttention, VarlenUnavailable

        if shape.needs_plain_math:
            return GroupedAttention(), ["attention in torch calls: the model has a softcap or sinks"]
        try:
            return VarlenAttention(memory), []
        except VarlenUnavailable as error:
            return GroupedAttention(), [f"attention in torch calls: {error}"]
    if loaded.device.type != "cpu":
        return GroupedAttention(), []
    layout = memory.layout
    if layout.head_dim % 8 or layout.head_dim > 256:
        return GroupedAttention(), [f"attention in torch calls: heads of {layout.head_dim} do not fit native"]
    if layout.dtype not in (torch.float32, torch.bfloat16):
        return GroupedAttention(), [f"attention in torch calls: native does not know {layout.dtype}"]
    try:
        from server.worker.native.attention import NativeAttention
        from server.worker.native.build import NativeUnavailable
    except ImportError as error:
        logger.info("importing the native attention failed", exc_info=error)
        return GroupedAttention(), ["attention in torch calls: native code can not be imported"]
    try:
        return NativeAttention(num_threads), []
    except NativeUnavailable as error:
        return GroupedAttention(), [f"attention in torch calls: {error.reason}"]
