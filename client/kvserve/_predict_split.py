"""One list of inputs as one call, or as several where it is too long for one.

What limits a call: the inputs that a server takes at once, and the size of the request and of the answer. The
size of an answer is not known before the first one, so the first call of a long list is a short one that goes
alone. It also says which version of the model answers; the calls after it name that version, so that all
predictions of one list come from the same one, whatever aliases and canaries do meanwhile::

    |-- first --|
                |-- second --| |-- fifth --|
                |-- third --|    |-- ...            at most so many at a time
                |-- fourth --|

An answer that turns out too large for a message is asked for again in halves. Any other error is the error of
the whole; the fields that it names are those of the caller's list.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message

from kvserve._calls import Call
from kvserve._errors import (
    DeadlineExceeded,
    Error,
    FieldViolation,
    Internal,
    InvalidArgument,
    ResourceExhausted,
)
from kvserve.v1 import predict_pb2 as pb

__all__ = ["Answer", "Piece", "SplitCall", "SplitLimits", "join_timings"]

MAX_INPUTS = 4096
MAX_RUNNING = 4
_BYTES_BESIDE_ITEM = 6
"""A tag and a length."""
_BYTES_BESIDE_ITEMS = 64
"""Of a request without inputs, what it does not have yet: the list's own tag and length, the version."""
_POSITION = re.compile(r"\[(\d+)\]")


class Answer(Protocol):
    """What the answers of all such calls have."""

    @property
    def version(self) -> str: ...
    @property
    def timings(self) -> pb.PredictTimings: ...
    def ByteSize(self) -> int: ...  # noqa: N802  # protobuf's name


Item = TypeVar("Item", bound=Message)
AnyAnswer = TypeVar("AnyAnswer", bound=Answer)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLimits:
    """How large calls may be."""

    max_bytes: int
    """Of a request, and of an answer."""
    first_inputs: int = MAX_INPUTS
    """In the first call of a list that is longer; where answers may be large, few."""
    max_inputs: int = MAX_INPUTS
    max_running: int = MAX_RUNNING


@dataclass(frozen=True, slots=True)
class Piece(Generic[AnyAnswer]):
    """One of the calls: inputs ``start`` to ``stop``, half-open."""

    call: Call[Message, AnyAnswer]
    start: int
    stop: int


