"""A predict backend without a process: honest small computations, and faults when a test asks for them.

Models (``MODELS``): a classifier by length, a multi-label one, a tagger of characters, a regression,
vectors of letter counts, and a predictor over 4 features. Versions and labels can be changed while calls run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from server.predict.errors import (
    InputError,
    ModelRefusedError,
    PredictLostError,
    UnknownModelError,
    WrongTaskError,
)
from server.predict.interface import PredictState
from server.predict.messages import (
    CallStats,
    ClearReuse,
    GetReuse,
    Inputs,
    IntervalReport,
    KeyReport,
    LoadModel,
    ModelInfo,
    ModelList,
    ModelPhase,
    ModelStatus,
    OpProgress,
    Output,
    PolicyReport,
    PredictAnswer,
    PredictReady,
    PredictStats,
    ReuseEvent,
    ReuseReport,
    RiskReport,
    SetAlias,
    Task,
    TextItem,
    UnloadModel,
)

MAX_CHARS = 100
NUM_FEATURES = 4


def status(name: str, info: ModelInfo | None, *, version: str = "1", **fields: object) -> ModelStatus:
    kind = "features" if info is not None and info.task is Task.FEATURES else "folder"
    return ModelStatus(
        name=name,
        version=version,
        phase=ModelPhase.UNLOADED if info is None else ModelPhase.READY,
        source_kind=kind,
        info=info,
        **fields,  # type: ignore[arg-type]
    )


SIZES = ModelInfo(
    task=Task.CLASSIFY,
    family="bert",
    labels=("short", "middle", "long"),
    max_length=MAX_CHARS,
    num_bytes=1000,
)
TOPICS = ModelInfo(task=Task.CLASSIFY, family="roberta", labels=("a", "b", "c", "d"), multi_label=True)
TAGGER = ModelInfo(task=Task.CLASSIFY_TOKENS, family="bert", labels=("lower", "upper"))
LENGTH = ModelInfo(task=Task.REGRESS, family="bert", num_dimensions=2)
LETTERS = ModelInfo(task=Task.EMBED, family="bert", num_dimensions=26, pooling="mean", normalized=True)
RISK = ModelInfo(task=Task.FEATURES, family="features", num_features=NUM_FEATURES)
MODELS = {
    "sizes": SIZES,
    "topics": TOPICS,
    "tagger": TAGGER,
    "length": LENGTH,
    "letters": LETTERS,
    "risk": RISK,
}


STATS = CallStats(0.5, 0.25, 0.125, 0.0625, 7, 70)


@dataclass(frozen=True, slots=True)
class Asked:
    """One call of ``predict``."""

    model: str
    inputs: Inputs
    version: str
    task: Task | None
    truncate: bool
    reuse: bool
    deadline_s: float | None
    tenant: str


@dataclass
class ScriptedPredict:
    """Implements ``PredictBackend``. ``before`` runs before each computation: it may wait, or raise."""

    catalogue: list[ModelStatus] = field(default_factory=lambda: [status(n, i) for n, i in MODELS.items()])
    before: Callable[[Asked], Awaitable[None]] | None = None
    stats_of_calls: CallStats = STATS
    asked: list[Asked] = field(default_factory=list)
    ops: list[object] = field(default_factory=list)
    progress: list[OpProgress | ModelStatus | Exception] = field(default_factory=list)
    fails: Exception | None = None
    """Raised by every operation on models."""
    state: PredictState = PredictState.READY
    ready: PredictReady | None = None
    stats: PredictStats | None = None
    num_restarts: int = 0
    num_open_calls: int = 0
    num_cancelled: int = 0
    stopped_with: float | None = None
    events: asyncio.Queue[ReuseEvent | Exception | None] = field(default_factory=asyncio.Queue)
    num_watchers: int = 0

    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        task: Task | None = None,
        truncate: bool = False,
        reuse: bool = True,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> PredictAnswer:
        if self.state is not PredictState.READY:
            raise PredictLostError("the predict process is not running", retry_after_s=0.5)
        asked = Asked(model, inputs, version, task, truncate, reuse, deadline_s, tenant)
        self.asked.append(asked)
        self.num_open_calls += 1
        try:
            found = self._find(model, version)
            assert found.info is not None
            if self.before is not None:
                await self.before(asked)
            outputs = compute(found.info, inputs, task=task, truncate=truncate)
            return PredictAnswer(len(self.asked), found.version, outputs, self.stats_of_calls)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open_calls -= 1

    async def models(self) -> ModelList:
        self._check()
        return ModelList(tuple(self.catalogue), num_bytes=1000, memory_bytes=5000)

    async def describe(self, model: str, version: str = "") -> ModelStatus:
        self._check()
        return self._find(model, version)

    async def load(self, op: LoadModel) -> AsyncGenerator[OpProgress | ModelStatus]:
        self.ops.append(op)
        self._check()
        for message in self.progress:
            if isinstance(message, Exception):
                raise message
            yield message

    async def unload(self, op: UnloadModel) -> ModelList:
        self.ops.append(op)
        self._check()
        gone = [msgspec.structs.replace(m, phase=ModelPhase.UNLOADED) for m in self._versions(op.model)]
        return ModelList(tuple(model for model in gone if op.version in ("", model.version)))

    async def set_alias(self, op: SetAlias) -> ModelList:
        self.ops.append(op)
        self._check()
        self._find(op.model, op.version)
        self.catalogue = [
            msgspec.structs.replace(
                model,
                aliases=(op.alias,) if model.version == op.version else (),
                traffic_share=op.traffic_share or 0.0,
            )
            if model.name == op.model
            else model
            for model in self.catalogue
        ]
        return ModelList(tuple(self._versions(op.model)))

    async def reuse(self, op: GetReuse) -> ReuseReport:
        self.ops.append(op)
        self._check()
        found = self._find(op.model, op.version)
        if found.name != "risk":
            raise WrongTaskError("this model reuses nothing")
        return ReuseReport(found.name, found.version, "features", (POLICY,))

    async def clear_reuse(self, op: ClearReuse) -> int:
        self.ops.append(op)
        self._check()
        self._find(op.model, op.version)
        return 42

    async def watch_reuse(self) -> AsyncGenerator[ReuseEvent]:
        self.num_watchers += 1
        try:
            while (event := await self.events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.num_watchers -= 1

    async def stop(self, *, grace_s: float) -> None:
        self.stopped_with = grace_s
        self.state = PredictState.DEAD
        self.events.put_nowait(None)

    def _check(self) -> None:
        if self.fails is not None:
            raise self.fails

    def _versions(self, model: str) -> list[ModelStatus]:
        found = [one for one in self.catalogue if one.name == model]
        if not found:
            raise UnknownModelError("no such model is served here")
        return found

    def _find(self, model: str, version: str) -> ModelStatus:
        versions = self._versions(model)
        named = [one for one in versions if version in ("", one.version, *one.aliases)]
        if not named:
            raise UnknownModelError("the model has no such version or alias")
        return named[-1]


def compute(info: ModelInfo, inputs: Inputs, *, task: Task | None, truncate: bool) -> tuple[Output, ...]:
    if (info.task is Task.FEATURES) != bool(inputs.rows):
        raise WrongTaskError("the model takes " + ("texts" if inputs.rows else "rows of features"))
    if task not in (None, info.task):
        raise WrongTaskError("the model gives no vectors")
    if inputs.rows:
        values = np.frombuffer(inputs.rows, "<f4").reshape(inputs.num_rows, -1)
        if values.shape[1] != NUM_FEATURES:
            raise InputError(
                f"has {values.shape[1]} values, the model takes {NUM_FEATURES}", index=0, part="values"
            )
        sums = values.sum(axis=1, dtype=np.float64)
        return tuple(
            Output(_bytes([1 / (1 + np.exp(-one))]), cache_hit=bool(row[0] == 0), policy=f"p{int(row[1])}")
            for one, row in zip(sums, values, strict=True)
        )
    return tuple(_of_text(info, item, index, truncate=truncate) for index, item in enumerate(inputs.texts))


def _of_text(info: ModelInfo, item: TextItem, index: int, *, truncate: bool) -> Output:
    text = item.text + (item.pair or "")
    is_long = len(text) > MAX_CHARS
    if is_long and not truncate:
        part = "text" if len(item.text) > MAX_CHARS else "pair"
        raise InputError(f"has more than {MAX_CHARS} tokens", index=index, part=part)
    text = text[:MAX_CHARS]
    tokens: tuple[tuple[int, int, int, int], ...] = ()
    if info.task is Task.CLASSIFY and info.multi_label:
        values = [text.count(label) / (1 + len(text)) * 2 for label in info.labels]
    elif info.task is Task.CLASSIFY:
        num_labels = len(info.labels)
        best = len(text) * num_labels // (MAX_CHARS + 1)
        values = [(3.0 if i == best else 1.0) / (num_labels + 2) for i in range(num_labels)]
    elif info.task is Task.CLASSIFY_TOKENS:
        values = [0.75] * len(item.text)
        tokens = tuple((int(char.isupper()), i, i + 1, 0) for i, char in enumerate(item.text))
    elif info.task is Task.REGRESS:
        values = [float(len(text)), float(text.count(" "))]
    else:
        counts = np.array([text.count(chr(97 + i)) + 0.01 for i in range(26)])
        values = list(counts / np.linalg.norm(counts))
    return Output(_bytes(values), num_tokens=len(text) + 2, truncated=is_long, tokens=tokens)


def _bytes(values: list[float]) -> bytes:
    return np.array(values, "<f4").tobytes()


RISK_REPORT = RiskReport(
    changed=IntervalReport(0.01, 0.02, 0.03, 100.0),
    cosine_distance=IntervalReport(0.1, 0.2, 0.3, 101.0),
    l2=IntervalReport(0.4, 0.5, 0.6, 102.0),
    num_compared=103,
    over_budget=True,
    proven_safe=False,
)
POLICY = PolicyReport(
    name="main",
    traffic_share=0.9,
    num_key_features=24,
    bin_width=0.5,
    threshold=0.95,
    lifetime_s=60.0,
    min_lifetime_s=1.0,
    max_lifetime_s=3600.0,
    max_changed=0.01,
    max_cosine_distance=0.02,
    max_l2=0.03,
    max_error=0.04,
    sample_share=0.05,
    num_entries=1,
    max_entries=2,
    num_bytes=3,
    num_lookups=4,
    num_hits=5,
    num_absent=6,
    num_expired=7,
    num_stopped=8,
    num_uncertified=9,
    num_evicted=10,
    num_alarms=11,
    num_stopped_keys=12,
    risk=RISK_REPORT,
    keys=(KeyReport("0a1b", RISK_REPORT, 30.0, stopped=True, num_hits=13),),
    hit_s=0.001,
    miss_s=0.002,
)
REFUSED = ModelRefusedError("its files are not safetensors")
