"""Predict calls, blocking: lists that take several calls, and streams."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from kvserve._calls import Call
from kvserve._errors import Error, MisuseError
from kvserve._predict_requests import PredictCalls, StreamItem
from kvserve._predict_results import PredictOutcome
from kvserve._predict_split import Answer, Piece, SplitCall
from kvserve._predict_streams import PredictStreamState
from kvserve._transport import Duplex, Pending, Transport
from kvserve.v1 import predict_pb2 as pb

__all__ = ["PredictStream", "run_split"]

AnyAnswer = TypeVar("AnyAnswer", bound=Answer)
Result = TypeVar("Result")


def run_split(split: SplitCall[AnyAnswer, Result], transport: Transport) -> Result:
    """Make the calls, several at a time, and join their answers. An error ends those that still run."""
    running: deque[tuple[Piece[AnyAnswer], Pending[AnyAnswer]]] = deque()
    try:
        while not split.is_done:
            while (piece := split.next_piece()) is not None:
                running.append((piece, transport.start(piece.call)))
            piece, pending = running[0]
            try:
                split.add(piece, pending.result())
            except Error as error:
                split.refuse(piece, error)
            running.popleft()
    finally:
        for _, pending in running:
            pending.cancel()
    return split.result()


class PredictStream(PredictStreamState):
    """Requests and their outcomes over one call; made by ``Client.stream_predict``.

    Use it as ``with ... as outcomes`` and ``for outcome in outcomes``: each as soon as it is ready, in any
    order; ``outcome.request_id`` says whose it is. Entering the block starts the call and its deadline;
    leaving it, in whatever way, ends the call if it still runs. An error of one request is in its outcome;
    an error of the call, or of the requests given to ``stream_predict``, is raised by the iteration. One
    thread may send while another iterates; requests given to ``stream_predict`` are iterated over in a
    thread of the stream's own.
    """

    def __init__(
        self,
        call: Call[pb.PredictRequest, pb.StreamPredictResponse],
        calls: PredictCalls,
        requests: Iterable[StreamItem] | None,
        transport: Transport,
    ) -> None:
        super().__init__(call, calls, requests)
        self._transport = transport
        self._duplex: Duplex[pb.PredictRequest, pb.StreamPredictResponse] | None = None

    def __enter__(self) -> Self:
        if self._duplex is not None:
            raise MisuseError("a stream can be entered only once; call stream_predict() again")
        self._duplex = self._transport.duplex(self._call)
        if self._requests is not None:
            sending = threading.Thread(
                target=self._send_all, args=(self._duplex,), name="kvserve-predict-stream", daemon=True
            )
            sending.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def send(self, request: StreamItem, /) -> str:
        """Send a request; return its id. Blocks while the server takes no more.

        Takes a ``PredictRequest`` or what ``predict`` takes. Raises ``InvalidArgument`` for what no message
        can hold; that the call has ended is said by the iteration, not here.
        """
        self._check_may_send()
        message = self._message_of(request)
        self._opened().write(message)
        return message.request_id

    def end_sending(self) -> None:
        """Say that no more requests come: the iteration ends after the last outcome. Idempotent."""
        self._is_ended = True
        self._opened().end_writes()

    def __iter__(self) -> Iterator[PredictOutcome]:
        """Iterate over the outcomes. Raises ``kvserve.Error``; ``Cancelled`` after ``cancel()``."""
        return self._outcomes(self._opened())

    def _outcomes(
        self, duplex: Duplex[pb.PredictRequest, pb.StreamPredictResponse]
    ) -> Iterator[PredictOutcome]:
        try:
            while (message := self._read(duplex)) is not None:
                yield self._outcome_of(message)
                while self._unsent:
                    yield self._unsent.popleft()
            while self._unsent:
                yield self._unsent.popleft()
            self._check_complete()
        finally:
            self.cancel()

    def _read(
        self, duplex: Duplex[pb.PredictRequest, pb.StreamPredictResponse]
    ) -> pb.StreamPredictResponse | None:
        try:
            return duplex.read()
        except Error:
            if self._failure is not None:  # It was this that ended the call.
                raise self._failure from None
            raise

    def _send_all(self, duplex: Duplex[pb.PredictRequest, pb.StreamPredictResponse]) -> None:
        try:
            for item in self._requests:
                message = self._message_or_outcome(item)
                if message is not None and not duplex.write(message):
                    return
            self._is_ended = True
            duplex.end_writes()
        except Exception as failure:  # noqa: BLE001  # The caller's own; the iteration raises it.
            self._failure = failure
            duplex.cancel()

    def _opened(self) -> Duplex[pb.PredictRequest, pb.StreamPredictResponse]:
        if self._duplex is None:
            raise MisuseError("open the stream first: with client.stream_predict(...) as outcomes")
        return self._duplex

    def cancel(self) -> None:
        """End the call. Idempotent, never blocks, harmless after the end."""
        if self._duplex is not None:
            self._duplex.cancel()
