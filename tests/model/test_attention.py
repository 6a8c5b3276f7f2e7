"""Every way of computing attention equals the plain one."""

from __future__ import annotations

import pytest
import torch

from server.engine.plan import PrefixGroup
from server.worker.attention import partial
from server.worker.attention.cuda import VarlenAttention, VarlenUnavailable, plan_calls
from server.worker.attention.grouped import GroupedAttention
from server.worker.attention.reference import ReferenceAttention
from server.worker.batch import AttentionSpec
from tests.model.batches import SPECS, filled_memory, random_batch, random_query

torch.set_num_threads(2)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("seed", range(4))
def test_grouped_equals_reference(spec, seed):
    memory = filled_memory(seed=seed)
    batch = random_batch(memory, seed=seed)
    query = random_query(batch, memory)
    expected = ReferenceAttention().attend(query, memory, batch, spec)
    torch.testing.assert_close(
        GroupedAttention().attend(query, memory, batch, spec), expected, atol=2e-5, rtol=1e-4
    )


def test_tiles_of_scores_do_not_show(monkeypatch):
    monkeypatch.setattr(partial, "_TILE_SCORES", 1)
    memory = filled_memory(num_blocks=128, block_size=16, head_dim=8)
    batch = random_batch(memory, seed=3)
    query = random_query(batch, memory)
    for spec in (SPECS["softcap"], SPECS["window"]):
        expected = ReferenceAttention().attend(query, memory, batch, spec)
        got = GroupedAttention().attend(query, memory, batch, spec)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_what_a_failed_request_left_behind_does_not_spread():
    memory = filled_memory()
    batch = random_batch(memory, seed=1)
    query = random_query(batch, memory)
    expected = ReferenceAttention().attend(query, memory, batch, SPECS["plain"])
    used = {
        int(b) for s, n in enumerate(batch.context_lens_host) for b in batch.block_tables[s, : -(-n // 4)]
    }
    foreign = [b for b in range(memory.num_blocks) if b not in used]
    memory.storage[foreign] = float("nan")
    got = GroupedAttention().attend(query, memory, batch, SPECS["plain"])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_backend_plans_anew_for_another_batch():
    memory = filled_memory()
    backend = GroupedAttention()
    for seed in (1, 2, 1):
        batch = random_batch(memory, seed=seed)
        query = random_query(batch, memory)
        expected = ReferenceAttention().attend(query, memory, batch, SPECS["plain"])
        torch.testing.assert_close(
            backend.attend(query, memory, batch, SPECS["plain"]), expected, atol=2e-5, rtol=1e-4
        )


def varlen_stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """Do what torch.nn.attention.varlen.varlen_attn documents, one sequence at a time."""
    assert return_aux.lse
    assert enable_gqa or query.shape[1] == key.shape[-2]
    outs, lses = [], []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        if block_table is not None:
            assert cu_seq_k is None
            used = int(seqused_k[i])
            blocks = block_table[i, : -(-used // key.shape[1])].long()
            k, v = key[blocks].flatten(0, 1)[:used], value[blocks].flatten(0, 1)[:used]
        else:
            k, v = key[cu_seq_k[i] : cu_seq_k[i + 1]], value[cu_seq_k[i] : cu_seq_k[i + 1]]
        assert len(q) <= max_q
        assert len(k) <= max_k
        repeats = q.shape[1] // k.shape[1]
        scores = torch.einsum("nhd,phd->nhp", q, k.repeat_interleave(repeats, 1)) * scale
        # Windows are aligned to the end of the keys.
        at = torch.arange(len(q))[:, None] + len(k) - len(q)
        columns = torch.arange(len(k))[None, :]
        visible = torch.ones(len(q), len(k), dtype=torch.bool)
        left, right = window_size
        if left >= 0:
            visible &= columns >= at - left
        if right >= 0:
            visible &= columns <= at + right
        scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
        outs.append(torch.einsum("nhp,phd->nhd", scores.softmax(-1), v.repeat_interleave(repeats, 1)))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses)


def varlen_heads_first(*args, return_aux=None, enable_gqa=False, seqused_k=None, block_table=None, **kwargs):
    out, lse = varlen_stand_in(
        *args,
        return_aux=return_aux,
        enable_gqa=enable_gqa,
        seqused_k=seqused_k,
        block_table=block_table,
        **kwargs,
    )
    return out, lse.transpose(0, 1)


def varlen_unpaged(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    return varlen_stand_in(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        return_aux=return_aux, scale=scale, window_size=window_size, enable_gqa=enable_gqa,
    )  # fmt: skip


def varlen_paged_but_broken(
    *args, block_table=None, seqused_k=None, return_aux=None, enable_gqa=False, **kwargs
):
    if block_table is not None:
        raise RuntimeError("page size must be a multiple of 256")
    return varlen_stand_in(*args, return_aux=return_aux, enable_gqa=enable_gqa, **kwargs)


class WindowedVarlen:
    """Give a stand-in of ``**kwargs`` the signature that is looked at."""

    def __init__(self, function):
        self.function = function

    def __call__(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size,
        enable_gqa, seqused_k=None, block_table=None,
    ):  # fmt: skip
        return self.function(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
            window_size=window_size, enable_gqa=enable_gqa, seqused_k=seqused_k, block_table=block_table,
        )  # fmt: skip


VARLENS = {
    "paged": (varlen_stand_in, "varlen-paged"),
    "paged, heads first": (WindowedVarlen(varlen_heads_first), "varlen-paged"),
    "no block tables": (varlen_unpaged, "varlen"),
    "block tables refused": (WindowedVarlen(varlen_paged_but_broken), "varlen"),
}


@pytest.mark.parametrize(("varlen", "name"), VARLENS.values(), ids=VARLENS)
@pytest.mark.parametrize("spec", [n for n in SPECS if "softcap" not in n and "sinks" not in n])
def test_varlen_equals_reference(varlen, name, spec):
    for seed in range(3):
        memory = filled_memory(seed=seed)
        before = memory.storage.clone()
        backend = VarlenAttention(memory, varlen=varlen)
        assert backend.name == name
        memory.storage.copy_(before)  # the trial clears the blocks it used
        batch = random_batch(memory, seed=seed)
        query = random_query(batch, memory)
        expected = ReferenceAttention().attend(query, memory, batch, SPECS[spec])
        torch.testing.assert_close(
            backend.attend(query, memory, batch, SPECS[spec]), expected, atol=2e-5, rtol=1e-4
        )


def test_varlen_learns_the_layout_of_the_log_sum_exp_before_it_is_ambiguous():
    for varlen in (varlen_stand_in, WindowedVarlen(varlen_heads_first)):
        memory = filled_memory()
        before = memory.storage.clone()
        backend = VarlenAttention(memory, varlen=varlen)
        memory.storage.copy_(before)
        seed = next(s for s in range(99) if random_batch(memory, seed=s).num_tokens == 12)
        batch = random_batch(memory, seed=seed)
        query = random_query(batch, memory, num_heads=12)
        expected = ReferenceAttention().attend(query, memory, batch, SPECS["plain"])
        torch.testing.assert_close(
            backend.attend(query, memory, batch, SPECS["plain"]), expected, atol=2e-5, rtol=1e-4
        )


def test_varlen_that_is_wrong_is_not_used():
    def wrong(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa
    ):
        return torch.zeros_like(query), torch.zeros(query.shape[:2])

    with pytest.raises(VarlenUnavailable):
        VarlenAttention(filled_memory(), varlen=wrong)


def test_varlen_without_grouped_heads_is_not_used():
    with pytest.raises(VarlenUnavailable, match="grouped heads"):
        VarlenAttention(filled_memory(), varlen=lambda query, key, value: (query, query))


def test_levels_of_groups_are_calls_of_their_own():
    memory = filled_memory()
    batch = random_batch(memory, seed=0)
    assert batch.groups == [PrefixGroup(0, 4, 0, 3), PrefixGroup(1, 3, 3, 5)]  # without sequence 2
    shared, rest = plan_calls(batch, memory.layout.block_size)
    assert [call.key_lens.tolist() for call in shared] == [[12], [8]]
    assert rest.rows is None
    assert rest.key_lens.tolist() == [
        n - 4 * first for n, first in zip(batch.context_lens_host, [3, 5, 5, 3, 0], strict=True)
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_on_cuda_equals_reference(block_size, dtype):
    from server.worker.kv_memory import KvLayout, KvMemory

    host = filled_memory(block_size=block_size, head_dim=64)
    layout = KvLayout(2, 2, 64, block_size, dtype)
    memory = KvMemory(layout, host.num_blocks, torch.device("cuda"))
    backend = VarlenAttention(memory)
    memory.storage.copy_(host.storage)
    host.storage.copy_(memory.storage.float())
    batch = random_batch(host, seed=1)
    query = random_query(batch, host).to(dtype)
    moved = {
        name: getattr(batch, name).cuda()
        for name in (
            "token_ids",
            "positions",
            "slots",
            "query_starts",
            "context_lens",
            "block_tables",
            "logit_rows",
        )
    }
    from dataclasses import replace

    on_device = replace(batch, **moved)
    for spec in (SPECS["plain"], SPECS["window"], AttentionSpec(layer=0, scaling=0.125)):
        expected = ReferenceAttention().attend(query.float(), host, batch, spec)
        got = backend.attend(query.cuda(), memory, on_device, spec).float().cpu()
        torch.testing.assert_close(got, expected, atol=0.03, rtol=0.03)
