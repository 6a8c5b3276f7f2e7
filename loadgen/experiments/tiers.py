"""Restore against recompute: the first token of a prompt whose prefix is in a tier and nowhere else.

::

    recompute   unknown prefix + question ──► first token       once per shape; the prefixes go to a snapshot
    restore     snapshot ──► tier;  again and again:  clear the device,  prefix + new question ──► first token
                                                      with --restore always: what it takes
                                                      with --restore auto: what it decides

The prompt is a prefix and a question of a few tokens that nobody has asked before: both ways compute the
question, so the times differ in nothing but where the prefix's KV comes from.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadgen.experiments.asking import Answer, Asker, draw_tokens
from loadgen.experiments.crossover import LengthTimes, measured_crossover, share_decided_right
from loadgen.experiments.figures import Figure
from loadgen.experiments.processes import ProcessFailed, serve
from loadgen.experiments.shapes import ModelShape
from loadgen.experiments.tier_places import TierPlace

__all__ = ["Prefixes", "TierSizes", "compute_prefixes", "measure_tier"]

QUESTION_TOKENS = 16
SNAPSHOT = "prefixes"
LEARNING_TOKENS = (64, 128, 256)
"""Unknown prompts that an ``auto`` server computes first, as any server in use has."""
NUM_SNAPSHOT_TRIES = 20

Outcome = tuple[list[Figure], dict[str, object]]


class TierSizes(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured, how often."""

    lengths: tuple[int, ...]
    """Of prefixes, in tokens, rising: whole blocks."""
    repeats: int
    """Of each restore, and of each recompute that is short enough."""
    once_from_tokens: int
    """Prefixes of this length and more are recomputed once."""
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What ``compute_prefixes`` left behind: a snapshot, and what computing took."""

    snapshots: Path
    recompute_s: dict[int, float]


def _prefix(shape: ModelShape, length: int, number: int = 0) -> list[int]:
    return draw_tokens(length, vocab_size=shape.vocab_size, seed=f"prefix {length} {number}")


def _question(shape: ModelShape, seed: str) -> list[int]:
    return draw_tokens(QUESTION_TOKENS, vocab_size=shape.vocab_size, seed=f"question {seed}")


def _arguments(sizes: TierSizes, snapshots: Path) -> list[str]:
    """Return what all servers of the experiment have in common: a device that holds everything."""
    num_blocks = (sum(sizes.lengths) + 2 * max(sizes.lengths)) // 16 + 16 * (len(sizes.lengths) + 4)
    return ["--num-blocks", str(num_blocks), "--snapshots", str(snapshots), "--session-prefetch", "off"]


def compute_prefixes(
    shape: ModelShape,
    model: Path,
    arguments: Sequence[str],
    *,
    sizes: TierSizes,
    snapshots: Path,
    log: Path,
    timeout_s: float,
) -> tuple[Prefixes, Outcome]:
    """Measure the recompute of every length, and save the last computed prefixes of all as a snapshot."""
    snapshots.mkdir(parents=True, exist_ok=True)
    times: dict[int, list[float]] = {}
    with (
        serve(str(model), [*arguments, *_arguments(sizes, snapshots)], log=log) as server,
        Asker(server.target, timeout_s=timeout_s) as asker,
    ):
        asker.ask(_question(shape, "warm-up"))
        for length in sizes.lengths:
            count = 1 if length >= sizes.once_from_tokens else sizes.repeats
            for number in reversed(range(count)):
                prompt = _prefix(shape, length, number) + _question(shape, f"{length} {number}")
                answer = asker.ask(prompt)
                if answer.cached_tokens:
                    raise ProcessFailed(f"{answer.cached_tokens} tokens of an unknown prompt were cached")
                times.setdefault(length, []).append(answer.first_token_s)
                if number:  # only the last is kept
                    asker.cache.evict(prompt[:16], in_use="skip", tiers=False)
        saved = asker.cache.save_snapshot(SNAPSHOT).wait()
    recompute_s = {length: statistics.median(found) for length, found in times.items()}
    details: dict[str, object] = {
        "first_token_s": {str(length): found for length, found in times.items()},
        "snapshot_objects": saved.done_objects,
        "snapshot_bytes": saved.done_bytes,
    }
    return Prefixes(snapshots, recompute_s), ([], details)


def measure_tier(
    shape: ModelShape,
    model: Path,
    arguments: Sequence[str],
    place: TierPlace,
    prefixes: Prefixes,
    *,
    sizes: TierSizes,
    folder: Path,
    timeout_s: float,
) -> Outcome:
    """Return what restoring each length from one tier takes, and how well ``auto`` decides about it."""
    common = [*arguments, *_arguments(sizes, prefixes.snapshots)]
    log = folder / f"server-{shape.name}-{place.tier}-{place.codec}.log"
    with place.open(folder / shape.name) as of_tier:
        with (
            serve(str(model), [*common, *of_tier, "--restore", "always"], log=log) as server,
            Asker(server.target, timeout_s=timeout_s) as asker,
        ):
            _fill(asker, place, shape, sizes)
            restored = _ask_all(asker, shape, sizes, "always", is_restored=True)
        with (
            serve(str(model), [*common, *of_tier, "--restore", "auto"], log=log) as server,
            Asker(server.target, timeout_s=timeout_s) as asker,
        ):
            _fill(asker, place, shape, sizes)
            for length in LEARNING_TOKENS:
                asker.ask(draw_tokens(length, vocab_size=shape.vocab_size, seed=f"learn {length}"))
            decided = _ask_all(asker, shape, sizes, "auto", is_restored=False)
            stats = [tier for tier in asker.cache.stats().tiers if tier.tier == place.tier]
    rows = [
        LengthTimes(
            num_tokens=length,
            restore_s=_median(restored[length]),
            recompute_s=prefixes.recompute_s[length],
            decisions=tuple(answer.decision for answer in decided[length] if answer.decision is not None),
        )
        for length in sizes.lengths
    ]
    figures = [_restore_figure(shape, place, row, restored[row.num_tokens]) for row in rows]
    figures.append(_crossover_figure(shape, place, rows, decided=float(stats[0].crossover_tokens)))
    figures.append(_decisions_figure(shape, place, rows, decided))
    details: dict[str, object] = {
        "rows": [
            {"restored": restored[row.num_tokens], "auto": decided[row.num_tokens], "row": row}
            for row in rows
        ],
        "tier": stats[0],
    }
    return figures, details


def _fill(asker: Asker, place: TierPlace, shape: ModelShape, sizes: TierSizes) -> None:
    """Bring the snapshot into the tier; again, while the tier is too busy to take everything."""
    for _ in range(NUM_SNAPSHOT_TRIES):
        if not asker.cache.restore_snapshot(SNAPSHOT).wait().skipped_objects:
            break
    for length in sizes.lengths:
        asker.wait_for_tier(place.tier, _prefix(shape, length))


def _ask_all(
    asker: Asker, shape: ModelShape, sizes: TierSizes, mode: str, *, is_restored: bool
) -> dict[int, list[Answer]]:
    """Ask about every prefix, with nothing on the device; say what came, by length."""
    answers: dict[int, list[Answer]] = {}
    for number in range(sizes.repeats):
        for length in sizes.lengths:
            asker.clear_device()
            answer = asker.ask(_prefix(shape, length) + _question(shape, f"{mode} {length} {number}"))
            if answer.cached_tokens or (is_restored and answer.restored_tokens != length):
                raise ProcessFailed(
                    f"of a prefix of {length} tokens {answer.restored_tokens} were restored, "
                    f"{answer.cached_tokens} were on the device"
                )
            answers.setdefault(length, []).append(answer)
    return answers


def _median(answers: Sequence[Answer]) -> float:
    return statistics.median(answer.first_token_s for answer in answers)


def _restore_figure(
    shape: ModelShape, place: TierPlace, row: LengthTimes, answers: Sequence[Answer]
) -> Figure:
    fetch_s = statistics.median(answer.fetch_s or 0.0 for answer in answers)
    return Figure(
        experiment=f"restore, {place.name}",
        shape=shape.name,
        name=f"time to first token, prefix of {row.num_tokens}",
        value=row.recompute_s / row.restore_s,
        unit="x",
        ours=1000 * row.restore_s,
        other=1000 * row.recompute_s,
        other_name="ms recomputed",
        note=f"'ours' in ms, {1000 * fetch_s:.1f} of them the fetch; median of {len(answers)}",
    )


def _crossover_figure(
    shape: ModelShape, place: TierPlace, rows: Sequence[LengthTimes], *, decided: float
) -> Figure:
    return Figure(
        experiment=f"restore, {place.name}",
        shape=shape.name,
        name="crossover, measured",
        value=measured_crossover(rows),
        unit="tokens",
        other=decided,
        other_name="tokens as the server has it",
        note=f"0: below {rows[0].num_tokens} tokens; -1: above {rows[-1].num_tokens}",
    )


def _decisions_figure(
    shape: ModelShape, place: TierPlace, rows: Sequence[LengthTimes], decided: dict[int, list[Answer]]
) -> Figure:
    best_s = sum(min(row.restore_s, row.recompute_s) for row in rows)
    return Figure(
        experiment=f"restore, {place.name}",
        shape=shape.name,
        name="share of decisions for the faster way",
        value=share_decided_right(rows),
        unit="",
        ours=1000 * sum(_median(answers) for answers in decided.values()),
        other=1000 * best_s,
        other_name="ms, the better way each time",
        note=f"'ours' in ms: one prompt of each length as decided; {len(rows)} lengths",
    )
