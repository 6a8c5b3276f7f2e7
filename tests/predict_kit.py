"""Small real models for tests of the predict host: numpy, deterministic, and each fails in one known way."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from kvcore.clock import Clock, MonotonicClock
from server.predict.errors import ComputeError, InputError, ModelRefusedError
from server.predict.host import PredictHost
from server.predict.messages import (
    CallFailed,
    CancelCall,
    FromPredict,
    Inputs,
    ModelInfo,
    OpDone,
    OpFailed,
    Output,
    PredictAnswer,
    PredictCall,
    PredictReady,
    ReuseEvent,
    Task,
    TextItem,
    ToPredict,
)
from server.predict.model import FoundModel, LoadProgress, PredictModel, Prepared
from server.predict.options import FeatureSpec, ModelSpec, PredictOptions

PATIENCE_S = 20.0
NUM_FEATURES = 4


@dataclass
class Gate:
    """Lets a test hold a thread at a place: it says that it is there, and waits."""

    reached: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    opened: threading.Event = field(default_factory=threading.Event)

    def wait_until_reached(self) -> None:
        assert self.reached.acquire(timeout=PATIENCE_S)

    def open(self) -> None:
        self.opened.set()

    def pass_through(self) -> None:
        self.reached.release()
        assert self.opened.wait(PATIENCE_S)


def open_gate() -> Gate:
    gate = Gate()
    gate.open()
    return gate


class RowModel:
    """The dot product of each row with 1, 2, 3, 4. The first number of a row can be poison."""

    RAISES, GIVES_NAN, NO_MEMORY, BREAKS = 666.0, 777.0, 888.0, 999.0

    def __init__(self, *, gate: Gate | None = None) -> None:
        self.info = ModelInfo(
            task=Task.FEATURES, family="rows", num_features=NUM_FEATURES, num_bytes=100, executor="features"
        )
        self.gate = gate or open_gate()
        self.batches: list[int] = []
        self.is_closed = False

    def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
        rows = np.frombuffer(inputs.rows, dtype="<f4")
        if rows.size != inputs.num_rows * NUM_FEATURES:
            raise InputError(f"rows must have {NUM_FEATURES} features", index=0, part="values")
        return [Prepared(1, row, reuse=reuse, tenant=tenant) for row in rows.reshape(inputs.num_rows, -1)]

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        assert not self.is_closed, "computed after it was closed"
        self.batches.append(len(batch))
        self.gate.pass_through()
        rows = np.stack([item.payload for item in batch])
        if (rows[:, 0] == self.RAISES).any():
            raise ComputeError("the model cannot compute this")
        if (rows[:, 0] == self.NO_MEMORY).any():
            raise MemoryError
        if (rows[:, 0] == self.BREAKS).any():
            raise ZeroDivisionError("a secret of the inside")
        values = rows.astype(np.float64) @ np.arange(1, NUM_FEATURES + 1)
        values[rows[:, 0] == self.GIVES_NAN] = np.nan
        return [Output(value.tobytes()) for value in values.astype("<f4")]

    def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True


class WordModel:
    """A text's vector: how many words it has, and how many letters. "bad" words cannot be tokenized."""

    def __init__(self, *, executor: str = "native", gate: Gate | None = None) -> None:
        self.info = ModelInfo(
            task=Task.EMBED, family="words", num_dimensions=2, num_bytes=100, executor=executor
        )
        self.tokenizing = open_gate()
        self.gate = gate or open_gate()
        self.batches: list[list[int]] = []
        self.pieces: list[int] = []
        self.is_closed = False

    def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
        assert not self.is_closed, "tokenized after it was closed"
        self.tokenizing.pass_through()
        assert not self.is_closed, "closed while it tokenized"
        self.pieces.append(len(inputs.texts))
        prepared = []
        for index, item in enumerate(inputs.texts):
            words = item.text.split()
            if "bad" in words:
                raise InputError("cannot be tokenized", index=index, part="text")
            prepared.append(Prepared(len(words) + 2, words, truncated=truncate))
        return prepared

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        assert not self.is_closed, "computed after it was closed"
        self.batches.append([item.num_tokens for item in batch])
        self.gate.pass_through()
        assert not self.is_closed, "closed while it computed"
        return [
            Output(
                np.array([len(item.payload), sum(map(len, item.payload))], "<f4").tobytes(), item.num_tokens
            )
            for item in batch
        ]

    def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True


class KitLoader:
    """Makes the models of a test by name; a gate holds the loads of a name."""

    def __init__(self, **make: Callable[[], PredictModel]) -> None:
        self.make = make
        self.gates: dict[str, Gate] = {}
        self.made: list[tuple[str, Any]] = []
        self.on_reuse_event: Callable[[ReuseEvent], None] = print

    def find(self, spec: ModelSpec, *, on_progress: LoadProgress) -> FoundModel:
        return KitFound(self, spec)

    def load(
        self, spec: ModelSpec, on_progress: LoadProgress, on_reuse_event: Callable[[ReuseEvent], None]
    ) -> PredictModel:
        self.on_reuse_event = on_reuse_event
        for done in range(1000):
            on_progress("reading", done, 1000)
        if spec.name in self.gates:
            self.gates[spec.name].pass_through()
        if spec.name not in self.make:
            raise ModelRefusedError("its weights are not what they should be")
        model = self.make[spec.name]()
        self.made.append((spec.name, model))
        return model


