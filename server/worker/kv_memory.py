"""Paged KV memory: one tensor, block first.

Layout (one block is one contiguous object for every tier)::

    storage  [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]
                  |            |      |       |
                  |            |      |       slot: one token position
                  |            |      0 = key, 1 = value
                  |            layer: a strided view per layer, made once
                  block: allocated, shared and evicted as a whole (by the engine, by number)

Keys are stored after rotary embedding. Memory is zeroed once, so that a slot never holds a NaN that a
masked read could spread.
"""

from __future__ import annotations

import ctypes
import mmap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.engine.plan import BlockCopy

__all__ = ["KvLayout", "KvMemory"]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape and type of one block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Return the size of one block over all layers, keys and values."""
        element_bytes = torch.empty(0, dtype=self.dtype).element_size()
        return self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim * element_bytes


class KvMemory:
    """Own the storage of every KV block of one model."""

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.storage = torch.empty(
            (num_blocks, layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim),
            dtype=layout.dtype,
            device=device,
        )
        if device.type == "cpu":
            _advise_huge_pages(self.storage.data_ptr(), self.storage.nbytes)  # before the first touch
        self.storage.zero_()
        self._bytes = self.storage.view(num_blocks, -1).view(torch.uint8)
        self._keys = [self.storage[:, layer, 0] for layer in range(layout.num_layers)]
        self._values = [self.storage[:, layer, 1] for layer in range(layout.num_layers)]

    def keys(self, layer: int) -> torch.Tensor:
        """Return the key view ``[num_blocks, block_size, num_kv_heads, head_dim]`` of a layer (strided)."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """Return the value view ``[num_blocks, block_size, num_kv_heads, head_dim]`` of a layer (strided)."""
        return self._values[layer]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store ``keys`` and ``values`` ``[T, num_kv_heads, head_dim]`` at physical ``slots`` ``[T]``."""
        size = self.layout.block_size
        blocks, offsets = slots // size, slots % size
        self._keys[layer][blocks, offsets] = keys.to(self.layout.dtype)
        self._values[layer][blocks, offsets] = values.to(self.layout.dtype)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy the leading slots of whole blocks, all layers, in order; zero the target's other slots."""
        for c in copies:
            self.storage[c.target, :, :, : c.num_slots] = self.storage[c.source, :, :, : c.num_slots]
            self.storage[c.target, :, :, c.num_slots :] = 0

    def save(self, block: int) -> bytes:
        """Return a copy of one block's bytes, in the layout's order."""
        return bytes(self._bytes[block].cpu().numpy())

    def load(self, block: int, payload: bytes | bytearray | memoryview) -> None:
        """Overwrite one block with what ``save`` gave. Raises ``ValueError`` for another size."""
        target = self._bytes[block]
        if len(payload) != target.shape[0]:
            raise ValueError(f"a block has {target.shape[0]} bytes, not {len(payload)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # read-only memory: it is only read
            target.copy_(torch.frombuffer(payload, dtype=torch.uint8))

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero whole blocks: a block begun anew must not keep another request's NaN behind its last token."""
        for block in blocks:
            self.storage[block] = 0


def _advise_huge_pages(address: int, num_bytes: int) -> None:
    """Ask Linux for huge pages behind memory that is read block by block from everywhere. Best effort."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    page = 1 << 21
    start, stop = -(-address // page) * page, (address + num_bytes) // page * page
    if advice is None or start >= stop:
        return
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(advice))
