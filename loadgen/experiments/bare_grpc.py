"""``python -m loadgen.experiments.bare_grpc``: requests by second of processor time that grpcio itself does.

A server process whose methods return a constant, on the event loop that our server runs on, and one client:
the floor under every server in Python. With ``--core`` the server has one core and the client the others, and
requests by second of the clock are said too. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Coroutine
from typing import Any

import grpc
from grpc import aio

__all__ = ["main"]

REQUEST, ANSWER = b"x" * 160, b"y" * 120
IN_FLIGHT = {"unary": 32, "stream": 64}
"""As many as are sent to our server."""


async def serve() -> None:
    """Serve until the input ends; say the port, and for each line the processor time used so far."""

    async def unary(_request: bytes, _context: Any) -> bytes:
        return ANSWER

    async def stream(requests: Any, _context: Any) -> Any:
        async for _ in requests:
            yield ANSWER

    server = aio.server()
    handlers: dict[str, Any] = {
        "unary": grpc.unary_unary_rpc_method_handler(unary),
        "stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(time.process_time(), flush=True)
    await server.stop(None)


async def ask_unary(channel: aio.Channel, seconds: float) -> int:
    """Return how many calls were answered."""
    call: Any = channel.unary_unary("/bare/unary")
    end, count = time.perf_counter() + seconds, 0

    async def one_after_another() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await call(REQUEST)
            count += 1

    await asyncio.gather(*(one_after_another() for _ in range(IN_FLIGHT["unary"])))
    return count


async def ask_stream(channel: aio.Channel, seconds: float) -> int:
    """Return how many messages of one stream were answered."""
    call: Any = channel.stream_stream("/bare/stream")()
    room = asyncio.Semaphore(IN_FLIGHT["stream"])
    end, count = time.perf_counter() + seconds, 0

    async def write() -> None:
        while time.perf_counter() < end:
            await room.acquire()
            await call.write(REQUEST)
        await call.done_writing()

    writing = asyncio.create_task(write())
    async for _ in call:
        count += 1
        room.release()
    await writing
    return count


async def measure(seconds: float, core: int | None) -> dict[str, float]:
    """Return requests by second of the server's processor time; with ``core`` by the clock too."""
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loadgen.experiments.bare_grpc",
        "--serve",
        *([] if core is None else ["--core", str(core)]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    async def say() -> str:
        assert server.stdout is not None
        return (await server.stdout.readline()).decode()

    rates: dict[str, float] = {}
    async with aio.insecure_channel(f"127.0.0.1:{int(await say())}") as channel:
        for name, ask in (("unary", ask_unary), ("stream", ask_stream)):
            await ask(channel, 0.5)
            used = []
            count = 0
            started_s = time.perf_counter()
            for is_after in (False, True):
                if is_after:
                    count = await ask(channel, seconds)
                    if core is not None:
                        rates[f"{name}_by_clock"] = count / (time.perf_counter() - started_s)
                server.stdin.write(b"\n")
                used.append(float(await say()))
            rates[name] = count / (used[1] - used[0])
    server.stdin.close()
    await server.wait()
    return rates


def main(arguments: list[str] | None = None) -> int:
    """Measure, or be the server of a measurement."""
    parser = argparse.ArgumentParser(description="What grpcio itself can do.")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--core", type=int, help="the server's, which the client keeps off")
    options = parser.parse_args(arguments)
    if options.core is not None:
        cores = {options.core} if options.serve else os.sched_getaffinity(0) - {options.core}
        os.sched_setaffinity(0, cores)
    if options.serve:
        _run_as_server(serve())
    else:
        print(json.dumps(asyncio.run(measure(options.seconds, options.core))))
    return 0


def _run_as_server(main: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        asyncio.run(main)
        return
    uvloop.run(main)


if __name__ == "__main__":
    sys.exit(main())
