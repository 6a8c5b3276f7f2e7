"""A predict process without models: ``python -m tests.tiny_host --fd N``, as ``server.predict_main``.

The test cannot reach into it, so calls carry the orders: the name of the model says what happens.
``PredictOptions.model_root`` decides about starting: "refuse" raises a typed error, "die" kills the process,
"once:PATH" works only as long as there is no file PATH, which it makes.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

from kvcore.clock import Clock
from server.predict.errors import InputError, ModelRefusedError, UnknownModelError
from server.predict.failures import call_failed, op_failed
from server.predict.messages import (
    CallFailed,
    CallStats,
    CancelCall,
    ClearReuse,
    DescribeModel,
    EventKind,
    FailureKind,
    FromPredict,
    ListModels,
    LoadModel,
    ModelList,
    ModelPhase,
    ModelStatus,
    NumCleared,
    OneModel,
    OpDone,
    OpProgress,
    Output,
    PredictAnswer,
    PredictCall,
    PredictOp,
    PredictReady,
    PredictStats,
    ReuseEvent,
    ReuseEvents,
    SetAlias,
    ToPredict,
    UnloadModel,
)
from server.predict.options import PredictOptions
from server.predict.serve import Outbox, serve

__all__ = ["TinyHost"]

MANY_PER_ANSWER = 20
GRIP_S = 4.0


class TinyHost:
    """One compute thread, one model "m" with version "1", and whatever is entered later.

    Calls to: "echo" are answered with their rows; "kept" wait for a call to "release", and are answered
    before it, the last one first; "fail" fail with the kind that ``version`` names; "raise" raise; "large"
    answer more than the link takes; "count" tell how many kept calls were cancelled; "kill" kill the process;
    "hang" stop the compute thread; "grip" hold the interpreter, hard at work, for a few seconds; "choke"
    cannot even be taken in.
    """

    def __init__(self, options: PredictOptions, clock: Clock, outbox: Outbox) -> None:
        self._options = options
        self._clock = clock
        self._outbox = outbox
        self._inbox: queue.SimpleQueue[ToPredict | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._kept: dict[int, PredictCall] = {}
        self._num_cancelled = 0
        self._num_described = 0
        self._versions = {("m", "1"): ModelPhase.UNLOADED}
        self._aliases: dict[tuple[str, str], tuple[str, float]] = {}
        self.turn_started: float | None = None

    def start(self) -> PredictReady:
        order, _, rest = (self._options.model_root or "").partition(":")
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "refuse" or (order == "once" and Path(rest).exists()):
            raise ModelRefusedError("no such models, try others")
        if order == "once":
            Path(rest).touch()
        self._thread.start()
        return PredictReady(1, 1, "cpu")

    def handle(self, message: ToPredict) -> None:
        if isinstance(message, PredictCall) and message.model == "choke":
            raise RuntimeError("a message that cannot be taken in")
        self._inbox.put(message)

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(1.0)

    def _run(self) -> None:
        while True:
            messages = [self._inbox.get()]
            while not self._inbox.empty():
                messages.append(self._inbox.get())
            self.turn_started = self._clock.now()
            answers: list[FromPredict] = []
            for message in messages:
                if message is None:
                    self._outbox.send_all(answers)
                    return
                answers += self._answers(message)
                if len(answers) >= MANY_PER_ANSWER:
                    self._outbox.send_all(answers)
                    answers = []
            self._outbox.send_all(answers)
            self.turn_started = None

    def _answers(self, message: ToPredict) -> list[FromPredict]:
        match message:
            case CancelCall(call_id):
                self._num_cancelled += self._kept.pop(call_id, None) is not None
                return []
            case PredictCall():
                try:
                    return self._call(message)
                except Exception as error:  # noqa: BLE001 - told as it would be by the real one
                    return [call_failed(message.call_id, error)]
            case PredictOp(op_id, op):
                try:
                    return self._op(op_id, op)
                except Exception as error:  # noqa: BLE001 - likewise
                    return [op_failed(op_id, error)]
        raise AssertionError(message)

    def _call(self, call: PredictCall) -> list[FromPredict]:
        match call.model:
            case "echo":
                return [answer_of(call)]
            case "kept":
                self._kept[call.call_id] = call
                return []
            case "release":
                kept, self._kept = list(self._kept.values()), {}
                return [*map(answer_of, reversed(kept)), answer_of(call)]
            case "fail":
                kind = FailureKind(call.version)
                return [CallFailed(call.call_id, kind, "so it is", index=1, part="text", retry_after_s=2.5)]
            case "raise":
                raise RuntimeError("/srv/secret/model.bin is broken")
            case "large":
                return [PredictAnswer(call.call_id, "1", (Output(bytes(70 << 20)),), CallStats())]
            case "count":
                return [PredictAnswer(call.call_id, str(self._num_cancelled), (), CallStats())]
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                threading.Event().wait()
            case "grip":
                began_s = time.perf_counter()
                sum(range(1_000_000))
                per_second = 1_000_000 / (time.perf_counter() - began_s)
                sum(range(int(GRIP_S * per_second)))
                return [answer_of(call)]
        raise UnknownModelError("no such model is served here")

    def _op(self, op_id: int, op: object) -> list[FromPredict]:
        match op:
            case ListModels():
                stats = PredictStats(num_loads=self._num_described)
                return [stats, OpDone(op_id, self._list())]
            case DescribeModel(model, version):
                self._num_described += 1
                version = self._aliases.get((model, version), (version or "1", 0.0))[0]
                return [OpDone(op_id, OneModel(self._status(model, version)))]
            case LoadModel(model, version, source):
                version = version or str(1 + sum(name == model for name, _ in self._versions))
                if source:
                    self._versions.setdefault((model, version), ModelPhase.UNLOADED)
                if op.lazy:
                    return [OpDone(op_id, OneModel(self._status(model, version)))]
                before = self._status(model, version)
                self._versions[model, version] = ModelPhase.READY
                return [
                    OpProgress(op_id, before, "reading", 1, 2),
                    OpProgress(op_id, before, "reading", 2, 2),
                    OpDone(op_id, OneModel(self._status(model, version))),
                ]
            case UnloadModel(model, version):
                names = [key for key in self._versions if key[0] == model and version in ("", key[1])]
                for key in names:
                    self._versions[key] = ModelPhase.FAILED  # stands for: kept unloaded
                return [OpDone(op_id, ModelList(tuple(self._status(*key) for key in names)))]
            case SetAlias(model, alias, version, share):
                if share is not None and share > 1:
                    raise InputError("must be between 0 and 1", part="traffic_share")
                if not version:
                    self._aliases.pop((model, alias), None)
                    return [OpDone(op_id, self._list(model))]
                self._status(model, version)
                present = self._aliases.get((model, alias), ("", 0.0))[1]
                self._aliases[model, alias] = (version, present if share is None else share)
                return [OpDone(op_id, self._list(model))]
            case ClearReuse(_, version):
                events = (ReuseEvent(kind=EventKind.ALARM, key=str(i)) for i in range(int(version)))
                return [ReuseEvents(tuple(events)), OpDone(op_id, NumCleared(int(version)))]
        raise AssertionError(op)

    def _list(self, model: str = "") -> ModelList:
        return ModelList(tuple(self._status(*key) for key in self._versions if model in ("", key[0])))

    def _status(self, model: str, version: str) -> ModelStatus:
        if (model, version) not in self._versions:
            raise UnknownModelError("no such version")
        named = {key[1]: target for key, target in self._aliases.items() if key[0] == model}
        return ModelStatus(
            name=model,
            version=version,
            phase=self._versions[model, version],
            source_kind="folder",
            aliases=tuple(sorted(alias for alias, target in named.items() if target[0] == version)),
            traffic_share=sum(share for target, share in named.values() if target == version),
        )


def answer_of(call: PredictCall) -> PredictAnswer:
    """Return the rows as they came."""
    return PredictAnswer(call.call_id, "1", (Output(call.inputs.rows),), CallStats())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    sys.exit(serve(parser.parse_args().fd, TinyHost))