@dataclass
class KitFound:
    """One of its models, found."""

    loader: KitLoader
    spec: ModelSpec
    num_bytes: int | None = 100

    def load(
        self,
        *,
        on_progress: LoadProgress,
        on_reuse_event: Callable[[ReuseEvent], None],
        embedder: PredictModel | None = None,
    ) -> PredictModel:
        return self.loader.load(self.spec, on_progress, on_reuse_event)

    def close(self) -> None:
        pass


class HostKit:
    """A host, and what it says. ``names`` of models that take rows begin with "row"."""

    def __init__(
        self,
        *names: str,
        loader: KitLoader | None = None,
        clock: Clock | None = None,
        preload: bool = False,
        num_tokenizer_threads: int = 2,
        is_settled: bool = False,
        **options: object,
    ) -> None:
        self.rows = RowModel()
        self.words = WordModel()
        self.loader = loader or KitLoader(rows=lambda: self.rows, words=lambda: self.words)
        self.said: queue.SimpleQueue[FromPredict] = queue.SimpleQueue()
        self.other: list[FromPredict] = []
        self._ended: dict[int, PredictAnswer | CallFailed] = {}
        self._ops: dict[int, OpDone | OpFailed] = {}
        self._ids = iter(range(1, 1 << 30))
        self._lock = threading.Lock()
        self.host = PredictHost(
            PredictOptions(
                models=self.specs(names or ("rows", "words"), preload=preload),
                **options,  # type: ignore[arg-type]
            ),
            self.loader,
            clock=clock or MonotonicClock(),
            send=self.said.put,
            num_tokenizer_threads=num_tokenizer_threads,
            is_settled=is_settled,
        )
        self.ready: PredictReady | None = None

    def specs(self, names: Sequence[str], *, preload: bool) -> tuple[ModelSpec, ...]:
        """Return the catalogue."""
        return tuple(spec_of(name, preload=preload) for name in names)

    def __enter__(self) -> Self:
        self.ready = self.host.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.host.close()
        self.host.close()

    def handle(self, message: ToPredict) -> None:
        """As the reader thread does: one message at a time."""
        with self._lock:
            self.host.handle(message)

    def call(self, model: str, inputs: Inputs, **fields: object) -> int:
        """Send a call; return its id."""
        with self._lock:
            call_id = next(self._ids)
            self.host.handle(PredictCall(call_id, model, "", inputs, **fields))  # type: ignore[arg-type]
        return call_id

    def cancel(self, call_id: int) -> None:
        self.handle(CancelCall(call_id))

    def new_id(self) -> int:
        with self._lock:
            return next(self._ids)

    def outcome(self, call_id: int) -> PredictAnswer | CallFailed:
        """Return how a call ended; fail the test if it does not, or ends twice."""
        while call_id not in self._ended:
            self._take()
        return self._ended[call_id]

    def answer(self, call_id: int) -> PredictAnswer:
        outcome = self.outcome(call_id)
        assert isinstance(outcome, PredictAnswer), outcome
        return outcome

    def failure(self, call_id: int) -> CallFailed:
        outcome = self.outcome(call_id)
        assert isinstance(outcome, CallFailed), outcome
        return outcome

    def op(self, op_id: int) -> OpDone | OpFailed:
        """Return how an operation ended."""
        while op_id not in self._ops:
            self._take()
        return self._ops[op_id]

    def wait_for(self, wanted: Callable[[FromPredict], bool]) -> FromPredict:
        """Return the first message of no call and no operation's end that is wanted."""
        checked = 0
        while True:
            for message in self.other[checked:]:
                if wanted(message):
                    return message
            checked = len(self.other)
            self._take()

    def take_all(self) -> None:
        """Take what has been said."""
        while not self.said.empty():
            self._take()

    def _take(self) -> None:
        message = self.said.get(timeout=PATIENCE_S)
        if isinstance(message, PredictAnswer | CallFailed):
            assert message.call_id not in self._ended, f"{message.call_id} ended twice"
            self._ended[message.call_id] = message
        elif isinstance(message, OpDone | OpFailed):
            assert message.op_id not in self._ops, f"{message.op_id} ended twice"
            self._ops[message.op_id] = message
        else:
            self.other.append(message)


def spec_of(name: str, *, preload: bool = False) -> ModelSpec:
    """Return a spec by name: names that begin with "row" are over features."""
    if name.startswith("row"):
        return ModelSpec(name=name, features=FeatureSpec(), preload=preload)
    return ModelSpec(name=name, source=name, preload=preload)


def rows_of(*rows: Sequence[float]) -> Inputs:
    """Return rows of features."""
    return Inputs(rows=np.array(rows, dtype="<f4").tobytes(), num_rows=len(rows))


def texts_of(*texts: str) -> Inputs:
    """Return texts."""
    return Inputs(texts=tuple(TextItem(text) for text in texts))


def values_of(answer: PredictAnswer) -> list[list[float]]:
    """Return the numbers of each output."""
    return [np.frombuffer(output.values, "<f4").tolist() for output in answer.outputs]
