"""Random packed batches over shuffled blocks, with nested prefix groups, for tests of attention."""

from __future__ import annotations

import random
from array import array

import torch

from server.engine.plan import PrefixGroup, SamplingSpec, SequencePlan, StepPlan
from server.worker.batch import AttentionSpec, PackedBatch
from server.worker.kv_memory import KvLayout, KvMemory
from server.worker.packing import pack_step

CPU = torch.device("cpu")


def filled_memory(
    *, num_blocks: int = 64, block_size: int = 4, num_kv_heads: int = 2, head_dim: int = 16, seed: int = 0
) -> KvMemory:
    """Return two layers of memory full of random KV."""
    layout = KvLayout(2, num_kv_heads, head_dim, block_size, torch.float32)
    memory = KvMemory(layout, num_blocks, CPU)
    generator = torch.Generator().manual_seed(seed)
    memory.storage.copy_(torch.randn(memory.storage.shape, generator=generator))
    return memory


def random_plan(memory: KvMemory, *, seed: int) -> StepPlan:
    """Return six sequences: 0 to 4 share three blocks, 1 to 3 two more, 5 stands alone; 2 has no tokens."""
    dice = random.Random(seed)
    size = memory.layout.block_size
    ids = list(range(memory.num_blocks))
    dice.shuffle(ids)
    outer, inner = [ids.pop() for _ in range(3)], [ids.pop() for _ in range(2)]
    sequences = []
    for index in range(6):
        shared = [] if index == 5 else outer + inner if index in (1, 2, 3) else outer
        own_context = dice.randint(0, 3 * size)
        computed = len(shared) * size + own_context
        length = 0 if index == 2 else 1 if dice.random() < 0.5 else dice.randint(2, 9)
        count = -(-(computed + max(length, 1)) // size) + dice.randint(0, 1)
        table = array("i", shared + [ids.pop() for _ in range(count - len(shared))])
        tokens = [dice.randrange(50) for _ in range(length)]
        sequences.append(SequencePlan(index, computed, tokens, table, SamplingSpec()))
    return StepPlan(seed, sequences, [PrefixGroup(0, 5, 0, 3), PrefixGroup(1, 4, 3, 5)])


def random_batch(memory: KvMemory, *, seed: int) -> PackedBatch:
    """Return :func:`random_plan`, packed."""
    batch = pack_step(random_plan(memory, seed=seed), memory.layout.block_size, CPU).batch
    assert batch is not None
    return batch


def random_query(batch: PackedBatch, memory: KvMemory, *, num_heads: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch.num_tokens, num_heads, memory.layout.head_dim, generator=generator)


SPECS = {
    "plain": AttentionSpec(layer=1, scaling=0.3),
    "window": AttentionSpec(layer=0, scaling=0.3, window=7),
    "tiny window": AttentionSpec(layer=0, scaling=0.3, window=1),
    "window that hides a part of a prefix": AttentionSpec(layer=0, scaling=0.3, window=18),
    "softcap": AttentionSpec(layer=1, scaling=0.9, softcap=2.0),
    "softcap and window": AttentionSpec(layer=1, scaling=0.9, softcap=2.0, window=9),
    "sinks": AttentionSpec(layer=1, scaling=0.3, sinks=torch.linspace(-2, 3, 6)),
    "sinks and window": AttentionSpec(layer=1, scaling=0.3, sinks=torch.linspace(-2, 3, 6), window=8),
}
