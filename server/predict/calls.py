"""A call that is open: what of it is done, and who holds what for it.

::

    received --> lease --> prepared --> in the batcher <--> in a batch --> answered or failed
                 (load_s)  (tokenize_s) (queue_s)           (compute_s)

``is_in_use`` while a thread works on its inputs with the model: should the call end meanwhile, the lease is
released by that thread when it is done, not before.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from server.predict.catalogue import CatalogueEntry, ModelKey
from server.predict.errors import InputError, WrongTaskError
from server.predict.messages import CallStats, Inputs, ModelInfo, Output, PredictAnswer, PredictCall, Task
from server.predict.model import PredictModel, Prepared
from server.predict.model_cache import ModelLease

__all__ = ["OpenCall", "check_count", "check_task", "estimate_tokens"]

PIECE = 64
"""Texts that are prepared at once."""
CHARS_PER_TOKEN = 4
"""Rather few tokens than too many: it decides what may wait, not what is computed."""


class OpenCall:
    """Guarded by the host's lock, but for ``items`` while it ``is_in_use``."""

    __slots__ = (
        "batch_size",
        "batch_tokens",
        "call_id",
        "compute_s",
        "deadline_s",
        "entry",
        "inputs",
        "is_ended",
        "is_in_use",
        "is_padded",
        "items",
        "key",
        "lease",
        "load_s",
        "num_estimated",
        "num_left",
        "outputs",
        "prepared_s",
        "queue_s",
        "received_s",
        "request",
        "tokenize_s",
    )

    def __init__(self, request: PredictCall, entry: CatalogueEntry, *, now_s: float) -> None:
        self.request = request
        self.call_id = request.call_id
        self.inputs = request.inputs
        self.entry = entry
        self.key: ModelKey = entry.key
        self.received_s = now_s
        self.deadline_s = None if request.deadline_s is None else now_s + request.deadline_s
        self.num_estimated = 0
        """Tokens that it stands for until it is prepared."""
        self.lease: ModelLease | None = None
        self.items: list[Prepared] = []
        self.outputs: list[Output | None] = []
        self.num_left = request.inputs.count
        self.is_in_use = False
        self.is_ended = False
        self.is_padded = False
        """The model's executor pads inputs to the longest."""
        self.load_s = 0.0
        self.tokenize_s = 0.0
        self.prepared_s = now_s
        self.queue_s = 0.0
        self.compute_s = 0.0
        self.batch_size = 0
        self.batch_tokens = 0

    def prepare_piece(self, model: PredictModel) -> bool:
        """Prepare the next inputs; return whether all are. Raises what ``PredictModel.prepare`` does."""
        start, texts, request = len(self.items), self.inputs.texts, self.request
        piece = self.inputs
        if len(texts) > PIECE:
            piece = Inputs(texts[start : start + PIECE])
        try:
            self.items += model.prepare(
                piece, truncate=request.truncate, reuse=request.reuse, tenant=request.tenant
            )
        except InputError as error:
            if error.index is not None:
                error.index += start
            raise
        if len(self.items) != start + piece.count:
            raise RuntimeError(f"the model prepared {len(self.items) - start} of {piece.count} inputs")
        return len(self.items) == self.inputs.count

    def forget_inputs(self) -> None:
        """Let go of what was to be computed: it has ended, and who waits for a load still holds the call."""
        self.inputs = Inputs()
        self.request = msgspec.structs.replace(self.request, inputs=self.inputs)

    def note_prepared(self, now_s: float) -> None:
        """Take in that all its inputs are prepared."""
        self.tokenize_s = max(0.0, now_s - self.received_s - self.load_s)
        self.prepared_s = now_s

    def note_batch(self, started_s: float, seconds: float, num_inputs: int, num_tokens: int) -> None:
        """Take in that some of its inputs were in a batch."""
        self.queue_s = started_s - self.prepared_s
        self.compute_s += seconds
        if num_tokens >= self.batch_tokens:
            self.batch_size, self.batch_tokens = num_inputs, num_tokens

    def put(self, indices: Sequence[int], outputs: Sequence[Output]) -> bool:
        """Take in outputs; return whether none is missing any more."""
        if not self.outputs:
            if len(outputs) == self.num_left and isinstance(indices, range):
                self.outputs = [*outputs]
                self.num_left = 0
                return True
            self.outputs = [None] * self.num_left
        for index, output in zip(indices, outputs, strict=True):
            self.outputs[index] = output
        self.num_left -= len(outputs)
        return not self.num_left

    def answer(self) -> PredictAnswer:
        """Return the answer; none of its outputs is missing."""
        return PredictAnswer(
            self.call_id,
            self.key.version,
            tuple(self.outputs),  # type: ignore[arg-type]
            CallStats(
                self.load_s,
                self.tokenize_s,
                self.queue_s,
                self.compute_s,
                self.batch_size,
                self.batch_tokens,
            ),
        )


def check_count(inputs: Inputs, *, max_inputs: int) -> None:
    """Raise ``InputError`` if there are no inputs, too many, or both kinds."""
    if inputs.texts and inputs.num_rows:
        raise InputError("inputs are either texts or rows of features")
    if inputs.count < 1:
        raise InputError("at least one input is needed")
    if inputs.count > max_inputs:
        raise InputError(f"{inputs.count} inputs are more than the limit of {max_inputs} for a call")


def check_task(request: PredictCall, info: ModelInfo) -> None:
    """Raise ``WrongTaskError`` if the model does not do what the call is about."""
    if request.task is not None and request.task is not info.task:
        raise WrongTaskError(f"the model has the task {info.task.value}, not {request.task.value}")
    if (info.task is Task.FEATURES) is bool(request.inputs.texts):
        takes = "rows of features, not texts" if request.inputs.texts else "texts, not rows of features"
        raise WrongTaskError(f"the model takes {takes}")


def estimate_tokens(inputs: Inputs) -> int:
    """Return about how many tokens there will be: of texts without tokenizing them."""
    if not inputs.texts:
        return inputs.num_rows
    num_chars = sum(len(item.text) + len(item.pair or "") for item in inputs.texts)
    return len(inputs.texts) + num_chars // CHARS_PER_TOKEN
