"""What a stream of predictions knows, whichever client reads it: its open requests and what became of them.

::

    request --> number it, remember it --> wire ... wire --> forget it --> outcome
            `-> no message can hold it: an outcome at once
"""

from __future__ import annotations

from collections import deque
from typing import Any

from kvserve._calls import Call
from kvserve._errors import Internal, InvalidArgument, MisuseError
from kvserve._predict_convert import outcome_from_pb
from kvserve._predict_inputs import PredictRequest
from kvserve._predict_requests import PredictCalls, StreamItem
from kvserve._predict_results import PredictOutcome
from kvserve.v1 import predict_pb2 as pb

__all__ = ["PredictStreamState"]


class PredictStreamState:
    """The part of a stream without input or output. Base of ``PredictStream`` and ``AsyncPredictStream``."""

    def __init__(
        self, call: Call[pb.PredictRequest, pb.StreamPredictResponse], calls: PredictCalls, requests: Any
    ) -> None:
        self._call = call
        self._calls = calls
        self._requests = requests
        self._num_inputs: dict[str, int] = {}
        """Of the open requests."""
        self._num_begun = 0
        self._is_ended = False
        self._unsent: deque[PredictOutcome] = deque()
        """Of requests that no message can hold."""
        self._failure: BaseException | None = None
        """Of the caller's own requests: what iterating over them raised."""

    @property
    def num_open(self) -> int:
        """Return how many requests were sent and are not answered yet."""
        return len(self._num_inputs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._num_begun} requests, {self.num_open} open>"

    def _message_of(self, item: StreamItem) -> pb.PredictRequest:
        """Make a request's message, with an id that no open request has, and remember it as open.

        Raises ``InvalidArgument`` for what no message can hold, TypeError for what is no request, ValueError
        for an id that an open request has.
        """
        self._num_begun += 1
        message = self._calls.stream_request(self._call.request, item)
        if not message.request_id:
            message.request_id = str(self._num_begun)
        if message.request_id in self._num_inputs:
            raise ValueError(f"the request_id {message.request_id!r} names an open request already")
        self._num_inputs[message.request_id] = len(message.texts.items) or len(message.features.rows)
        return message

    def _message_or_outcome(self, item: StreamItem) -> pb.PredictRequest | None:
        """Do so for one of many: an ``InvalidArgument`` is its outcome, and the others go on."""
        try:
            return self._message_of(item)
        except InvalidArgument as error:
            name = item.request_id if isinstance(item, PredictRequest) else None
            self._unsent.append(PredictOutcome(request_id=name or str(self._num_begun), error=error))
            return None

    def _outcome_of(self, message: pb.StreamPredictResponse) -> PredictOutcome:
        num_inputs = self._num_inputs.pop(message.request_id, None)
        if num_inputs is None:
            raise Internal(f"the server answered {message.request_id!r}, which names no open request")
        return outcome_from_pb(message, num_inputs=num_inputs)

    def _check_may_send(self) -> None:
        if self._requests is not None:
            raise MisuseError("this stream sends the requests that stream_predict() was given")
        if self._is_ended:
            raise MisuseError("end_sending() said that no more requests come")

    def _check_complete(self) -> None:
        """Raise ``Internal`` if the server ended the call with requests unanswered, or still to come.

        Raise what the caller's own requests raised, if they did.
        """
        if self._failure is not None:
            raise self._failure
        if self._num_inputs or not self._is_ended:
            raise Internal(f"the server ended the call early, with {len(self._num_inputs)} requests open")
