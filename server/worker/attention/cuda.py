"""Attention on CUDA through ``torch.nn.attention.varlen``, paged where it can; prefix groups apart.

Each part is one kernel call over all of its sequences, and parts are merged by log-sum-exp::

    level 0 groups   queries of every outermost group      keys: its blocks           no mask
    level 1 groups   queries of the groups inside them     keys: their own blocks     no mask
    rest             all queries, sequence by sequence     keys: from the end of the innermost group on;
                                                           causal, aligned to the end of the keys

A layer whose window is shorter than some context takes one call without groups: the kernel aligns a
window to the end of a sequence's keys, which a group does not share.

Keys are read in place through a block table if the installed torch and GPU can; this is tried once at
start. Otherwise each part's keys are gathered first, into one ragged row.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch

from server.engine.plan import PrefixGroup
from server.worker.attention.partial import PartialAttention
from server.worker.batch import AttentionSpec, PackedBatch
from server.worker.kv_memory import KvMemory

__all__ = ["KeyRange", "VarlenAttention", "VarlenUnavailable", "plan_calls"]

logger = logging.getLogger(__name__)

Varlen = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""``torch.nn.attention.varlen.varlen_attn`` with log-sum-exp, or a stand-in of the same contract."""


class VarlenUnavailable(RuntimeError):
    """Say why the kernel can not be used here."""


@dataclass(frozen=True, slots=True)
class KeyRange:
    """One kernel call: several (queries, keys) pairs, on the device."""

    rows: torch.Tensor | None
    """int64: rows of the batch in the call's order; None: all of them, in place."""
    query_starts: torch.Tensor
    """int32 ``[n + 1]``."""
    max_queries: int
    key_lens: torch.Tensor
    """int32 ``[n]``: keys in use."""
    max_keys: int
    block_tables: torch.Tensor
    """int32 ``[n, width]``."""
    gather: torch.Tensor
    """int64 ``[sum of key_lens]``: slot of every key, in order (for kernels without block tables)."""
    key_starts: torch.Tensor
    """int32 ``[n + 1]``."""
    is_causal: bool


def plan_calls(batch: PackedBatch, block_size: int) -> tuple[list[KeyRange], KeyRange]:
    """Return the calls of the prefix groups, outermost level first, and then the rest's.

    The rest's call comes second and covers every row.
    """
    starts = [0]
    for length in batch.query_lens_host:
        starts.append(starts[-1] + length)
    own_first_block = [0] * batch.num_sequences
    levels: list[list[PrefixGroup]] = []
    open_groups: list[PrefixGroup] = []
    for group in sorted(batch.groups, key=lambda g: (g.start, -g.stop, g.first_block)):
        while open_groups and open_groups[-1].stop <= group.start:
            open_groups.pop()
        if len(levels) == len(open_groups):
            levels.append([])
        levels[len(open_groups)].append(group)
        open_groups.append(group)
        for s in range(group.start, group.stop):
            own_first_block[s] = max(own_first_block[s], group.last_block)
    calls = [
        _make_call(
            batch,
            block_size,
            [(starts[g.start], starts[g.stop]) for g in level],
            [(g.start, g.first_block, (g.last_block - g.first_block) * block_size) for g in level],
            is_causal=False,
        )
        for level in levels
    ]
    return calls, _rest_call(batch, block_size, starts, own_first_block)


def _rest_call(batch: PackedBatch, block_size: int, starts: list[int], first_blocks: list[int]) -> KeyRange:
    keys = [
        (s, first, context - first * block_size)
        for s, (first, context) in enumerate(zip(first_blocks, batch.context_lens_host, strict=True))
    ]
    return _make_call(batch, block_size, list(pairwise(starts)), keys, is_causal=True)


