"""Predict calls for asyncio: lists that take several calls, and streams."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from kvserve._calls import Call
from kvserve._errors import Error, MisuseError
from kvserve._predict_requests import PredictCalls, StreamItem
from kvserve._predict_results import PredictOutcome
from kvserve._predict_split import Answer, Piece, SplitCall
from kvserve._predict_streams import PredictStreamState
from kvserve._transport import AsyncDuplex, AsyncTransport
from kvserve.v1 import predict_pb2 as pb

__all__ = ["AsyncPredictStream", "run_split"]

AnyAnswer = TypeVar("AnyAnswer", bound=Answer)
Result = TypeVar("Result")


async def run_split(split: SplitCall[AnyAnswer, Result], transport: AsyncTransport) -> Result:
    """Make the calls, several at a time, and join their answers. An error ends those that still run."""
    while split.goes_alone and (piece := split.next_piece()) is not None:  # Mostly it is the only one.
        try:
            split.add(piece, await transport.unary(piece.call))
        except Error as error:
            split.refuse(piece, error)
    if not split.is_done:
        await _run_together(split, transport)
    return split.result()


async def _run_together(split: SplitCall[AnyAnswer, Any], transport: AsyncTransport) -> None:
    running: deque[tuple[Piece[AnyAnswer], asyncio.Task[AnyAnswer]]] = deque()
    try:
        while not split.is_done:
            while (piece := split.next_piece()) is not None:
                running.append((piece, asyncio.ensure_future(transport.unary(piece.call))))
            piece, answer = running.popleft()
            try:
                split.add(piece, await answer)
            except Error as error:
                split.refuse(piece, error)
    finally:
        for _, answer in running:
            answer.cancel()
        await asyncio.gather(*(answer for _, answer in running), return_exceptions=True)


class AsyncPredictStream(PredictStreamState):
    """Requests and their outcomes over one call; made by ``AsyncClient.stream_predict``.

    Use it as ``async with ... as outcomes`` and ``async for outcome in outcomes``: each as soon as it is
    ready, in any order; ``outcome.request_id`` says whose it is. Entering the block starts the call and its
    deadline; leaving it, in whatever way, ends the call if it still runs. An error of one request is in its
    outcome; an error of the call, or of the requests given to ``stream_predict``, is raised by the
    iteration.
    """

    def __init__(
        self,
        call: Call[pb.PredictRequest, pb.StreamPredictResponse],
        calls: PredictCalls,
        requests: AsyncIterable[StreamItem] | Iterable[StreamItem] | None,
        transport: AsyncTransport,
    ) -> None:
        super().__init__(call, calls, requests)
        self._transport = transport
        self._duplex: AsyncDuplex[pb.PredictRequest, pb.StreamPredictResponse] | None = None
        self._sending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._duplex is not None:
            raise MisuseError("a stream can be entered only once; call stream_predict() again")
        self._duplex = self._transport.duplex(self._call)
        if self._requests is not None:
            self._sending = asyncio.create_task(self._send_all(self._duplex))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()
        if self._sending is not None:
            await asyncio.gather(self._sending, return_exceptions=True)

    async def send(self, request: StreamItem, /) -> str:
        """Send a request; return its id. Waits while the server takes no more.

        Takes a ``PredictRequest`` or what ``predict`` takes. Raises ``InvalidArgument`` for what no message
        can hold; that the call has ended is said by the iteration, not here.
        """
        self._check_may_send()
        message = self._message_of(request)
        await self._opened().write(message)
        return message.request_id

    async def end_sending(self) -> None:
        """Say that no more requests come: the iteration ends after the last outcome. Idempotent."""
        self._is_ended = True
        await self._opened().end_writes()

    def __aiter__(self) -> AsyncIterator[PredictOutcome]:
        """Iterate over the outcomes. Raises ``kvserve.Error``; ``Cancelled`` after ``cancel()``."""
        return self._outcomes(self._opened())

    async def _outcomes(
        self, duplex: AsyncDuplex[pb.PredictRequest, pb.StreamPredictResponse]
    ) -> AsyncIterator[PredictOutcome]:
        try:
            while (message := await self._read(duplex)) is not None:
                yield self._outcome_of(message)
                while self._unsent:
                    yield self._unsent.popleft()
            while self._unsent:
                yield self._unsent.popleft()
            self._check_complete()
        finally:
            self.cancel()

    async def _read(
        self, duplex: AsyncDuplex[pb.PredictRequest, pb.StreamPredictResponse]
    ) -> pb.StreamPredictResponse | None:
        try:
            return await duplex.read()
        except Error:
            if self._failure is not None:  # It was this that ended the call.
                raise self._failure from None
            raise

    async def _send_all(self, duplex: AsyncDuplex[pb.PredictRequest, pb.StreamPredictResponse]) -> None:
        try:
            async for item in _iterate(self._requests):
                message = self._message_or_outcome(item)
                if message is not None and not await duplex.write(message):
                    return
            self._is_ended = True
            await duplex.end_writes()
        except Exception as failure:  # noqa: BLE001  # The caller's own; the iteration raises it.
            self._failure = failure
            duplex.cancel()

    def _opened(self) -> AsyncDuplex[pb.PredictRequest, pb.StreamPredictResponse]:
        if self._duplex is None:
            raise MisuseError("open the stream first: async with client.stream_predict(...) as outcomes")
        return self._duplex

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        if self._sending is not None:
            self._sending.cancel()
        if self._duplex is not None:
            self._duplex.cancel()


async def _iterate(
    requests: AsyncIterable[StreamItem] | Iterable[StreamItem],
) -> AsyncIterator[StreamItem]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
