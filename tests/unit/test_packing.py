"""Plans turned into tensors."""

from __future__ import annotations

from array import array

import pytest
import torch

from server.engine.plan import PrefixGroup, SamplingSpec, SequencePlan, StepPlan
from server.worker.logits_store import LogitsStore
from server.worker.packing import pack_step, reindex_groups

CPU = torch.device("cpu")
GREEDY = SamplingSpec()


def sequence(number, computed, tokens, blocks, **rest):
    return SequencePlan(number, computed, tokens, array("i", blocks), **rest)


def test_tensors_of_a_mixed_step():
    plan = StepPlan(
        1,
        [
            sequence(10, 3, [5, 6, 7], [9, 2, 4], sampling=GREEDY),
            sequence(11, 8, [], [9, 3], sampling=GREEDY, logits_from=0),
            sequence(12, 0, [1, 2], [7, 1]),
            sequence(13, 7, [8], [9, 5], sampling=GREEDY),
        ],
    )
    step = pack_step(plan, 4, CPU)
    batch = step.batch
    assert batch is not None
    assert batch.token_ids.tolist() == [5, 6, 7, 1, 2, 8]
    assert batch.positions.tolist() == [3, 4, 5, 0, 1, 7]
    assert batch.slots.tolist() == [9 * 4 + 3, 2 * 4, 2 * 4 + 1, 28, 29, 5 * 4 + 3]
    assert batch.query_starts.tolist() == [0, 3, 5, 6]
    assert batch.context_lens.tolist() == [6, 2, 8]
    assert batch.block_tables.tolist() == [[9, 2], [7, 0], [9, 5]]  # reserved blocks are left out
    assert batch.logit_rows.tolist() == [2, 5]
    assert step.logit_row == [0, -1, -1, 1]
    assert batch.query_lens_host == [3, 2, 1]
    assert batch.context_lens_host == [6, 2, 8]
    assert [t.dtype for t in (batch.token_ids, batch.positions, batch.slots, batch.logit_rows)] == [
        torch.int64
    ] * 4
    assert [t.dtype for t in (batch.query_starts, batch.context_lens, batch.block_tables)] == [
        torch.int32
    ] * 3
    assert batch.block_tables.is_contiguous()


def test_blocks_begun_but_not_filled_are_fresh():
    plan = StepPlan(
        1,
        [
            sequence(1, 0, [1] * 6, [10, 11]),  # fills 10, begins 11
            sequence(2, 5, [1], [20, 21]),  # goes on in 21
            sequence(3, 4, [1] * 4, [30, 31]),  # begins and fills 31
            sequence(4, 8, [1], [40, 41, 42]),  # begins 42
        ],
    )
    assert pack_step(plan, 4, CPU).fresh_blocks == [11, 42]


def test_step_without_tokens_has_no_batch():
    plan = StepPlan(1, [sequence(1, 8, [], [1, 2], sampling=GREEDY, logits_from=3)])
    step = pack_step(plan, 4, CPU)
    assert step.batch is None
    assert step.logit_row == [-1]


def test_prompt_that_only_saves_its_logits_gets_a_row():
    plan = StepPlan(1, [sequence(1, 0, [4, 5], [1], save_logits_to=2)])
    step = pack_step(plan, 4, CPU)
    assert step.batch is not None
    assert step.batch.logit_rows.tolist() == [1]


def test_groups_follow_the_sequences_that_remain():
    groups = [PrefixGroup(0, 4, 0, 2), PrefixGroup(2, 4, 2, 5)]
    assert reindex_groups(groups, [True, False, True, True]) == [
        PrefixGroup(0, 3, 0, 2),
        PrefixGroup(1, 3, 2, 5),
    ]


def test_group_of_one_is_none():
    assert reindex_groups([PrefixGroup(0, 2, 0, 2)], [False, True]) == []
    assert reindex_groups([PrefixGroup(0, 3, 0, 2), PrefixGroup(1, 3, 2, 3)], [True, True, False]) == [
        PrefixGroup(0, 2, 0, 2)
    ]


def test_nested_groups_of_the_same_members_become_one():
    groups = [PrefixGroup(0, 3, 0, 2), PrefixGroup(1, 3, 2, 5), PrefixGroup(1, 3, 5, 6)]
    assert reindex_groups(groups, [False, True, True]) == [PrefixGroup(0, 2, 0, 6)]


def test_logits_store_is_capped_by_bytes_and_says_so():
    store = LogitsStore(1000, 256, device=CPU, max_bytes=10 * 1024)
    assert store.num_slots == 10
    assert store.num_bytes == 10 * 1024


def test_logits_store_keeps_rows_by_slot():
    store = LogitsStore(4, 3, device=CPU)
    with pytest.raises(LookupError):
        store.load([0])
    rows = torch.arange(6.0).view(2, 3)
    store.save([3, 0], rows)
    assert torch.equal(store.load([0, 3]), rows[[1, 0]])
    store.load([0])[:] = -1
    assert torch.equal(store.load([0]), rows[1:])