class SplitCall(Generic[AnyAnswer, Result]):
    """Says which calls to start, takes their answers, and joins them; whoever drives it does the waiting.

    ::

        while not split.is_done:
            start every split.next_piece() until it is None
            wait for one of those that run; split.add(piece, answer), or split.refuse(piece, error)
        split.result()
    """

    def __init__(
        self,
        items: Sequence[Item],
        make_call: Callable[[Sequence[Item], int, str | None, float | None], Call[Message, AnyAnswer]],
        join: Callable[[Sequence[AnyAnswer], pb.PredictTimings], Result],
        *,
        field: str,
        base_bytes: int,
        limits: SplitLimits,
        timeout_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        """``make_call`` takes inputs, the call's number, the version to name (None: as asked) and a timeout.

        ``join`` takes all answers in the order of their inputs and their joint timings. ``field`` is the
        path of the inputs, ``base_bytes`` the size of a request without them. Raises ``InvalidArgument``
        for one that no call can hold.
        """
        self._items = items
        self._make_call = make_call
        self._join = join
        self._limits = limits
        self._clock = clock
        self._began_s = clock()
        self._timeout_s = timeout_s
        self._sizes = [item.ByteSize() + _BYTES_BESIDE_ITEM for item in items]
        self._room = limits.max_bytes - _BYTES_BESIDE_ITEMS - base_bytes
        for position, size in enumerate(self._sizes):
            if size > self._room:
                description = f"has {size} bytes; max_message_bytes is {limits.max_bytes} for a whole request"
                raise InvalidArgument(
                    f"{field}[{position}]: {description}",
                    violations=[FieldViolation(f"{field}[{position}]", description)],
                )
        self._waiting = deque([(0, len(items))])
        """Half-open spans of inputs that no call has been started for, in order."""
        self._max_inputs = limits.first_inputs if len(items) > limits.first_inputs else limits.max_inputs
        self._most_inputs = limits.max_inputs
        """Falls below the limit once an answer was too large."""
        self._num_started = self._num_running = 0
        self._version: str | None = None
        self._answers: dict[int, AnyAnswer] = {}
        """By the first of their inputs."""

    @property
    def is_done(self) -> bool:
        """Return whether every input is answered."""
        return not self._waiting and not self._num_running

    @property
    def goes_alone(self) -> bool:
        """Return whether calls go one by one, because none has been answered yet."""
        return self._version is None

    def next_piece(self) -> Piece[AnyAnswer] | None:
        """Return the next call to start; None: wait for one that runs first.

        Raises ``DeadlineExceeded`` when the time of the whole list is over.
        """
        max_running = 1 if self.goes_alone else self._limits.max_running
        if not self._waiting or self._num_running >= max_running:
            return None
        start, end = self._waiting.popleft()
        stop = self._stop_of_call(start, end)
        if stop < end:
            self._waiting.appendleft((stop, end))
        call = self._make_call(self._items[start:stop], self._num_started, self._version, self._remaining_s())
        self._num_started += 1
        self._num_running += 1
        return Piece(call, start, stop)

    def add(self, piece: Piece[AnyAnswer], answer: AnyAnswer) -> None:
        """Take an answer."""
        self._num_running -= 1
        self._answers[piece.start] = answer
        if self._version is None:
            self._version = answer.version
            # Inputs differ: aim at half of what an answer may have.
            bytes_per_input = answer.ByteSize() / max(1, piece.stop - piece.start)
            fitting = int(self._limits.max_bytes / 2 / bytes_per_input) if bytes_per_input else MAX_INPUTS
            self._max_inputs = max(1, min(self._most_inputs, fitting))

    def refuse(self, piece: Piece[AnyAnswer], error: Error) -> None:
        """Take an error: of an answer that was too large plan its halves, raise any other."""
        self._num_running -= 1
        num_inputs = piece.stop - piece.start
        if num_inputs > 1 and _is_answer_too_large(error):
            middle = piece.start + num_inputs // 2
            self._waiting.extendleft([(middle, piece.stop), (piece.start, middle)])
            self._most_inputs = self._max_inputs = min(self._max_inputs, num_inputs // 2)
            return
        if piece.start:
            raise _moved(error, piece.start) from error.__cause__
        raise error

    def result(self) -> Result:
        """Join the answers. Raises ``Internal`` if they are of different versions."""
        answers = [self._answers[start] for start in sorted(self._answers)]
        if len({answer.version for answer in answers}) > 1:
            raise Internal("parts of one list were answered by different versions of the model")
        return self._join(answers, join_timings(answers, self._clock() - self._began_s))

    def _stop_of_call(self, start: int, end: int) -> int:
        """Return where a call that begins at ``start`` has to stop: before what doesn't fit in."""
        room = self._room
        stop = start
        while stop < end and stop - start < self._max_inputs and self._sizes[stop] <= room:
            room -= self._sizes[stop]
            stop += 1
        return stop

    def _remaining_s(self) -> float | None:
        if self._timeout_s is None or not self._num_started:
            return self._timeout_s
        remaining_s = self._began_s + self._timeout_s - self._clock()
        if remaining_s <= 0:
            raise DeadlineExceeded(f"not all inputs were answered within {self._timeout_s:g} s")
        return remaining_s


def join_timings(answers: Sequence[Answer], elapsed_s: float) -> pb.PredictTimings:
    """Return the timings of the whole: of one call its own, of several as ``PredictTimings`` says."""
    timings = [answer.timings for answer in answers]
    if len(timings) == 1:
        return timings[0]
    return pb.PredictTimings(
        load_s=max(each.load_s for each in timings),
        tokenize_s=sum(each.tokenize_s for each in timings),
        queue_s=max(each.queue_s for each in timings),
        compute_s=sum(each.compute_s for each in timings),
        total_s=elapsed_s,
        batch_size=max(each.batch_size for each in timings),
        batch_tokens=max(each.batch_tokens for each in timings),
    )


def _is_answer_too_large(error: Error) -> bool:
    """Tell whether an answer exceeded the limit on messages: the server's, or this side's."""
    if not isinstance(error, ResourceExhausted):
        return False
    return error.reason == "RESPONSE_TOO_LARGE" or "message larger than max" in error.message


def _moved(error: Error, offset: int) -> Error:
    """Return the error with the positions in its fields counted from the beginning of the whole list."""
    if not isinstance(error, InvalidArgument):
        return error
    violations = [
        FieldViolation(
            _POSITION.sub(lambda found: f"[{int(found[1]) + offset}]", each.field, count=1), each.description
        )
        for each in error.violations
    ]
    message = error.message
    for old, new in zip(error.violations[:1], violations, strict=False):
        message = message.replace(old.field, new.field, 1)
    return InvalidArgument(
        message, violations=violations, reason=error.reason, domain=error.domain, details=error.details
    )
