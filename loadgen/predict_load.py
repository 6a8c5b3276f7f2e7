"""``python -m loadgen.predict_load``: predict calls at a server, as many at a time or as often as is said.

One process of many: prepared messages over the generated stubs, so that little of the time is the client's.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import msgspec
from grpc import aio

from kvserve.v1 import predict_pb2 as pb
from kvserve.v1 import predict_pb2_grpc
from loadgen.summary import percentile

__all__ = ["LoadReport", "main"]

NOISE = 0.02
WORDS = ("river", "mountain", "engine", "letter", "garden", "window", "number", "signal", "market", "winter")


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the calls. Latencies in seconds, from sending to the whole answer; of good calls."""

    calls: int
    failed: int
    hits: int
    """Inputs for which something was reused."""
    elapsed_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float


def text_requests(model: str, *, words: int, count: int, seed: int) -> list[pb.PredictRequest]:
    """Return requests of one text each, all different."""
    rng = random.Random(seed)
    return [
        pb.PredictRequest(
            model=model,
            texts=pb.TextInputs(items=[pb.TextInput(text=" ".join(rng.choices(WORDS, k=words)))]),
        )
        for _ in range(count)
    ]


def feature_requests(
    model: str, *, features: int, keys: int, rows: int, count: int, seed: int
) -> list[pb.PredictRequest]:
    """Return requests of ``rows`` rows each: of ``keys`` ones, whose features after the 24th move a little.

    So that reuse stays within its budget: with ends of their own for every row it would rightly be stopped.
    """
    rng = random.Random(seed)
    known = [[rng.gauss(0, 1) for _ in range(features)] for _ in range(keys)]

    def moved(row: list[float]) -> list[float]:
        return row[:24] + [value + rng.gauss(0, NOISE) for value in row[24:]]

    return [
        pb.PredictRequest(
            model=model,
            features=pb.FeatureRows(
                rows=[pb.FeatureRow(values=moved(rng.choice(known))) for _ in range(rows)]
            ),
        )
        for _ in range(count)
    ]


class Load:
    """Sends prepared requests in turn and notes how long each took."""

    def __init__(self, stub: Any, requests: list[pb.PredictRequest]) -> None:
        self._stub = stub
        self._requests = requests
        self._next = 0
        self.latencies_s: list[float] = []
        self.failed = 0
        self.hits = 0

    async def send_one(self) -> None:
        """Send the next request and wait for its answer."""
        request = self._requests[self._next % len(self._requests)]
        self._next += 1
        started = time.perf_counter()
        try:
            response = await self._stub.Predict(request, timeout=60.0)
        except grpc.RpcError:
            self.failed += 1
            return
        self.latencies_s.append(time.perf_counter() - started)
        self.hits += sum(prediction.cache_hit for prediction in response.predictions)

    async def closed(self, concurrency: int, seconds: float) -> None:
        """Keep so many calls open."""
        end = time.perf_counter() + seconds

        async def one_after_another() -> None:
            while time.perf_counter() < end:
                await self.send_one()

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))

    async def streamed(self, in_flight: int, seconds: float) -> None:
        """Keep so many requests open on one call of StreamPredict."""
        end = time.perf_counter() + seconds
        room = asyncio.Semaphore(in_flight)
        sent_s: dict[str, float] = {}
        call = self._stub.StreamPredict()

        async def write() -> None:
            request = pb.PredictRequest()
            while time.perf_counter() < end:
                await room.acquire()
                request.CopyFrom(self._requests[self._next % len(self._requests)])
                request.request_id = str(self._next)
                self._next += 1
                sent_s[request.request_id] = time.perf_counter()
                await call.write(request)
            await call.done_writing()

        writing = asyncio.create_task(write())
        async for answer in call:
            started = sent_s.pop(answer.request_id)
            room.release()
            if answer.HasField("error"):
                self.failed += 1
                continue
            self.latencies_s.append(time.perf_counter() - started)
            self.hits += sum(prediction.cache_hit for prediction in answer.response.predictions)
        await writing

    async def open(self, starts: AsyncIterator[int]) -> None:
        """Send as many as each start says, without waiting for answers."""
        async with asyncio.TaskGroup() as group:
            async for count in starts:
                for _ in range(count):
                    group.create_task(self.send_one())


async def steady(rate_per_s: float, seconds: float, seed: int) -> AsyncIterator[int]:
    """Yield 1 at Poisson times."""
    rng = random.Random(seed)
    begin = time.perf_counter()
    due = 0.0
    while (due := due + rng.expovariate(rate_per_s)) < seconds:
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        yield 1


async def bursts(size: int, every_s: float, seconds: float) -> AsyncIterator[int]:
    """Yield ``size`` once in ``every_s``."""
    begin = time.perf_counter()
    for index in range(int(seconds / every_s)):
        await asyncio.sleep(max(0.0, begin + index * every_s - time.perf_counter()))
        yield size


async def run(options: argparse.Namespace) -> LoadReport:
    """Warm up for a moment, then load."""
    make: Callable[[int], list[pb.PredictRequest]]
    if options.features:
        make = lambda seed: feature_requests(  # noqa: E731
            options.model,
            features=options.features,
            keys=options.keys,
            rows=options.rows,
            count=max(100, 5000 // options.rows),
            seed=seed,
        )
    else:
        make = lambda seed: text_requests(options.model, words=options.words, count=5000, seed=seed)  # noqa: E731
    async with aio.insecure_channel(options.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = predict_pb2_grpc.PredictServiceStub(channel)
        await Load(stub, make(options.seed + 1)).closed(4, options.warm_up)
        load = Load(stub, make(options.seed))
        started = time.perf_counter()
        if options.rate:
            await load.open(steady(options.rate, options.seconds, options.seed))
        elif options.burst:
            await load.open(bursts(options.burst, options.every, options.seconds))
        elif options.stream:
            await load.streamed(options.concurrency, options.seconds)
        else:
            await load.closed(options.concurrency, options.seconds)
        elapsed_s = time.perf_counter() - started
    ordered = sorted(load.latencies_s) or [0.0]
    return LoadReport(
        calls=len(load.latencies_s),
        failed=load.failed,
        hits=load.hits,
        elapsed_s=elapsed_s,
        p50_s=percentile(ordered, 0.5),
        p95_s=percentile(ordered, 0.95),
        p99_s=percentile(ordered, 0.99),
        max_s=ordered[-1],
    )


def main(arguments: list[str] | None = None) -> int:
    """Load a server; print the report as JSON."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="loadgen.predict_load", description=description)
    parser.add_argument("--target", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", type=int, default=14, help="words of a text")
    parser.add_argument("--features", type=int, default=0, help="rows of so many features instead of texts")
    parser.add_argument("--keys", type=int, default=1000, help="different beginnings of rows")
    parser.add_argument("--rows", type=int, default=1, help="rows of a call")
    parser.add_argument("--concurrency", type=int, default=32, help="calls open at a time")
    parser.add_argument("--stream", action="store_true", help="requests of one stream instead of calls")
    parser.add_argument("--rate", type=float, default=0.0, help="calls a second at random times, instead")
    parser.add_argument("--burst", type=int, default=0, help="so many calls at once, instead")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from burst to burst")
    report = asyncio.run(run(parser.parse_args(arguments)))
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
