"""One ``StreamPredict`` call: requests in, answers out as each is ready.

::

    reader --> a task for each request --> ready answers --> writer
       ^                                                        |
       `-- waits while as much is on its way as may be <--------'

What was read and not yet written is bounded, in requests and in inputs: a client that sends faster than
models answer, or reads more slowly, fills its own transport window and nothing here. A request that fails is
answered by its error. Bytes that are no message end the call: nobody knows whose answer that would be.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from grpc import aio

from kvserve.v1 import predict_pb2 as pb
from server.rpc.errors import CallError, InvalidArgument, RequestIdInUse, Unavailable
from server.rpc.predict_errors import error_message, internal_error
from server.rpc.predict_read import PredictAsk, read_predict
from server.rpc.receiving import RequestStream
from server.rpc.stream_writer import StreamWriter

__all__ = ["MAX_OPEN_REQUESTS", "PredictStream"]

Context = aio.ServicerContext[Any, Any]
Answer = Callable[[PredictAsk, float, pb.PredictResponse], Awaitable[None]]

MAX_OPEN_REQUESTS = 256


@dataclass(frozen=True, slots=True)
class _Ready:
    response: pb.StreamPredictResponse
    num_inputs: int
    claims_id: bool = False


class PredictStream:
    """Made for one call; ``run`` it once. Event loop only."""

    def __init__(self, answer: Answer, *, max_inputs: int, max_requests: int = MAX_OPEN_REQUESTS) -> None:
        """``answer`` takes a request, when it came, and the message to write the answer into.

        ``max_inputs``: of one request, and of all that are open.
        """
        self._answer = answer
        self._max_inputs = max_inputs
        self._max_requests = max_requests
        self._num_open = 0
        self._num_inputs = 0
        self._running: set[str] = set()
        """Ids that wait for their answer."""
        self._ready: deque[_Ready] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._reader: asyncio.Task[None] | None = None
        self._is_all_read = False
        self._is_draining = False

    async def run(self, requests: RequestStream, context: Context, *, write_timeout_s: float) -> None:
        """Answer everything; return when the client has sent all and has got its answers.

        Raises :class:`InvalidArgument` for bytes that are no message, ``ReaderTooSlow``, and after
        :meth:`drain` :class:`Unavailable`. Whatever ends it, nothing of it runs any more.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(context, write_timeout_s))
                self._reader = group.create_task(self._read(requests, group))
                # Also if it is cancelled before it has begun.
                self._reader.add_done_callback(self._note_all_read)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        if self._is_draining:
            raise Unavailable("the server is shutting down", reason="DRAINING")

    def drain(self) -> None:
        """Read nothing more, answer what was read, and end."""
        self._is_draining = True
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self, requests: RequestStream, group: asyncio.TaskGroup) -> None:
        async for request in requests:
            self._accept(request, requests.fault, group)
            if not self._room.is_set():
                await self._room.wait()

    def _note_all_read(self, _reader: asyncio.Task[None]) -> None:
        self._is_all_read = True
        self._news.set()

    def _accept(
        self, request: pb.PredictRequest, fault: InvalidArgument | None, group: asyncio.TaskGroup
    ) -> None:
        received_s = time.perf_counter()
        request_id = request.request_id
        num_inputs = 0
        try:
            if fault is not None:
                raise fault
            if not request_id:
                raise InvalidArgument.of("request_id", "is required in a stream")
            ask = read_predict(request, max_inputs=self._max_inputs)
            if request_id in self._running:
                raise RequestIdInUse("a running request of this stream has this request_id")
            num_inputs = ask.inputs.count
            self._running.add(request_id)
            group.create_task(self._carry_out(ask, received_s))
        except CallError as error:
            failed = pb.StreamPredictResponse(request_id=request_id, error=error_message(error))
            self._push(_Ready(failed, num_inputs))
        self._num_open += 1
        self._num_inputs += num_inputs
        if self._num_open >= self._max_requests or self._num_inputs >= self._max_inputs:
            self._room.clear()

    async def _carry_out(self, ask: PredictAsk, received_s: float) -> None:
        response = pb.StreamPredictResponse(request_id=ask.request_id)
        try:
            await self._answer(ask, received_s, response.response)
        except CallError as error:  # whatever is already written gives way to it
            response.error.CopyFrom(error_message(error))
        except Exception as error:  # noqa: BLE001 - this request fails, the stream does not
            response.error.CopyFrom(error_message(internal_error(error, request_id=ask.request_id)))
        self._push(_Ready(response, ask.inputs.count, claims_id=True))

    def _push(self, ready: _Ready) -> None:
        self._ready.append(ready)
        self._news.set()

    async def _write(self, context: Context, timeout_s: float) -> None:
        writer = StreamWriter(context, timeout_s=timeout_s)
        try:
            while self._num_open or not self._is_all_read:
                while self._ready:
                    ready = self._ready.popleft()
                    if ready.claims_id:  # before it is written: the client may use the id at once again
                        self._running.discard(ready.response.request_id)
                    await writer.write(ready.response)
                    self._num_open -= 1
                    self._num_inputs -= ready.num_inputs
                    if self._num_open < self._max_requests and self._num_inputs < self._max_inputs:
                        self._room.set()
                if self._num_open or not self._is_all_read:
                    self._news.clear()
                    if not self._ready:
                        await self._news.wait()
        finally:
            writer.close()
