"""The native encoder: a BERT-like model's whole forward pass over packed sequences in one call, on the CPU.

::

    lengths     [3, 1, 2]                 no padding: tokens of all sequences side by side
    token_ids   [a a a b c c]      --->   last hidden states [6, hidden], float32

Weights are float32 or bfloat16 (rounded from the source where it is wider); activations, biases and norms
are float32. A token's result is the same bits whatever else is in the batch and whatever the number of
threads. Kernels: ``server/worker/native/encoder.h``.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from server.worker.native.build import NativeUnavailable
from server.worker.native.library import check, dtype_code, load
from server.worker.predict.native_parts import EncoderParts, UnsupportedEncoderError, read_parts

__all__ = ["NativeEncoder", "NativeWorkspace", "PartSeconds", "build_native_encoder"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# kv::EncoderMatrix and kv::EncoderVector
_QKV, _OUT, _UP, _DOWN, _PROJECT = range(5)
_ATTENTION_GAMMA, _ATTENTION_BETA, _OUTPUT_GAMMA, _OUTPUT_BETA, _EMBED_GAMMA, _EMBED_BETA = range(5, 11)


class _Config(ctypes.Structure):
    """``kv::EncoderConfig``."""

    _fields_ = [
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("heads", c_int64),
        ("embedding", c_int64),
        ("vocab", c_int64),
        ("positions", c_int64),
        ("types", c_int64),
        ("norm_eps", c_float),
        ("attention_scaling", c_float),
        ("weight_dtype", c_int32),
        ("activation", c_int32),
    ]


class _Batch(ctypes.Structure):
    """``kv::EncoderBatch``."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("num_sequences", c_int64),
        ("token_ids", c_void_p),
        ("position_ids", c_void_p),
        ("type_ids", c_void_p),
        ("lengths", c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = load()

    def declare(name: str, result: object, *arguments: object) -> None:
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments

    declare("kvn_workspace_new", c_void_p, c_int)
    declare("kvn_workspace_free", None, c_void_p)
    declare("kvn_workspace_bytes", c_int64, c_void_p)
    declare("kvn_workspace_seconds", None, c_void_p, POINTER(c_double))
    declare("kvn_encoder_new", c_void_p, POINTER(_Config))
    declare("kvn_encoder_free", None, c_void_p, c_void_p)
    declare("kvn_encoder_bytes", c_int64, c_void_p)
    pack_arguments = (c_void_p, c_void_p, c_int, c_int, c_void_p, c_int64, c_int64, c_int64)
    declare("kvn_encoder_pack", c_char_p, *pack_arguments)
    declare("kvn_encoder_set_vector", c_char_p, c_void_p, c_int, c_int, c_void_p, c_int64)
    declare("kvn_encoder_set_tables", None, c_void_p, c_void_p, c_void_p, c_void_p)
    declare("kvn_encoder_set_distance_bias", None, c_void_p, c_void_p, c_int64)
    declare("kvn_encoder_forward", c_char_p, c_void_p, c_void_p, POINTER(_Batch), c_void_p)
    declare("kvn_encoder_time_products", c_double, c_void_p, c_void_p, c_int64)
    return library


@dataclass(frozen=True, slots=True)
class PartSeconds:
    """Where the last call's time went, summed over the threads. What is missing, threads waited."""

    products: float
    attention: float
    elementwise: float
    """Norms and activations."""
    embedding: float


class NativeWorkspace:
    """Threads and activation buffers. Encoders share one: they compute one after another.

    Buffers grow with the largest batch (about ``16 * hidden`` bytes per token) and stay until the workspace
    goes, with the last encoder that holds it.
    """

    handle: c_void_p | None = None

    def __init__(self, num_threads: int) -> None:
        """Start ``num_threads - 1`` threads; who calls ``forward`` is the last one."""
        if num_threads < 1:
            raise ValueError("num_threads must be at least 1")
        self._library = _library()
        handle = self._library.kvn_workspace_new(num_threads)
        if handle is None:
            raise NativeUnavailable("the kernels' threads cannot be started")
        self.handle = c_void_p(handle)
        self.num_threads = num_threads

    def __del__(self) -> None:
        if self.handle is not None:
            self._library.kvn_workspace_free(self.handle)
            self.handle = None

    @property
    def num_bytes(self) -> int:
        """Bytes of activation buffers now."""
        return int(self._library.kvn_workspace_bytes(self.handle))

    def last_seconds(self) -> PartSeconds:
        """Return where the time of the last call went."""
        parts = (c_double * 4)()
        self._library.kvn_workspace_seconds(self.handle, parts)
        return PartSeconds(*parts)


_shared: WeakValueDictionary[int, NativeWorkspace] = WeakValueDictionary()
_shared_lock = Lock()


def _shared_workspace(num_threads: int) -> NativeWorkspace:
    with _shared_lock:
        workspace = _shared.get(num_threads)
        if workspace is None:
            workspace = _shared[num_threads] = NativeWorkspace(num_threads)
        return workspace


def build_native_encoder(
    model: nn.Module,
    *,
    dtype: str,
    num_threads: int | None = None,
    workspace: NativeWorkspace | None = None,
    release_source: bool = False,
) -> NativeEncoder | None:
    """Pack the encoder of a transformers model (its head, if any, is left alone). None: not a known shape.

    ``dtype``: "float32" or "bfloat16", of the packed matrices and the embedding tables. Tables of that type
    already are shared with ``model``, not copied. With ``release_source`` every matrix of ``model`` is
    emptied as soon as it is packed, and its tables are replaced by the encoder's: memory peaks at one copy
    and one layer, and ``model``'s own encoder must not be called any more.

    ``workspace``: as a rule one for all encoders of ``num_threads`` threads (default: torch's number) in
    this process. Blocks while compiling (first use on a machine) and packing. Raises ``NativeUnavailable``
    where there is no compiler or not enough memory.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    try:
        parts = read_parts(model)
    except UnsupportedEncoderError:
        return None
    if workspace is None:
        workspace = _shared_workspace(num_threads if num_threads is not None else torch.get_num_threads())
    return NativeEncoder(parts, _DTYPES[dtype], workspace, release_source=release_source)


class NativeEncoder:
    """A packed encoder. Calls are thread-safe and run one after another; they release the GIL."""

    _handle: c_void_p | None = None
    _tables: tuple[torch.Tensor, ...] = ()

    def __init__(
        self,
        parts: EncoderParts,
        dtype: torch.dtype,
        workspace: NativeWorkspace,
        *,
        release_source: bool,
    ) -> None:
        """Pack. See :func:`build_native_encoder`."""
        self._library = _library()
        self.workspace = workspace
        self.dtype = dtype
        self.hidden = parts.hidden
        self._has_types = parts.types is not None
        config = _Config(
            num_layers=len(parts.layers),
            hidden=parts.hidden,
            intermediate=parts.intermediate,
            heads=parts.num_heads,
            embedding=parts.words.embedding_dim,
            vocab=parts.words.num_embeddings,
            positions=parts.positions.num_embeddings,
            types=parts.types.num_embeddings if parts.types is not None else 0,
            norm_eps=parts.norm_eps,
            attention_scaling=(parts.hidden // parts.num_heads) ** -0.5,
            weight_dtype=dtype_code(dtype),
            activation=int(parts.activation),
        )
        handle = self._library.kvn_encoder_new(byref(config))
        if handle is None:
            raise NativeUnavailable("there is not enough memory for the packed model")
        self._handle = c_void_p(handle)
        with torch.no_grad():
            self._pack(parts, release_source=release_source)
        if release_source:
            self._hand_tables_to(parts)
        packed = int(self._library.kvn_encoder_bytes(self._handle))
        self.num_bytes = packed + sum(table.nbytes for table in self._tables)
        """Bytes of packed matrices and embedding tables; the workspace's buffers are its own."""

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"NativeEncoder({self.hidden} wide, {dtype}, {self.num_bytes >> 20} MiB)"

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights. Waits for a call under way; none may follow."""
        if self._handle is not None:
            # Of a cycle that is collected the workspace may go first: it has no handle then, nor threads.
            self._library.kvn_encoder_free(self._handle, self.workspace.handle)
            self._handle = None
            self._tables = ()

    def forward(
        self,
        token_ids: NDArray[np.int32],
        position_ids: NDArray[np.int32],
        type_ids: NDArray[np.int32],
        lengths: NDArray[np.int32],
    ) -> torch.Tensor:
        """Return last hidden states, float32 ``[T, hidden]``, the caller's own.

        Ids are int32 ``[T]``, sequence after sequence; ``lengths``: int32
        ``[B]``, each at least 1. Positions are rows of the position table (RoBERTa and MPNet start at
        ``pad_token_id + 1``). Types are ignored by models that have none. Raises ``ValueError`` for what is
        out of range, before anything is computed.
        """
        if self._handle is None:
            raise ValueError("the encoder is closed")
        for name, ids in (
            ("token", token_ids),
            ("position", position_ids),
            ("type", type_ids),
            ("", lengths),
        ):
            if ids.dtype != np.int32 or ids.ndim != 1 or not ids.flags.c_contiguous:
                raise ValueError(f"{name + '_ids' if name else 'lengths'} must be contiguous int32 [n]")
        if not len(token_ids) == len(position_ids) == len(type_ids):
            raise ValueError("token, position and type ids of different lengths")
        batch = _Batch(
            len(token_ids),
            len(lengths),
            token_ids.ctypes.data,
            position_ids.ctypes.data,
            type_ids.ctypes.data,
            lengths.ctypes.data,
        )
        out = torch.empty(len(token_ids), self.hidden, dtype=torch.float32)
        check(
            self._library.kvn_encoder_forward(
                self._handle, self.workspace.handle, byref(batch), out.data_ptr()
            )
        )
        return out

    def release_source(self, model: nn.Module) -> None:
        """Empty the matrices of the model this encoder was built from, and give it the encoder's tables.

        What ``build_native_encoder(release_source=True)`` does at once, for callers who compare first.
        """
        parts = read_parts(model)
        for layer in parts.layers:
            _release(layer.linears)
        if parts.projection is not None:
            _release((parts.projection,))
        self._hand_tables_to(parts)

    def _hand_tables_to(self, parts: EncoderParts) -> None:
        for module, table in zip(parts.tables, self._tables, strict=True):
            module.weight.data = table

    def time_products(self, num_tokens: int) -> float:
        """Return the seconds that the layers' bare matrix products take for so many tokens."""
        return float(self._library.kvn_encoder_time_products(self._handle, self.workspace.handle, num_tokens))

    def _pack(self, parts: EncoderParts, *, release_source: bool) -> None:
        for index, layer in enumerate(parts.layers):
            self._pack_matrix(index, _QKV, layer.query, layer.key, layer.value)
            self._pack_matrix(index, _OUT, layer.out)
            self._pack_matrix(index, _UP, layer.up)
            self._pack_matrix(index, _DOWN, layer.down)
            self._set_norm(index, _ATTENTION_GAMMA, layer.attention_norm)
            self._set_norm(index, _OUTPUT_GAMMA, layer.output_norm)
            if release_source:
                _release(layer.linears)
        if parts.projection is not None:
            self._pack_matrix(0, _PROJECT, parts.projection)
            if release_source:
                _release((parts.projection,))
        self._set_norm(0, _EMBED_GAMMA, parts.embedding_norm)
        self._tables = tuple(t.weight.detach().to(self.dtype).contiguous() for t in parts.tables)
        pointers: list[int | None] = [table.data_ptr() for table in self._tables]
        pointers += [None] * (3 - len(pointers))
        self._library.kvn_encoder_set_tables(self._handle, *pointers)
        if parts.distance_bias is not None:
            bias = parts.distance_bias.to(torch.float32).contiguous()
            longest = (bias.shape[1] + 1) // 2
            self._library.kvn_encoder_set_distance_bias(self._handle, bias.data_ptr(), longest)

    def _pack_matrix(self, layer: int, matrix: int, *linears: nn.Linear) -> None:
        """Pack one matrix, or several on top of each other, and the bias."""
        weight = torch.cat([linear.weight.detach().to(self.dtype) for linear in linears])
        rows, cols = weight.shape
        space = self.workspace.handle
        check(
            self._library.kvn_encoder_pack(
                self._handle, space, layer, matrix, weight.data_ptr(), rows, cols, weight.stride(0)
            )
        )
        biases = [_bias(linear) for linear in linears]
        self._set_vector(layer, matrix, torch.cat(biases))

    def _set_norm(self, layer: int, gamma: int, norm: nn.LayerNorm) -> None:
        bias: torch.Tensor | None = norm.bias
        self._set_vector(layer, gamma, norm.weight)
        self._set_vector(layer, gamma + 1, bias if bias is not None else torch.zeros_like(norm.weight))

    def _set_vector(self, layer: int, which: int, values: Any) -> None:
        values = values.detach().to(torch.float32).contiguous()
        check(
            self._library.kvn_encoder_set_vector(
                self._handle, layer, which, values.data_ptr(), values.numel()
            )
        )


def _bias(linear: nn.Linear) -> torch.Tensor:
    bias: torch.Tensor | None = linear.bias
    return torch.zeros(linear.out_features) if bias is None else bias.detach().to(torch.float32)


def _release(linears: tuple[nn.Linear, ...]) -> None:
    for linear in linears:
        linear.weight.data = torch.empty(0, dtype=linear.weight.dtype)