def _make_call(
    batch: PackedBatch,
    block_size: int,
    row_ranges: list[tuple[int, int]],
    keys: list[tuple[int, int, int]],
    *,
    is_causal: bool,
) -> KeyRange:
    """Build one call from row ranges and, for each, (sequence, first block, number of keys)."""
    device = batch.block_tables.device
    query_lens = [stop - start for start, stop in row_ranges]
    key_lens = [count for _, _, count in keys]
    width = max(-(-count // block_size) for count in key_lens)
    owners = torch.tensor([s for s, _, _ in keys], device=device)
    firsts = torch.tensor([first for _, first, _ in keys], device=device)
    columns = firsts[:, None] + torch.arange(width, device=device)
    # Columns past a table's end are never read by the kernel; they only have to be inside the tensor.
    columns = columns.clamp(max=batch.block_tables.shape[1] - 1)
    tables = batch.block_tables[owners[:, None], columns].contiguous()

    lens = torch.tensor(key_lens, device=device)
    owner_of_key = torch.repeat_interleave(torch.arange(len(keys), device=device), lens)
    key_starts = torch.cat([lens.new_zeros(1), lens.cumsum(0)])
    offsets = torch.arange(int(sum(key_lens)), device=device) - key_starts[owner_of_key]
    gather = tables[owner_of_key, offsets // block_size].long() * block_size + offsets % block_size

    covers_all = sum(query_lens) == batch.num_tokens
    rows = None
    if not covers_all:
        rows = torch.cat([torch.arange(a, b, device=device) for a, b in row_ranges])
    query_starts = torch.tensor([0, *query_lens], device=device).cumsum(0)
    return KeyRange(
        rows=rows,
        query_starts=query_starts.int(),
        max_queries=max(query_lens),
        key_lens=lens.int(),
        max_keys=max(key_lens),
        block_tables=tables,
        gather=gather,
        key_starts=key_starts.int(),
        is_causal=is_causal,
    )


class VarlenAttention:
    """The CUDA backend; no softcap, no sinks. Plans once per batch, then serves every layer of it."""

    name = "varlen"

    def __init__(self, memory: KvMemory, *, varlen: Varlen | None = None) -> None:
        """Try the kernel on ``memory``. Raises ``VarlenUnavailable``.

        ``varlen`` stands in for ``torch.nn.attention.varlen.varlen_attn`` (tests run on CPU with one).
        """
        layout = memory.layout
        if varlen is None and layout.dtype not in (torch.float16, torch.bfloat16):
            raise VarlenUnavailable(f"the varlen kernel does not compute {layout.dtype}")
        self._varlen, parameters = _find_varlen() if varlen is None else (varlen, _parameters(varlen))
        if "enable_gqa" not in parameters or "return_aux" not in parameters:
            raise VarlenUnavailable("the varlen kernel of this torch has no grouped heads or log-sum-exp")
        self._takes_window = "window_size" in parameters
        # One split: a row's result does not depend on how long the others of its batch are.
        self._options: dict[str, Any] = {"num_splits": 1} if "num_splits" in parameters else {}
        self._is_lse_heads_first = True
        self._batch: PackedBatch | None = None
        self._shared: list[KeyRange] = []
        self._rest: KeyRange | None = None
        self._whole: KeyRange | None = None
        self._is_paged = {"block_table", "seqused_k"} <= parameters and self._try(memory, is_paged=True)
        if not self._is_paged and not self._try(memory, is_paged=False):
            raise VarlenUnavailable("the varlen kernel of this torch does not run on this GPU")
        if self._is_paged:
            self.name = "varlen-paged"

    def attend(
        self, query: torch.Tensor, memory: KvMemory, batch: PackedBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        """Return ``[T, num_heads, head_dim]``. Raises ``ValueError`` for a softcap or sinks."""
        if spec.softcap is not None or spec.sinks is not None:
            raise ValueError("the varlen kernel knows neither softcap nor sinks")
        block_size = memory.layout.block_size
        if self._batch is not batch:
            self._shared, self._rest = plan_calls(batch, block_size)
            self._whole = None if self._shared else self._rest
            self._batch = batch
        query = query.contiguous()
        longest = max(batch.context_lens_host)
        if spec.window is not None and spec.window < longest:
            if not self._takes_window:
                raise ValueError("the varlen kernel of this torch has no windows")
            whole = self._whole or self._plan_whole(batch, block_size)
            return self._call(query, memory, spec, whole, window=spec.window)[0]
        assert self._rest is not None  # planned with the batch
        if not self._shared:
            return self._call(query, memory, spec, self._rest)[0]
        result = PartialAttention(query.shape[0], query.shape[1], query.shape[2], query.device)
        for call in [self._rest, *self._shared]:
            rows = slice(0, query.shape[0]) if call.rows is None else call.rows
            result.merge(rows, *self._call(query[rows], memory, spec, call))
        return result.out.to(query.dtype)

    def _plan_whole(self, batch: PackedBatch, block_size: int) -> KeyRange:
        starts = [0]
        for length in batch.query_lens_host:
            starts.append(starts[-1] + length)
        self._whole = _rest_call(batch, block_size, starts, [0] * batch.num_sequences)
        return self._whole

    def _call(
        self,
        query: torch.Tensor,
        memory: KvMemory,
        spec: AttentionSpec,
        part: KeyRange,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``out [n, H, D]`` and ``lse [n, H]`` of one kernel call."""
        keys, values = memory.keys(spec.layer), memory.values(spec.layer)
        options = dict(self._options)
        starts: torch.Tensor | None = part.key_starts
        if self._is_paged:
            options.update(block_table=part.block_tables, seqused_k=part.key_lens)
            starts = None
        else:
            size = memory.layout.block_size
            blocks, offsets = part.gather // size, part.gather % size
            keys, values = keys[blocks, offsets], values[blocks, offsets]
        # The kernel's window counts the positions to the left of a query's own; -1 means all of them.
        left = -1 if window is None else window - 1
        options["window_size"] = (left, 0 if part.is_causal else -1)
        out, lse = self._varlen(
            query,
            keys,
            values,
            part.query_starts,
            starts,
            part.max_queries,
            part.max_keys,
            return_aux=_aux_request(),
            scale=spec.scaling,
            enable_gqa=query.shape[1] != memory.layout.num_kv_heads,
            **options,
        )
        # Documented as [n, H], returned as [H, n] by the kernels behind it: learned where n is not H.
        if out.shape[0] != out.shape[1]:
            self._is_lse_heads_first = lse.shape[0] == out.shape[1]
        return out, lse.transpose(0, 1) if self._is_lse_heads_first else lse

    def _try(self, memory: KvMemory, *, is_paged: bool) -> bool:
        """Compare the kernel with plain math on a few keys; learn how it lays out the log-sum-exp."""
        layout, device = memory.layout, memory.storage.device
        num_heads, num_keys = layout.num_kv_heads * 2, layout.block_size + 2
        num_queries = num_heads + 1
        self._is_paged = is_paged
        # Block 2 is full of keys, block 1 holds the last two.
        slots = torch.arange(num_keys, device=device)
        slots = torch.where(slots < layout.block_size, 2 * layout.block_size + slots, slots)
        part = KeyRange(
            rows=None,
            query_starts=torch.tensor([0, num_queries], dtype=torch.int32, device=device),
            max_queries=num_queries,
            key_lens=torch.tensor([num_keys], dtype=torch.int32, device=device),
            max_keys=num_keys,
            block_tables=torch.tensor([[2, 1]], dtype=torch.int32, device=device),
            gather=slots,
            key_starts=torch.tensor([0, num_keys], dtype=torch.int32, device=device),
            is_causal=False,
        )
        generator = torch.Generator().manual_seed(0)

        def draw(count: int, heads: int) -> torch.Tensor:
            values = torch.randn(count, heads, layout.head_dim, generator=generator)
            return values.to(device=device, dtype=layout.dtype)

        query = draw(num_queries, num_heads)
        keys, values = draw(num_keys, layout.num_kv_heads), draw(num_keys, layout.num_kv_heads)
        memory.write(0, slots, keys, values)
        scores = torch.einsum("nhd,phd->nhp", query.float(), keys.float().repeat_interleave(2, 1)) * 0.1
        expected = torch.einsum("nhp,phd->nhd", scores.softmax(-1), values.float().repeat_interleave(2, 1))
        try:
            out, lse = self._call(query, memory, AttentionSpec(layer=0, scaling=0.1), part)
            right = torch.allclose(out.float(), expected, atol=0.03)
            return right and torch.allclose(lse.float(), scores.logsumexp(-1), atol=0.03)
        except (RuntimeError, ValueError, TypeError) as error:
            logger.info("the varlen kernel does not run (paged: %s)", is_paged, exc_info=error)
            return False
        finally:
            memory.clear([1, 2])


def _find_varlen() -> tuple[Varlen, set[str]]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise VarlenUnavailable("this torch has no varlen kernel") from None
    return cast("Varlen", varlen_attn), _parameters(varlen_attn)


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _aux_request() -> Any:
    from torch.nn.attention.varlen import AuxRequest

    return AuxRequest(lse=True)
