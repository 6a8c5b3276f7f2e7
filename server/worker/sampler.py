"""Draw the next token of every row of a batch in one vectorised pass.

Order of operations (as in vLLM; transformers agrees on all but where min_p stands)::

    raw logits -> log-probabilities reported to the client
       -> repetition penalty (prompt and generated), presence and frequency penalties (generated)
       -> logit bias -> suppressed tokens
       -> argmax if temperature is 0, else / temperature -> min_p -> top_k -> top_p -> draw

A draw is the inverse of the cumulative distribution at one uniform number
(:mod:`server.worker.random_numbers`). Without filters it runs over the vocabulary in id order. With
filters it runs over the tokens by falling logit (equal ones by rising id): each filter keeps a
leading part of that order, so a few candidates are enough and the whole vocabulary is sorted only
for rows whose cut lies beyond them. Sums are float64.

A row's result depends on no other row, bitwise: every reduction runs along one row in an order that
the number of rows does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.plan import SampledToken, SamplingSpec
from server.worker.penalties import adjust_logits
from server.worker.random_numbers import uniform

__all__ = ["Draw", "SampleFailure", "sample"]

_NUM_CANDIDATES = 1024
_NUM_FEW_CANDIDATES = 256
_BLOCK_IDS = 128
_CHUNK_ELEMENTS = 1 << 23
"""The log-probabilities of at most this many tokens are held at once (32 MiB)."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row needs besides its logits."""

    spec: SamplingSpec
    position: int
    """Of the token to draw; with seed and sample index it determines the random number."""
    history: Sequence[int] = ()
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """Why nothing could be drawn from a row; fit for a client."""

    reason: str


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[SampledToken | SampleFailure]:
    """Draw one token per row of float32 ``logits`` ``[R, vocab]``, which are left unchanged.

    A row with a NaN, a positive infinity or no finite logit fails; the others go on.
    """
    if not draws:
        return []
    results: list[SampledToken | SampleFailure | None] = [None] * len(draws)
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    for row, is_finite in enumerate(finite):
        if not is_finite:
            results[row] = SampleFailure("the model produced logits that are not finite")
    rows = [row for row in range(len(draws)) if finite[row]]

    is_plain = {row: _is_plain(draws[row].spec) for row in rows}
    plain = [row for row in rows if is_plain[row]]
    chosen: dict[int, int] = {}
    if plain:
        picked = _take(logits, plain).argmax(dim=-1).tolist()
        chosen.update(zip(plain, picked, strict=True))
    others = [row for row in rows if not is_plain[row]]
    if others:
        adjusted = _take(logits, others)
        if any(_is_adjusted(draws[row].spec) for row in others):
            adjusted = adjust_logits(
                adjusted.clone() if adjusted is logits else adjusted, [draws[row] for row in others]
            )
        possible = torch.isfinite(adjusted.amax(dim=-1)).tolist()
        greedy: list[int] = []
        drawn: list[int] = []
        for index, row in enumerate(others):
            if not possible[index]:
                results[row] = SampleFailure("no token may be drawn: all of them are suppressed")
            elif draws[row].spec.temperature == 0.0:
                greedy.append(index)
            else:
                drawn.append(index)
        if greedy:
            picked = _take(adjusted, greedy).argmax(dim=-1).tolist()
            chosen.update(zip((others[index] for index in greedy), picked, strict=True))
        if drawn:
            tokens = _draw(_take(adjusted, drawn), [draws[others[index]] for index in drawn])
            chosen.update(zip((others[index] for index in drawn), tokens, strict=True))

    wanted = [row for row in sorted(chosen) if draws[row].spec.num_top_logprobs is not None]
    logprobs = _logprobs(logits, wanted, [draws[row].spec for row in wanted], [chosen[row] for row in wanted])
    for row, token in chosen.items():
        results[row] = logprobs.get(row) or SampledToken(token)
    return [result for result in results if result is not None]


def _is_adjusted(spec: SamplingSpec) -> bool:
    return spec.needs_history or bool(spec.logit_bias) or bool(spec.suppressed_token_ids)


def _is_plain(spec: SamplingSpec) -> bool:
    """Say whether a row is greedy with nothing that could change which logit is largest."""
    return spec.temperature == 0.0 and not _is_adjusted(spec)


