"""The front end alone, on an engine that has no model: what streaming costs without anything behind it.

    python -m server.bench_front_end --core 0

Prints the port once it listens. Then answers every line on standard input with one JSON object (processor
seconds of this process so far); ends when standard input does. Not for serving.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time

from prometheus_client import CollectorRegistry

from server.engine.fake import FakeEngine, fake_ready
from server.rpc.auth import Authenticator
from server.rpc.front_end import FrontEnd, FrontEndOptions
from server.rpc.listener import ListenOptions
from server.rpc.model_files import load_model_files
from server.rpc.tokenizer import ModelTokenizer
from server.telemetry.metrics import FrontEndMetrics

__all__ = ["main"]


async def serve() -> None:
    """Serve until standard input ends."""
    engine = FakeEngine(ready=fake_ready(vocab_size=3072))
    await engine.start()
    tokenizer = ModelTokenizer(await asyncio.to_thread(load_model_files, "builtin"))
    front_end = FrontEnd(
        engine,
        tokenizer,
        FrontEndOptions(model_name="fake", listen=ListenOptions(port=0)),
        authenticator=Authenticator(),
        observer=FrontEndMetrics(CollectorRegistry(), model_name="fake"),
    )
    print(await front_end.start(), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps({"cpu_s": time.process_time()}), flush=True)
    await front_end.shut_down(grace_s=0.0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="The front end on an engine without a model.")
    parser.add_argument(
        "--core", type=int, default=None, help="run on this core alone, where that can be said"
    )
    options = parser.parse_args(arguments)
    if options.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    try:
        import uvloop
    except ImportError:  # not on every platform
        asyncio.run(serve())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
