"""Composition root of the engine process: ``python -m server.engine_main --fd N``.

The only module that knows the scheduling, the model and the tiers. Started by ``server.engine.process``.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from server.engine.loop import EngineParts
from server.engine.options import EngineOptions
from server.engine.serve import serve

if TYPE_CHECKING:
    from kvcore.tiers.worth import Worth
    from server.engine.plan import StepRunner

__all__ = ["build", "main"]

log = logging.getLogger(__name__)

MEASURED_TOKENS = 64
BAR_CHARS = 30


def build(options: EngineOptions) -> EngineParts:
    """Load the model, open the tiers and put an engine together. Blocks; raises what loading raises.

    Also what ``LocalEngine`` wants: ``LocalEngine(lambda: build(options))``.
    """
    # Late, so that the process listens to its front end while torch is imported.
    from kvcore.clock import MonotonicClock
    from server.engine.cache_desk import CacheDesk
    from server.engine.scheduler import Scheduler
    from server.engine.tiering.build import open_tiers
    from server.engine.tiering.snapshots import Snapshots
    from server.engine.tiering.view import EngineTierView
    from server.worker.runner import ModelRunner

    runner = ModelRunner.build(options)
    clock = MonotonicClock()
    ready = runner.describe()
    scheduler = Scheduler(
        options,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        num_logits_slots=runner.num_logits_slots,
        clock=clock,
        fingerprint=ready.fingerprint,
    )
    object_format = runner.object_format
    tiering = open_tiers(
        options.tiers, scheduler.cache, object_format=object_format, clock=clock, on_progress=_show_progress
    )
    view = None
    if tiering is not None:
        scheduler.use_tiers(tiering)
        _measure_computing(runner, options, tiering.worth)
        root = options.tiers.snapshot_root
        snapshots = Snapshots(
            None if root is None else Path(root), scheduler.cache, tiering, object_format=object_format
        )
        view = EngineTierView(tiering, snapshots, options=options.tiers, object_format=object_format)
        scheduler.tier_view = view
    ready = msgspec.structs.replace(
        ready,
        policy=scheduler.cache.control.policy.name,
        num_tier_objects={} if view is None else {tier.tier: tier.num_objects for tier in view.reports()},
    )
    desk = CacheDesk(
        scheduler.cache,
        clock=clock,
        fingerprint=ready.fingerprint,
        epoch=secrets.randbits(63),
        largest_need=scheduler.largest_need,
        tiers=view,
        trial=scheduler.trial,
    )
    if tiering is not None:
        tiering.notes = desk.events
    return EngineParts(
        scheduler, runner, ready, clock, desk=desk, close=_nothing if tiering is None else tiering.close
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the engine process; return its exit status."""
    parser = argparse.ArgumentParser(prog="server.engine_main", description="The engine process of kvserve.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front end")
    return serve(parser.parse_args(argv).fd, build)


def _measure_computing(runner: StepRunner, options: EngineOptions, worth: Worth) -> None:
    """Compute a few tokens of nobody's, so that the first request's restore is weighed against something."""
    from server.engine.plan import SequencePlan, StepPlan

    count = min(MEASURED_TOKENS, options.max_batch_tokens, runner.num_blocks * runner.block_size)
    table = array("i", range(-(-count // runner.block_size)))
    for step_id in (-2, -1):  # the first one warms up
        part = SequencePlan(0, 0, [0] * count, table, num_prompt_tokens=count + 1, position=count)
        result = runner.run(StepPlan(step_id, [part]))
    worth.observe_recompute(count, 0, result.forward_s)


def _show_progress(done: int, total: int) -> None:
    """Say how far the disk's index is read: a bar for a person, a line at the end for a log."""
    if sys.stderr.isatty() and total:
        filled = BAR_CHARS * done // total
        end = "\n" if done == total else ""
        sys.stderr.write(f"\rdisk cache [{'#' * filled:<{BAR_CHARS}}] {done}/{total} objects{end}")
        sys.stderr.flush()
    elif done == total:
        log.info("disk cache: %d objects", total)


def _nothing() -> None:
    """Close nothing: there are no tiers."""


if __name__ == "__main__":
    sys.exit(main())
