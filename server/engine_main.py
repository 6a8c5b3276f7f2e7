"""Composition root of the engine process: ``python -m server.engine_main --fd N``.

The only module that knows both the scheduling and the model. Started by ``server.engine.process``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from server.engine.loop import EngineParts
from server.engine.options import EngineOptions
from server.engine.serve import serve

__all__ = ["build", "main"]


def build(options: EngineOptions) -> EngineParts:
    """Load the model and put an engine together. Blocks; raises what loading raises.

    Also what ``LocalEngine`` wants: ``LocalEngine(lambda: build(options))``.
    """
    # Late, so that the process listens to its front end while torch is imported.
    from kvcore.clock import MonotonicClock
    from server.engine.scheduler import Scheduler
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
    return EngineParts(scheduler, runner, ready, clock)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the engine process; return its exit status."""
    parser = argparse.ArgumentParser(prog="server.engine_main", description="The engine process of kvserve.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front end")
    return serve(parser.parse_args(argv).fd, build)


if __name__ == "__main__":
    sys.exit(main())
