"""The equivalence probe: before a model serves, inputs computed together must give what each gives alone.

A family whose forward lets padding or neighbours through (block-sparse attention, heads that look at
pad tokens) is then computed in a way that does not: equal lengths only, or one at a time. One that does
not even agree with itself is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from server.predict.errors import InputError
from server.predict.messages import TextItem
from server.worker.errors import ModelLoadError
from server.worker.predict.executors import Executor, Floats, Grouping, TransformersExecutor
from server.worker.predict.tokenizer import EncodedText, TextTokenizer

__all__ = ["agree", "choose_grouping", "make_probe", "run_alone"]

_SHORT_TOKENS, _LONG_TOKENS = 4, 9
_TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.02}


def make_probe(tokenizer: TextTokenizer, *, num_ids: int, max_length: int) -> list[EncodedText]:
    """Return a short input and a longer one. Raises ``ModelLoadError``."""
    draw = np.random.default_rng(0)
    probe: list[EncodedText] = []
    for num_tokens in (_SHORT_TOKENS, _LONG_TOKENS):
        ids = draw.integers(num_ids, size=min(num_tokens, max_length)).tolist()
        try:
            (text,) = tokenizer.encode([TextItem(tokenizer.decode(ids) or "a")], truncate=True)
        except InputError:
            raise ModelLoadError("the tokenizer makes no tokens of a text") from None
        probe.append(text)
    if any(int(text.ids.max()) >= num_ids for text in probe):
        raise ModelLoadError("the tokenizer has tokens that the model does not know")
    return sorted(probe, key=len)


def run_alone(executor: Executor, probe: Sequence[EncodedText]) -> list[Floats]:
    """Return what each input gives by itself. Raises ``ModelLoadError`` if that fails, or is no number."""
    try:
        alone = [executor.run([text])[0] for text in probe]
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"the model fails on a text ({type(error).__name__})") from error
    if not all(np.isfinite(row).all() for row in alone):
        raise ModelLoadError("the model gives numbers that are none")
    return alone


def choose_grouping(
    executor: TransformersExecutor,
    probe: Sequence[EncodedText],
    alone: Sequence[Floats],
    *,
    dtype: str,
    notes: list[str],
) -> None:
    """Set how the executor groups. ``alone``: what it gave for each by itself.

    Raises ``ModelLoadError`` if nothing is right.
    """
    if agree(executor, probe, alone, dtype=dtype):
        return
    # Two of equal lengths, by cutting inside: what the tokenizer put at both ends stays there.
    shortest = len(probe[0])
    probe = [*probe, _cut(probe[-1], shortest), _cut(probe[-1], shortest)]
    executor.grouping = Grouping.ONE_BY_ONE
    alone = run_alone(executor, probe)
    for grouping in (Grouping.EQUAL_LENGTHS, Grouping.ONE_BY_ONE):
        executor.grouping = grouping
        if agree(executor, probe, alone, dtype=dtype):
            how = grouping.name.lower().replace("_", " ")
            notes.append(f"padded inputs are not computed rightly by this family; computed {how}")
            return
    raise ModelLoadError("the model gives another answer each time to the same input")


def _cut(text: EncodedText, num_tokens: int) -> EncodedText:
    keep = np.r_[: num_tokens - num_tokens // 2, len(text) - num_tokens // 2 : len(text)]
    return EncodedText(text.ids[keep], None if text.type_ids is None else text.type_ids[keep])


def agree(
    executor: Executor, probe: Sequence[EncodedText], expected: Sequence[Floats], *, dtype: str
) -> bool:
    """Say whether a batch of the probe gives what is expected, within the precision's tolerance."""
    try:
        found = executor.run(probe)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    scale = max(1.0, *(float(np.abs(row).max(initial=0.0)) for row in expected))
    tolerance = _TOLERANCES[dtype] * scale
    return all(
        a.shape == b.shape and np.abs(a - b).max(initial=0.0) <= tolerance
        for a, b in zip(found, expected, strict=True)
    )
