"""Prefetch: what of a restore hides behind the queue, and what fetching ahead for sessions wastes.

::

    sessions ask once, one after the other ──► their prefixes go to disk
    again and again:  clear the device ──► all ask again at once, more than run at a time: most of them wait
"""

from __future__ import annotations

import asyncio
import math
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvserve import PrefetchStats
from loadgen.arrivals import ClosedLoop
from loadgen.experiments.asking import Asker, draw_tokens
from loadgen.experiments.figures import Figure
from loadgen.experiments.processes import ProcessFailed, serve
from loadgen.experiments.session_prefetch import measure_prefetch as replay_prefetch
from loadgen.experiments.shapes import ModelShape
from loadgen.runner import run_load
from loadgen.workloads import Conversation, Turn

__all__ = ["PrefetchSizes", "measure_prefetch", "replay_sessions"]

TARGET_HIDDEN = 0.9
TARGET_WASTE = 0.2
BLOCK_TOKENS = 16
QUESTION_TOKENS = 16


class PrefetchSizes(msgspec.Struct, frozen=True, kw_only=True):
    """How many sessions come back at once, and how often."""

    sessions: int
    running: int
    """At a time; the others wait."""
    prefix_tokens: int
    new_tokens: int
    rounds: int
    device_shares: tuple[float, ...] = (1.25, 0.5)
    """Sizes of the device, as shares of the blocks of all sessions."""


class _Round(msgspec.Struct, frozen=True, kw_only=True):
    """What one round added to the server's counters."""

    fetched_blocks: int
    in_time_blocks: int
    late_blocks: int
    wasted_blocks: int
    restore_s: float
    hidden_s: float
    restored_tokens: int
    first_token_s: list[float]


def measure_prefetch(
    shape: ModelShape,
    model: Path,
    arguments: Sequence[str],
    *,
    sizes: PrefetchSizes,
    folder: Path,
    timeout_s: float,
) -> tuple[list[Figure], dict[str, object]]:
    """Return the share of restore time that requests spent waiting in the queue anyway, by device size."""
    cache = folder / f"prefetch-{shape.name}"
    figures: list[Figure] = []
    details: dict[str, object] = {}
    for share in sizes.device_shares:
        rounds = _ask_in_rounds(
            shape, model, arguments, sizes=sizes, share=share, cache=cache, timeout_s=timeout_s
        )
        figures += _figures(shape, sizes, share, rounds)
        details[f"device {share:.0%}"] = rounds
    shutil.rmtree(cache)
    return figures, details


def _ask_in_rounds(
    shape: ModelShape,
    model: Path,
    arguments: Sequence[str],
    *,
    sizes: PrefetchSizes,
    share: float,
    cache: Path,
    timeout_s: float,
) -> list[_Round]:
    per_session = math.ceil((sizes.prefix_tokens + QUESTION_TOKENS + sizes.new_tokens) / BLOCK_TOKENS) + 1
    # What runs must fit, too.
    num_blocks = max(int(share * sizes.sessions), 2 * sizes.running) * per_session
    settings = [
        *("--disk-cache", str(cache), "--restore", "always"),
        *("--num-blocks", str(num_blocks), "--max-running", str(sizes.running), "--session-prefetch", "off"),
    ]
    rounds: list[_Round] = []
    with (
        serve(str(model), [*arguments, *settings], log=cache.with_suffix(".log")) as server,
        Asker(server.target, timeout_s=timeout_s) as asker,
    ):
        prefixes = [
            draw_tokens(sizes.prefix_tokens, vocab_size=shape.vocab_size, seed=f"session {number}")
            for number in range(sizes.sessions)
        ]
        for prefix in prefixes:
            asker.ask(prefix)
        for prefix in prefixes:
            asker.store_in_tier("disk", prefix)
        for number in range(sizes.rounds):
            asker.clear_device()
            before = asker.cache.stats()
            first_token_s = _ask_at_once(server.target, shape, prefixes, sizes, number, timeout_s)
            after = asker.cache.stats()
            restored = after.total.restored_tokens - before.total.restored_tokens
            rounds.append(_difference(before.prefetch, after.prefetch, restored, first_token_s))
    return rounds


def _ask_at_once(
    target: str,
    shape: ModelShape,
    prefixes: Sequence[list[int]],
    sizes: PrefetchSizes,
    number: int,
    timeout_s: float,
) -> list[float]:
    """Ask a new question about every prefix, all at the same time; return the times to the first tokens."""
    conversations = [
        Conversation(
            (
                Turn(
                    (
                        *prefix,
                        *draw_tokens(
                            QUESTION_TOKENS, vocab_size=shape.vocab_size, seed=f"round {number} {index}"
                        ),
                    ),
                    sizes.new_tokens,
                ),
            ),
            index,
        )
        for index, prefix in enumerate(prefixes)
    ]
    records = asyncio.run(
        run_load(target, conversations, ClosedLoop(len(conversations)), timeout_s=timeout_s)
    )
    for record in records:
        if record.error is not None:
            raise ProcessFailed(f"a session's request failed: {record.error}")
    return [record.first_token_s for record in records if record.first_token_s is not None]


