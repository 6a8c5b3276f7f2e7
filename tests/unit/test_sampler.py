"""Drawing tokens: exact distributions, exact filters, and rows that do not know of each other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from server.engine.plan import SampledToken, SamplingSpec
from server.worker import sampler
from server.worker.random_numbers import uniform
from server.worker.sampler import Draw, SampleFailure, sample

torch.set_num_threads(2)


def logits_of(vocab: int, rows: int = 1, *, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def draw_ids(logits: torch.Tensor, *draws: Draw) -> list[int]:
    return [token.token_id for token in drawn(logits, *draws)]


def drawn(logits: torch.Tensor, *draws: Draw) -> list[SampledToken]:
    tokens = [token for token in sample(logits, draws) if isinstance(token, SampledToken)]
    assert len(tokens) == len(draws)
    return tokens


def draw_many(row: torch.Tensor, spec: SamplingSpec, count: int) -> np.ndarray:
    """Draw ``count`` times from one row, at successive positions."""
    ids: list[int] = []
    for start in range(0, count, 500):
        draws = [Draw(spec, position) for position in range(start, start + 500)]
        ids += draw_ids(row.expand(500, -1).contiguous(), *draws)
    return np.bincount(ids, minlength=row.shape[-1])


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    assert counts[expected == 0].sum() == 0, "a token that can not be drawn was drawn"
    kept = expected > 0
    return float((((counts - expected) ** 2)[kept] / expected[kept]).sum()), int(kept.sum()) - 1


def exact(row: torch.Tensor, spec: SamplingSpec) -> np.ndarray:
    """Return the distribution that ``spec`` asks for, written out plainly."""
    logits = row.double().numpy() / spec.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p[p < spec.min_p * p.max()] = 0
    if spec.top_k:
        p[p < np.sort(p)[-spec.top_k]] = 0
    if spec.top_p < 1:
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= spec.top_p]] = 0
    result: np.ndarray = p / p.sum()
    return result


SPECS = {
    "plain": SamplingSpec(temperature=1.0, seed=1),
    "cold": SamplingSpec(temperature=0.6, seed=2),
    "hot": SamplingSpec(temperature=1.7, seed=3),
    "top_k": SamplingSpec(temperature=1.0, top_k=5, seed=4),
    "top_p": SamplingSpec(temperature=1.0, top_p=0.8, seed=5),
    "min_p": SamplingSpec(temperature=1.0, min_p=0.1, seed=6),
    "all": SamplingSpec(temperature=1.2, top_k=12, top_p=0.9, min_p=0.02, seed=7, sample_index=3),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_draws_follow_the_exact_distribution(spec):
    row = logits_of(40, seed=11)
    count = 10_000
    statistic, degrees = chi_square(draw_many(row, spec, count), exact(row[0], spec) * count)
    # The 99.9% point by Wilson and Hilferty; the seeds are fixed, so this holds or does not.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_few_candidates_and_the_whole_vocabulary_give_the_same_token(spec, monkeypatch):
    logits = logits_of(3000, rows=20, seed=3, scale=1.0)
    draws = [Draw(replace(spec, seed=i), position=i) for i in range(20)]
    few = draw_ids(logits, *draws)
    monkeypatch.setattr(sampler, "_NUM_CANDIDATES", 3000)
    monkeypatch.setattr(sampler, "_NUM_FEW_CANDIDATES", 3000)
    assert draw_ids(logits, *draws) == few
    monkeypatch.setattr(sampler, "_NUM_CANDIDATES", 2)
    monkeypatch.setattr(sampler, "_NUM_FEW_CANDIDATES", 2)
    assert draw_ids(logits, *draws) == few


def test_a_row_alone_equals_the_row_in_a_batch_bitwise():
    vocab = 50_001
    logits = logits_of(vocab, rows=24, seed=5)
    variants = [
        *SPECS.values(),
        SamplingSpec(),
        SamplingSpec(repetition_penalty=1.3),
        SamplingSpec(temperature=30.0, top_p=0.99),
    ]
    draws = [
        Draw(
            replace(variants[i % len(variants)], seed=i, num_top_logprobs=i % 4),
            i,
            history=[1, 2, i],
            num_prompt_tokens=1,
        )
        for i in range(24)
    ]
    together = drawn(logits, *draws)
    assert len({t.token_id for t in together}) > 12
    for i, draw in enumerate(draws):
        assert sample(logits[i : i + 1].clone(), [draw]) == [together[i]]
    order = list(range(23, -1, -1))
    assert sample(logits[order], [draws[i] for i in order]) == [together[i] for i in order]


def test_greedy_takes_the_lowest_id_of_equal_ones():
    logits = torch.zeros(3, 1000)
    logits[1, [7, 400]] = 5.0
    logits[2, [999, 998]] = 5.0
    plain, biased = SamplingSpec(), SamplingSpec(logit_bias=((0, -1.0),))
    assert draw_ids(logits, *[Draw(plain, 0)] * 3) == [0, 7, 998]
    assert draw_ids(logits, *[Draw(biased, 0)] * 3) == [1, 7, 998]


def test_top_k_keeps_all_that_equal_the_last():
    logits = torch.full((1, 100), -5.0)
    logits[0, 10:14] = 1.0
    counts = draw_many(logits, SamplingSpec(temperature=1.0, top_k=2, seed=1), 1000)
    assert set(np.flatnonzero(counts)) == {10, 11, 12, 13}


def test_top_k_of_one_is_greedy_whatever_the_temperature():
    logits = logits_of(500, rows=8)
    specs = [SamplingSpec(temperature=5.0, top_k=1, seed=i) for i in range(8)]
    assert draw_ids(logits, *[Draw(s, 0) for s in specs]) == logits.argmax(-1).tolist()


def test_tiny_top_p_keeps_the_best_token():
    logits = logits_of(500, rows=8)
    specs = [SamplingSpec(temperature=1.0, top_p=1e-9, seed=i) for i in range(8)]
    assert draw_ids(logits, *[Draw(s, 0) for s in specs]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1e30])
def test_extreme_temperatures_draw_something(temperature):
    logits = logits_of(100, scale=20.0)
    (token,) = sample(logits, [Draw(SamplingSpec(temperature=temperature, seed=3), 0)])
    assert isinstance(token, SampledToken)
    if temperature < 1:
        assert token.token_id == int(logits.argmax())


def test_suppressed_tokens_are_never_drawn():
    logits = torch.zeros(1, 20)
    spec = SamplingSpec(temperature=1.0, suppressed_token_ids=(0, 3, 19, 25), seed=1)
    counts = draw_many(logits, spec, 1000)
    assert set(np.flatnonzero(counts)) == set(range(20)) - {0, 3, 19}
    assert draw_ids(logits, Draw(replace(spec, temperature=0.0), 0)) == [1]


def test_row_with_everything_suppressed_fails_alone():
    logits = torch.zeros(2, 4)
    nothing = SamplingSpec(suppressed_token_ids=(0, 1, 2, 3))
    failure, token = sample(logits, [Draw(nothing, 0), Draw(SamplingSpec(), 0)])
    assert isinstance(failure, SampleFailure)
    assert token == SampledToken(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", [SamplingSpec(), SamplingSpec(temperature=1.0, top_k=4, num_top_logprobs=2)])
def test_row_that_is_not_finite_fails_alone(bad, spec):
    logits = logits_of(50, rows=3)
    expected = sample(logits, [Draw(spec, i) for i in range(3)])
    logits[1, 17] = bad
    got = sample(logits, [Draw(spec, i) for i in range(3)])
    assert isinstance(got[1], SampleFailure)
    assert [got[0], got[2]] == [expected[0], expected[2]]


def test_minus_infinity_is_a_token_that_can_not_be_drawn():
    logits = torch.full((1, 50), float("-inf"))
    logits[0, [4, 9]] = 0.0
    for spec in SPECS.values():
        assert set(np.flatnonzero(draw_many(logits, spec, 500))) <= {4, 9}


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = logits_of(60, seed=9)
    history = [3, 3, 8, 59, 0]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), logits.clone())
    (got,) = sample(expected, [Draw(SamplingSpec(), 0)])
    assert sample(logits, [Draw(SamplingSpec(repetition_penalty=1.7), 0, history, 2)]) == [got]
    from server.worker.penalties import adjust_logits

    mine = adjust_logits(logits.clone(), [Draw(SamplingSpec(repetition_penalty=1.7), 0, history, 2)])
    torch.testing.assert_close(mine, expected)


def test_presence_and_frequency_count_generated_tokens_only():
    from server.worker.penalties import adjust_logits

    logits = torch.zeros(1, 6)
    spec = SamplingSpec(presence_penalty=0.5, frequency_penalty=0.25)
    got = adjust_logits(logits.clone(), [Draw(spec, 0, history=[1, 1, 2, 2, 2, 3], num_prompt_tokens=3)])
    assert got.tolist() == [[0, 0, -1.0, -0.75, 0, 0]]


def test_bias_of_one_token_given_twice_adds_up():
    from server.worker.penalties import adjust_logits

    spec = SamplingSpec(logit_bias=((2, 1.0), (0, -3.0), (2, 0.5)))
    assert adjust_logits(torch.zeros(1, 3), [Draw(spec, 0)]).tolist() == [[-3.0, 0.0, 1.5]]


def test_logprobs_are_of_the_raw_distribution():
    logits = logits_of(200, rows=2, seed=2)
    spec = SamplingSpec(temperature=0.3, top_k=3, logit_bias=((5, 100.0),), num_top_logprobs=4, seed=1)
    token, other = drawn(logits, Draw(spec, 0), Draw(SamplingSpec(num_top_logprobs=0), 0))
    logp = torch.log_softmax(logits, -1)
    assert token.token_id == 5
    assert token.logprob == pytest.approx(logp[0, 5].item())
    best = logp[0].topk(4)
    assert [i for i, _ in token.top_logprobs] == best.indices.tolist()
    assert [p for _, p in token.top_logprobs] == pytest.approx(best.values.tolist())
    assert other.top_logprobs == ()
    assert other.logprob == pytest.approx(logp[1].max().item())


def test_top_logprobs_of_equal_tokens_stand_by_id():
    logits = torch.zeros(1, 30)
    (token,) = drawn(logits, Draw(SamplingSpec(num_top_logprobs=3), 0))
    assert token.token_id == 0
    assert [p for _, p in token.top_logprobs] == pytest.approx([-math.log(30)] * 3)


def test_logits_are_left_as_they_were():
    logits = logits_of(100, rows=2)
    before = logits.clone()
    sample(logits, [Draw(SPECS["all"], 0), Draw(SamplingSpec(suppressed_token_ids=(1,)), 0)])
    assert torch.equal(logits, before)


def test_same_seed_position_and_sample_give_the_same_token():
    logits = logits_of(1000)
    spec = SamplingSpec(temperature=1.5, seed=77)
    first = draw_ids(logits, Draw(spec, 5))
    assert draw_ids(logits, Draw(spec, 5)) == first
    others = [Draw(spec, 6), Draw(replace(spec, seed=78), 5), Draw(replace(spec, sample_index=1), 5)]
    assert all(draw_ids(logits, other) != first for other in others)


def test_uniform_numbers_are_pinned():
    # A change of these breaks every client's stored seeds.
    assert uniform(0, 0, 0) == 0.13870941014555427
    assert uniform(7, 1, 42) == 0.8049316200435916
    numbers = np.array([uniform(s, i, p) for s in range(20) for i in range(5) for p in range(200)])
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert float(((counts - 400) ** 2 / 400).sum()) < 90  # 49 degrees of freedom, 99.9% at 85.4
    assert len(np.unique(numbers)) == len(numbers)
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    assert uniform(1, 2, 3) != uniform(2, 1, 3)


def test_no_rows_is_no_work():
    assert sample(torch.empty(0, 10), []) == []
