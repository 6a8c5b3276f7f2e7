"""The first request after a restart, whose system prompt an earlier server has left on disk.

Each time is that of the very first request of a server that has just become ready. Files are dropped from the
system's page cache before a restart, where the system can do that: what is read comes from the disk.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from loadgen.experiments.asking import Answer, Asker, draw_tokens
from loadgen.experiments.figures import Figure
from loadgen.experiments.processes import ProcessFailed, serve
from loadgen.experiments.shapes import ModelShape
from loadgen.experiments.tier_places import drop_from_page_cache

__all__ = ["measure_restart"]

TARGET_SPEEDUP = {"tinyllama-1.1b": 5.0}
QUESTION_TOKENS = 16


def measure_restart(
    shape: ModelShape,
    model: Path,
    arguments: Sequence[str],
    *,
    prefix_tokens: int,
    repeats: int,
    folder: Path,
    timeout_s: float,
) -> tuple[list[Figure], dict[str, object]]:
    """Return how much faster a first request is after a restart: another question, and the same one."""
    cache = folder / "restart-cache"

    def ask_first(number: int, question: str) -> Answer:
        prompt = [
            *draw_tokens(prefix_tokens, vocab_size=shape.vocab_size, seed=f"system {number}"),
            *draw_tokens(QUESTION_TOKENS, vocab_size=shape.vocab_size, seed=f"question {question}"),
        ]
        settings = ["--disk-cache", str(cache), "--session-prefetch", "off"]
        with (
            serve(str(model), [*arguments, *settings], log=folder / f"server-{shape.name}.log") as server,
            Asker(server.target, timeout_s=timeout_s) as asker,
        ):
            return asker.ask(prompt)

    cold: list[Answer] = []
    other_question: list[Answer] = []
    same_question: list[Answer] = []
    for number in range(repeats):
        shutil.rmtree(cache, ignore_errors=True)
        cold.append(ask_first(number, "one"))
        for question, answers in (("two", other_question), ("one", same_question)):
            drop_from_page_cache(cache)
            answers.append(ask_first(number, question))
    shutil.rmtree(cache, ignore_errors=True)
    if any(answer.restored_tokens + answer.cached_tokens for answer in cold):
        raise ProcessFailed("a cold server had something of the prompt")
    figures = [
        _figure(shape, "another question", cold, other_question),
        _figure(shape, "the same question", cold, same_question),
    ]
    return figures, {"cold": cold, "another question": other_question, "the same question": same_question}


def _figure(shape: ModelShape, name: str, cold: Sequence[Answer], warm: Sequence[Answer]) -> Figure:
    cold_s = statistics.median(answer.first_token_s for answer in cold)
    warm_s = statistics.median(answer.first_token_s for answer in warm)
    computed, prompt_tokens = max((answer.computed_tokens, answer.prompt_tokens) for answer in warm)
    return Figure(
        experiment="restart, disk",
        shape=shape.name,
        name=f"first token of the first request, {name}",
        value=cold_s / warm_s,
        unit="x",
        target=TARGET_SPEEDUP.get(shape.name),
        ours=1000 * warm_s,
        other=1000 * cold_s,
        other_name="ms cold",
        note=f"'ours' in ms; {computed} of {prompt_tokens} prompt tokens were computed again",
    )