def _difference(
    before: PrefetchStats, after: PrefetchStats, restored_tokens: int, first_token_s: list[float]
) -> _Round:
    return _Round(
        fetched_blocks=after.waiting.fetched_blocks - before.waiting.fetched_blocks,
        in_time_blocks=after.waiting.used_blocks - before.waiting.used_blocks,
        late_blocks=after.waiting.late_blocks - before.waiting.late_blocks,
        wasted_blocks=after.waiting.wasted_blocks - before.waiting.wasted_blocks,
        restore_s=after.restore_s - before.restore_s,
        hidden_s=after.hidden_s - before.hidden_s,
        restored_tokens=restored_tokens,
        first_token_s=first_token_s,
    )


def _figures(shape: ModelShape, sizes: PrefetchSizes, share: float, rounds: Sequence[_Round]) -> list[Figure]:
    experiment = f"prefetch for waiting requests, device holds {share:.0%}"
    restore_s = sum(each.restore_s for each in rounds)
    hidden_s = sum(each.hidden_s for each in rounds)
    fetched = sum(each.fetched_blocks for each in rounds)
    if restore_s <= 0 or not fetched:
        raise ProcessFailed("nothing was restored")
    late = sum(each.late_blocks for each in rounds)
    wasted = sum(each.wasted_blocks for each in rounds)
    in_time = sum(each.in_time_blocks for each in rounds)
    first_s = statistics.median(each_s for each in rounds for each_s in each.first_token_s)
    setting = f"{sizes.sessions} sessions of {sizes.prefix_tokens} tokens at once, {sizes.running} run"
    return [
        Figure(
            experiment=experiment,
            shape=shape.name,
            name="share of restore time hidden by the queue",
            value=hidden_s / restore_s,
            unit="",
            target=TARGET_HIDDEN,
            ours=1000 * hidden_s,
            other=1000 * restore_s,
            other_name="ms of restores, all requests together",
            note=f"'ours' in ms; {setting}; {len(rounds)} rounds",
        ),
        Figure(
            experiment=experiment,
            shape=shape.name,
            name="blocks in time, of those fetched",
            value=in_time / fetched,
            unit="",
            ours=float(in_time),
            other=float(fetched),
            other_name="blocks fetched",
            note=f"{late} late, {wasted} wasted; median first token {1000 * first_s:.0f} ms, queue included",
        ),
    ]


class _Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """One replay of a half of the sessions."""

    half: str
    seed: int
    fetched: int
    in_time: int
    late: int
    wasted: int
    restore_s_without: float
    restore_s_with: float
    hidden: float
    waste: float


def replay_sessions(folder: Path, *, seeds: int) -> tuple[list[Figure], dict[str, object]]:
    """Return what fetching ahead wastes and hides on recorded sessions, whose think times are real."""
    if not any(folder.glob("*.json")):
        raise ProcessFailed("there are no recorded sessions in that folder")
    try:
        rows = replay_prefetch(str(folder), "--seeds", str(seeds))
    except subprocess.CalledProcessError as failure:
        raise ProcessFailed(f"the replay failed: {failure.stderr.strip()[-500:]}") from failure
    except subprocess.TimeoutExpired as failure:
        raise ProcessFailed(f"the replay took over {failure.timeout:.0f} s") from failure
    replayed = [msgspec.convert(row, _Replayed) for row in rows]
    figures = []
    for half in dict.fromkeys(each.half for each in replayed):
        runs = [each for each in replayed if each.half == half]
        fetched, wasted = sum(each.fetched for each in runs), sum(each.wasted for each in runs)
        figures.append(
            Figure(
                experiment="prefetch for sessions, replay",
                shape="",
                name=f"share of prefetches wasted, half {half}",
                value=wasted / fetched if fetched else 0.0,  # pooled: some runs have one or two
                unit="",
                target=TARGET_WASTE if fetched else None,
                lower_is_better=True,
                ours=float(wasted),
                other=float(fetched),
                other_name="prefetches",
                note=f"{statistics.mean(each.hidden for each in runs):.0%} of restore time hidden; "
                f"{sum(each.in_time for each in runs)} in time, {sum(each.late for each in runs)} late; "
                f"{len(runs)} runs",
            )
        )
    return figures, {"runs": replayed}
