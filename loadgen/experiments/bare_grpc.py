"""``python -m loadgen.experiments.bare_grpc``: requests by second of processor time that grpcio itself does.

A server process whose methods return a constant, and one client: the floor under every server in Python.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

import grpc
from grpc import aio

__all__ = ["main"]

REQUEST, ANSWER = b"x" * 160, b"y" * 120
IN_FLIGHT = 32


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

    await asyncio.gather(*(one_after_another() for _ in range(IN_FLIGHT)))
    return count


async def ask_stream(channel: aio.Channel, seconds: float) -> int:
    """Return how many messages of one stream were answered."""
    call: Any = channel.stream_stream("/bare/stream")()
    room = asyncio.Semaphore(IN_FLIGHT)
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


async def measure(seconds: float) -> dict[str, float]:
    """Return requests by second of the server's processor time."""
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loadgen.experiments.bare_grpc",
        "--serve",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    async def say() -> str:
        assert server.stdout is not None
        return (await server.stdout.readline()).decode()

    rates = {}
    async with aio.insecure_channel(f"127.0.0.1:{int(await say())}") as channel:
        for name, ask in (("unary", ask_unary), ("stream", ask_stream)):
            await ask(channel, 0.5)
            used = []
            count = 0
            for is_after in (False, True):
                if is_after:
                    count = await ask(channel, seconds)
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
    options = parser.parse_args(arguments)
    if options.serve:
        asyncio.run(serve())
    else:
        print(json.dumps(asyncio.run(measure(options.seconds))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
