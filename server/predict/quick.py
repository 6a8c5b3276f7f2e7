"""Quick calls: a few rows for a cheap model, computed by the thread that brings them.

::

    open --> lease --> here, unprepared --+--> settle: all of a model's that came together: one preparation,
                                          |            one batch, no queue
                                          '--> somebody computes, or others wait: prepared one by one, and
                                               to the batcher as any call

For a row that a model answers in microseconds, the way through the batcher would be most of the cost.

What a call costs its reader is learned on the reader alone. Beside a reader that is busy, the compute thread
waits for the interpreter again and again: by the clock a row takes it milliseconds there, so that under load
nothing would ever count as quick. Before anything was computed here, the compute thread's processor time is
the guess. A model that waits for something else (a device, a network) looks quick by that, and is found out
by the first try; it gets another one now and then.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from server.predict.calls import OpenCall
from server.predict.catalogue import ModelKey
from server.predict.cost import CostModel
from server.predict.messages import Inputs
from server.predict.model import PredictModel

__all__ = ["QuickCalls", "prepare_together"]

QUICK_S = 0.001
"""What is expected to take less may be computed by the thread that brings it."""
TRY_EVERY, TRY_RUN = 1024, 16
"""Of so many calls that seem to be quick but were not, the first few, which may come together, are tried."""
MAX_MODELS = 256
"""Of so many the cost is remembered; who came first is forgotten first."""


class _Cost:
    """What is known of one model."""

    __slots__ = ("here", "num_passed", "processor")

    def __init__(self) -> None:
        self.here = CostModel()
        """By the clock, on the thread that brings calls."""
        self.processor = CostModel()
        """Processor time of the compute thread, for the whole of a batch."""
        self.num_passed = TRY_RUN
        """Calls that seemed to be quick but were not, by which the next ones to try are found."""

    def is_quick(self, num_rows: int) -> bool:
        """Say whether so many rows should be computed here."""
        known_s = self.here.expected_s(num_rows)
        if 0 < known_s < QUICK_S:
            return True
        if not 0 < self.processor.expected_s(num_rows) < QUICK_S:
            return False
        if known_s == 0:
            return True
        self.num_passed += 1
        return self.num_passed % TRY_EVERY < TRY_RUN


class QuickCalls:
    """Calls that wait for the thread that brought them, by model. Guarded by the host's lock."""

    def __init__(self) -> None:
        self._calls: dict[ModelKey, list[OpenCall]] = {}
        self._costs: dict[ModelKey, _Cost] = {}

    def __bool__(self) -> bool:
        return bool(self._calls)

    def is_quick(self, model: ModelKey, num_rows: int) -> bool:
        """Say whether so many rows should be computed here. Not before something is known of the model."""
        cost = self._costs.get(model)
        return cost is not None and cost.is_quick(num_rows)

    def learn(self, model: ModelKey, num_rows: int, seconds: float) -> None:
        """Take in a batch that was computed here."""
        self._cost(model).here.learn(num_rows, seconds)

    def learn_elsewhere(self, model: ModelKey, num_rows: int, processor_s: float) -> None:
        """Take in a batch of the compute thread's."""
        self._cost(model).processor.learn(num_rows, processor_s)

    def add(self, call: OpenCall) -> None:
        """Let a call wait that holds its model and is not prepared."""
        calls = self._calls.get(call.key)
        if calls is None:
            self._calls[call.key] = [call]
        else:
            calls.append(call)

    def take(self, max_rows: int) -> list[OpenCall]:
        """Take calls of one model with at most so many rows together, one call at least. Not when empty."""
        key, calls = next(iter(self._calls.items()))
        num_rows = 0
        for position, call in enumerate(calls):
            num_rows += call.inputs.num_rows
            if num_rows > max_rows and position:
                self._calls[key] = calls[position:]
                return calls[:position]
        del self._calls[key]
        return calls

    def take_all(self) -> list[OpenCall]:
        """Take what is left."""
        calls = [call for calls in self._calls.values() for call in calls]
        self._calls.clear()
        return calls

    def _cost(self, model: ModelKey) -> _Cost:
        cost = self._costs.get(model)
        if cost is None:
            if len(self._costs) >= MAX_MODELS:
                del self._costs[next(iter(self._costs))]
            cost = self._costs[model] = _Cost()
        return cost


def prepare_together(model: PredictModel, calls: Sequence[OpenCall]) -> dict[OpenCall, Exception]:
    """Prepare calls of rows for a model; return what is wrong with which of them. The calls are in use.

    Those that the model may take as one are handed to it as one; should it refuse that, one by one, so that
    nobody suffers for another's rows.
    """
    faults: dict[OpenCall, Exception] = {}
    for group in _alike(calls) if len(calls) > 1 else [calls]:
        if len(group) > 1 and _prepare_as_one(model, group):
            continue
        for call in group:
            try:
                call.prepare_piece(model)
            except Exception as error:  # noqa: BLE001 - told to the caller
                faults[call] = error
    return faults


def _alike(calls: Sequence[OpenCall]) -> Collection[Sequence[OpenCall]]:
    """Group calls by what they must have in common. Rows of different lengths could add up to right ones."""
    groups: dict[tuple[object, ...], list[OpenCall]] = {}
    for call in calls:
        request, inputs = call.request, call.inputs
        length = divmod(len(inputs.rows), inputs.num_rows)
        groups.setdefault((request.tenant, request.reuse, request.truncate, length), []).append(call)
    return groups.values()


def _prepare_as_one(model: PredictModel, calls: Sequence[OpenCall]) -> bool:
    request = calls[0].request
    together = Inputs(
        rows=b"".join([call.inputs.rows for call in calls]),
        num_rows=sum(call.inputs.num_rows for call in calls),
    )
    try:
        items = model.prepare(together, truncate=request.truncate, reuse=request.reuse, tenant=request.tenant)
    except Exception:  # noqa: BLE001 - whose fault it is shows when they are prepared one by one
        return False
    if len(items) != together.num_rows:
        return False
    start = 0
    for call in calls:
        call.items = items[start : start + call.inputs.num_rows]
        start += call.inputs.num_rows
    return True
