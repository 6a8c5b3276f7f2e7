"""The kernels' C interface in Python: structs, signatures, and small typed wrappers.

The structs mirror ``attention.h`` and ``model.h`` field by field. Calls release the GIL. Pointers are
borrowed for the call unless a method says otherwise.
"""

from __future__ import annotations

import ctypes
from array import array
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cache

import torch

from server.worker.batch import PackedBatch
from server.worker.kv_memory import KvMemory
from server.worker.native.build import NativeUnavailable, build

__all__ = [
    "AttnParams",
    "BatchView",
    "KvView",
    "Matrix",
    "ModelConfig",
    "NativeTools",
    "QueryView",
    "Vector",
    "batch_view",
    "check",
    "dtype_code",
    "kv_view",
    "load",
]


class ModelConfig(ctypes.Structure):
    """``kv::ModelConfig``."""

    _fields_ = [
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("vocab", c_int64),
        ("norm_eps", c_float),
        ("rope_scaling", c_float),
        ("attention_scaling", c_float),
        ("weight_dtype", c_int32),
        ("tied", c_int32),
        ("num_threads", c_int32),
    ]


class KvView(ctypes.Structure):
    """``kv::KvView``: one layer's keys and values; strides in elements."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("block_stride", c_int64),
        ("slot_stride", c_int64),
        ("head_stride", c_int64),
        ("dtype", c_int32),
        ("block_size", c_int32),
    ]


class AttnParams(ctypes.Structure):
    """``kv::AttnParams``: 0 means no softcap and no window."""

    _fields_ = [("scaling", c_float), ("softcap", c_float), ("window", c_int64), ("sinks", c_void_p)]


class QueryView(ctypes.Structure):
    """``kv::QueryView``: queries and results, ``[T, heads, dim]``; strides in elements."""

    _fields_ = [
        ("query", c_void_p),
        ("out", c_void_p),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("dtype", c_int32),
    ]


class BatchView(ctypes.Structure):
    """``kv::BatchView``: a :class:`PackedBatch`; groups are rows of four int32."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("num_sequences", c_int64),
        ("num_logit_rows", c_int64),
        ("max_blocks", c_int64),
        ("num_groups", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("logit_rows", c_void_p),
        ("groups", c_void_p),
    ]


class Matrix(IntEnum):
    """``kv::Matrix``."""

    Q = 0
    K = 1
    V = 2
    O = 3  # noqa: E741
    GATE = 4
    UP = 5
    DOWN = 6
    HEAD = 7


class Vector(IntEnum):
    """What ``kvn_model_set_vector`` can set. Biases are float32, rows in the order of their matrix."""

    INPUT_NORM = 0
    POST_NORM = 1
    Q_NORM = 2
    K_NORM = 3
    QKV_BIAS = 4
    O_BIAS = 5
    GATE_UP_BIAS = 6
    DOWN_BIAS = 7
    FINAL_NORM = 8
    INV_FREQ = 9


@cache
def load() -> ctypes.CDLL:
    """Build if need be, load, and declare the signatures. Raises :class:`NativeUnavailable`."""
    try:
        library = ctypes.CDLL(str(build()))
    except OSError as error:
        raise NativeUnavailable("the compiled kernels do not load") from error

    def declare(name: str, result: object, *arguments: object) -> None:
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments

    declare("kvn_describe", c_char_p)
    declare("kvn_model_new", c_void_p, POINTER(ModelConfig))
    declare("kvn_model_free", None, c_void_p)
    declare("kvn_model_pack", c_char_p, c_void_p, c_int, c_int, c_void_p, c_int64, c_int64, c_int64)
    declare("kvn_model_set_vector", c_char_p, c_void_p, c_int, c_int, c_void_p, c_int64)
    declare("kvn_model_set_embedding", None, c_void_p, c_void_p)
    declare("kvn_model_set_kv", c_char_p, c_void_p, c_int, POINTER(KvView), c_int64, c_int64)
    declare("kvn_model_reserve", c_char_p, c_void_p, c_int64, c_int64)
    declare("kvn_model_forward", c_char_p, c_void_p, POINTER(BatchView), c_void_p)
    declare("kvn_tools_new", c_void_p, c_int)
    declare("kvn_tools_free", None, c_void_p)
    declare(
        "kvn_attend",
        c_char_p,
        c_void_p,
        POINTER(BatchView),
        POINTER(QueryView),
        POINTER(KvView),
        c_int64,
        c_int,
        c_int,
        c_int,
        POINTER(AttnParams),
    )
    declare("kvn_argmax", None, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)
    declare("kvn_time_read", c_double, c_void_p, c_void_p, c_int64)
    declare("kvn_time_multiply", c_double, c_void_p, c_int64)
    declare("kvn_vector_floats", c_int)
    return library


def check(error: bytes | None) -> None:
    """Raise ValueError for what the kernels refused."""
    if error is not None:
        raise ValueError(f"native kernels refuse {error.decode()}")