def _take(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return some rows: the tensor itself if they are all of it, in order; else a copy."""
    if list(rows) == list(range(logits.shape[0])):
        return logits
    return logits[torch.tensor(rows, device=logits.device)]


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw by temperature and filters. Every row has a finite largest logit."""
    vocab = logits.shape[1]
    specs = [draw.spec for draw in draws]
    numbers = [uniform(d.spec.seed, d.spec.sample_index, d.position) for d in draws]
    temperatures = torch.tensor([max(s.temperature, 1e-20) for s in specs], dtype=torch.float32)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures.to(logits.device)[:, None]
    probabilities = torch.softmax(scaled, dim=-1)
    tokens = [0] * len(draws)
    open_rows = [i for i, s in enumerate(specs) if not _has_filters(s, vocab)]
    if open_rows:
        drawn = _invert(_take(probabilities, open_rows), [numbers[i] for i in open_rows])
        for i, token in zip(open_rows, drawn, strict=True):
            tokens[i] = token
    filtered = [i for i, s in enumerate(specs) if _has_filters(s, vocab)]
    if filtered:
        few = all(0 < specs[i].top_k <= _NUM_FEW_CANDIDATES // 2 for i in filtered)
        count = min(vocab, _NUM_FEW_CANDIDATES if few else _NUM_CANDIDATES)
        scores = _largest(_take(scaled, filtered), count)
        masses = _largest(_take(probabilities, filtered), count)
        for at, i in enumerate(filtered):
            ranked = scores[at]
            rank = _pick_rank(ranked, masses[at], specs[i], numbers[i], whole=count == vocab)
            if rank is None:
                ranked, mass = (
                    _largest(scaled[i : i + 1], vocab)[0],
                    _largest(probabilities[i : i + 1], vocab)[0],
                )
                rank = _pick_rank(ranked, mass, specs[i], numbers[i], whole=True)
                assert rank is not None  # the whole vocabulary covers every cut
            tokens[i] = _id_of_rank(scaled[i], ranked, rank)
    return tokens


def _has_filters(spec: SamplingSpec, vocab: int) -> bool:
    return 0 < spec.top_k < vocab or spec.top_p < 1.0 or spec.min_p > 0.0


def _invert(probabilities: torch.Tensor, numbers: Sequence[float]) -> list[int]:
    """Return per row the first id at which the cumulative probability exceeds number times total.

    In two steps, since a running sum over a whole vocabulary is slow: sums of blocks of ids, then the
    running sum inside one block.
    """
    vocab = probabilities.shape[1]
    whole = vocab // _BLOCK_IDS * _BLOCK_IDS
    wide = torch.float32 if probabilities.device.type == "mps" else torch.float64
    sums = probabilities[:, :whole].unflatten(1, (-1, _BLOCK_IDS)).sum(-1, dtype=wide)
    rest = probabilities[:, whole:].sum(-1, keepdim=True, dtype=wide)
    ends = np.cumsum(torch.cat([sums, rest], dim=1).cpu().double().numpy(), axis=1)
    tokens = []
    for row, number in enumerate(numbers):
        total = ends[row, -1]
        target = min(number * total, np.nextafter(total, 0.0))
        block = int(np.searchsorted(ends[row], target, side="right"))
        start = block * _BLOCK_IDS
        inside = probabilities[row, start : start + _BLOCK_IDS].cpu().double().numpy()
        before = ends[row, block - 1] if block else 0.0
        at = int(np.searchsorted(np.cumsum(inside), target - before, side="right"))
        # The two sums may differ in their last bits: stay on an id that can be drawn.
        tokens.append(start + min(at, int(np.flatnonzero(inside)[-1])))
    return tokens


def _largest(values: torch.Tensor, count: int) -> np.ndarray:
    """Return each row's ``count`` largest, falling. Ids are not needed to find out where a cut lies."""
    if values.device.type != "cpu":
        return values.topk(count, dim=-1).values.cpu().numpy()
    rows = values.numpy()
    cut = rows.shape[1] - count
    kept = np.partition(rows, cut, axis=1)[:, cut:] if cut else rows
    return np.sort(kept, axis=1)[:, ::-1]


def _id_of_rank(scores: torch.Tensor, ranked: np.ndarray, rank: int) -> int:
    """Return the id at ``rank`` by falling score; equal scores stand by rising id."""
    score = ranked[rank]
    first = int(np.searchsorted(-ranked, -score, side="left"))
    return int((scores == float(score)).nonzero()[rank - first])


def _pick_rank(
    scores: np.ndarray, masses: np.ndarray, spec: SamplingSpec, number: float, *, whole: bool
) -> int | None:
    """Filter and draw a rank among falling scores and masses; None if the cut may lie beyond them.

    top_k keeps all that equal the k-th; top_p keeps the fewest whose share of what min_p and top_k
    left reaches it.
    """
    count = len(scores)
    kept = count
    if spec.min_p > 0.0:
        kept = int(np.count_nonzero(masses >= spec.min_p * float(masses[0])))
    if 0 < spec.top_k < kept:
        kept = min(kept, int(np.count_nonzero(scores >= scores[spec.top_k - 1])))
    is_cut = kept < count or whole
    is_shared = spec.min_p > 0.0 or spec.top_k > 0
    cumulative = np.cumsum(masses[:kept], dtype=np.float64)
    if spec.top_p < 1.0:
        if not is_cut and is_shared:
            return None
        total = cumulative[-1] if is_shared else 1.0
        reached = int(np.searchsorted(cumulative, spec.top_p * total, side="left")) + 1
        if reached > kept and not is_cut:
            return None
        cumulative = cumulative[: min(reached, kept)]
    elif not is_cut:
        return None
    total = cumulative[-1]
    target = min(number * total, np.nextafter(total, 0.0))
    return int(np.searchsorted(cumulative, target, side="right"))


def _logprobs(
    logits: torch.Tensor, rows: Sequence[int], specs: Sequence[SamplingSpec], tokens: Sequence[int]
) -> dict[int, SampledToken]:
    """Return per row its token with log-probabilities of the raw distribution."""
    if not rows:
        return {}
    result: dict[int, SampledToken] = {}
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        logp = torch.log_softmax(_take(logits, rows[part]), dim=-1)
        # A few more than asked for, so that equal ones at the cut are chosen by id.
        most = max(spec.num_top_logprobs or 0 for spec in specs[part])
        count = min(logits.shape[1], most + 8 if most else 0)
        top = logp.topk(count, dim=-1)
        top_values, top_ids = top.values.tolist(), top.indices.tolist()
        index = torch.tensor(tokens[part], device=logits.device)[:, None]
        own = logp.gather(-1, index).squeeze(-1).tolist()
        for at, (row, spec, token) in enumerate(zip(rows[part], specs[part], tokens[part], strict=True)):
            pairs = sorted(zip(top_ids[at], top_values[at], strict=True), key=lambda p: (-p[1], p[0]))
            result[row] = SampledToken(token, own[at], tuple(pairs[: spec.num_top_logprobs]))
    return result