def dtype_code(dtype: torch.dtype) -> int:
    """Return ``kv::Dtype``."""
    if dtype is torch.float32:
        return 0
    if dtype is torch.bfloat16:
        return 1
    raise NativeUnavailable(f"native kernels take float32 and bfloat16, not {dtype}")


def kv_view(memory: KvMemory, layer: int) -> KvView:
    """Describe one layer of ``memory``, which must outlive the view."""
    keys, values = memory.keys(layer), memory.values(layer)
    if keys.device.type != "cpu" or keys.stride(3) != 1:
        raise NativeUnavailable("native kernels need KV memory on the CPU, head_dim innermost")
    return KvView(
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        dtype_code(memory.layout.dtype),
        memory.layout.block_size,
    )


def batch_view(batch: PackedBatch) -> tuple[BatchView, array[int]]:
    """Describe a batch. The second result backs the groups: keep it, and the batch, during the call."""
    for tensor, dtype in (
        (batch.token_ids, torch.int64),
        (batch.positions, torch.int64),
        (batch.slots, torch.int64),
        (batch.query_starts, torch.int32),
        (batch.context_lens, torch.int32),
        (batch.block_tables, torch.int32),
        (batch.logit_rows, torch.int64),
    ):
        if tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("a packed batch tensor of the wrong type, or not contiguous on the CPU")
    num_sequences, max_blocks = batch.block_tables.shape
    num_tokens = batch.token_ids.numel()
    if (
        batch.positions.numel() != num_tokens
        or batch.slots.numel() != num_tokens
        or batch.query_starts.numel() != num_sequences + 1
        or batch.context_lens.numel() != num_sequences
    ):
        raise ValueError("packed batch tensors of different lengths")
    groups = array("i", [n for g in batch.groups for n in (g.start, g.stop, g.first_block, g.last_block)])
    view = BatchView(
        num_tokens,
        num_sequences,
        batch.logit_rows.numel(),
        max_blocks,
        len(batch.groups),
        batch.token_ids.data_ptr(),
        batch.positions.data_ptr(),
        batch.slots.data_ptr(),
        batch.query_starts.data_ptr(),
        batch.context_lens.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.logit_rows.data_ptr(),
        groups.buffer_info()[0],
    )
    return view, groups


class NativeTools:
    """A thread pool of its own for what belongs to no model: sampling helpers and measured limits.

    Thread-safe: calls from several threads run one after another.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError("num_threads must be at least 1")
        self._library = load()
        handle = self._library.kvn_tools_new(num_threads)
        if handle is None:
            raise NativeUnavailable("the kernels' threads cannot be started")
        self.handle = c_void_p(handle)

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None:
            self._library.kvn_tools_free(handle)
            self.handle = c_void_p(None)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Return int64 ``[R]``: the first largest of each float32 row; -1 where a row holds a NaN."""
        ids = torch.empty(logits.shape[0], dtype=torch.int64)
        self._argmax(logits, ids.data_ptr(), None)
        return ids

    def argmax_and_logsumexp(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's first largest and its float32 log-sum-exp (-1 and NaN where it holds a NaN)."""
        ids = torch.empty(logits.shape[0], dtype=torch.int64)
        sums = torch.empty(logits.shape[0], dtype=torch.float32)
        self._argmax(logits, ids.data_ptr(), sums.data_ptr())
        return ids, sums

    def _argmax(self, logits: torch.Tensor, ids: int, sums: int | None) -> None:
        if logits.dtype is not torch.float32 or logits.dim() != 2 or logits.device.type != "cpu":
            raise ValueError("logits must be float32 [rows, vocab] on the CPU")
        if logits.shape[1] > 1 and logits.stride(1) != 1:
            raise ValueError("logits must be contiguous along the vocabulary")
        if logits.shape[0]:
            self._library.kvn_argmax(
                self.handle, logits.data_ptr(), *logits.shape, logits.stride(0), ids, sums
            )

    def measure_read_bandwidth(self, num_bytes: int = 1 << 29, repeats: int = 5) -> float:
        """Return bytes per second of reading a large buffer with all threads, the best of ``repeats``."""
        data = torch.ones(num_bytes // (1 << 20) << 18, dtype=torch.float32)
        size = data.numel() * 4
        times = [self._library.kvn_time_read(self.handle, data.data_ptr(), size) for _ in range(repeats)]
        return float(size / min(times))

    def measure_multiply_rate(self, repeats: int = 5) -> float:
        """Return float32 operations per second of multiply-adds in registers, the best of ``repeats``."""
        units = 64
        times = [self._library.kvn_time_multiply(self.handle, units) for _ in range(repeats)]
        return float(units * 1_200_000 * 2 * self._library.kvn_vector_floats() / min(times))

    def describe(self) -> str:
        """Return what the kernels were compiled for."""
        return str(self._library.kvn_describe().decode())
