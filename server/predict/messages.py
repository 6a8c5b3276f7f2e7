"""Messages between the front end and the predict process. MessagePack, typed, no pickle.

::

    front end                                   predict process
       | -- PredictStart (options) -----------------> |   first frame, exactly once
       | <------------------------- Heartbeat ------- |   all the time (server.process.messages)
       | <----------------- PredictReady, or Fault -- |
       | -- PredictCall, CancelCall, PredictOp -----> |
       | <------------ PredictAnswer, CallFailed ---- |   exactly one for each PredictCall, in any order
       | <------------ OpDone, OpFailed, OpProgress - |
       | <------------ PredictStats, ReuseEvents ---- |

Numbers travel as bytes: little-endian float32, row after row.
"""

from __future__ import annotations

import enum

import msgspec

from server.predict.options import PredictOptions

__all__ = [
    "CallFailed",
    "CallStats",
    "CancelCall",
    "ClearReuse",
    "DescribeModel",
    "EventKind",
    "FailureKind",
    "FromPredict",
    "GetReuse",
    "Inputs",
    "IntervalReport",
    "KeyReport",
    "ListModels",
    "LoadModel",
    "ModelInfo",
    "ModelList",
    "ModelPhase",
    "ModelStats",
    "ModelStatus",
    "NumCleared",
    "OneModel",
    "OpDone",
    "OpFailed",
    "OpProgress",
    "Output",
    "PolicyReport",
    "PredictAnswer",
    "PredictCall",
    "PredictOp",
    "PredictReady",
    "PredictStart",
    "PredictStats",
    "ReuseEvent",
    "ReuseEvents",
    "ReuseReport",
    "RiskReport",
    "SetAlias",
    "Task",
    "TextItem",
    "ToPredict",
    "UnloadModel",
]


class Task(enum.Enum):
    """What a model does."""

    CLASSIFY = "classify"
    CLASSIFY_TOKENS = "classify_tokens"
    REGRESS = "regress"
    EMBED = "embed"
    FEATURES = "features"


# ---- calls ----


class TextItem(msgspec.Struct, frozen=True, array_like=True):
    """A text, or a pair of them."""

    text: str
    pair: str | None = None


class Inputs(msgspec.Struct, frozen=True, array_like=True):
    """Either texts, or rows of features: ``num_rows`` times the same number of float32."""

    texts: tuple[TextItem, ...] = ()
    rows: bytes = b""
    num_rows: int = 0

    @property
    def count(self) -> int:
        """Return how many inputs there are."""
        return len(self.texts) or self.num_rows


class PredictCall(msgspec.Struct, frozen=True, tag="predict"):
    """Compute something."""

    call_id: int
    model: str
    version: str
    """Version or alias; empty: as routed."""
    inputs: Inputs
    task: Task | None = None
    """What the caller takes it for; None: whatever the model does."""
    truncate: bool = False
    reuse: bool = True
    deadline_s: float | None = None
    """Seconds left when it was sent."""
    tenant: str = ""
    """Salt that keeps callers apart: what was computed for one is never reused for another."""


class CancelCall(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for it any more. Unknown ids are ignored."""

    call_id: int


class Output(msgspec.Struct, frozen=True, array_like=True):
    """The answer to one input.

    ``values`` by task: CLASSIFY a probability for each label; REGRESS the numbers; EMBED the vector; FEATURES
    one number; CLASSIFY_TOKENS a probability for the best label of each token, of which ``tokens`` has
    (index of the label, start, end, part).
    """

    values: bytes
    num_tokens: int = 0
    truncated: bool = False
    cache_hit: bool = False
    tokens: tuple[tuple[int, int, int, int], ...] = ()
    policy: str = ""
    """Reuse policy that answered; empty if the model reuses nothing."""


class CallStats(msgspec.Struct, frozen=True, array_like=True):
    """Where a call's time went, in seconds; of the batches that it went into the largest."""

    load_s: float = 0.0
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    batch_size: int = 0
    batch_tokens: int = 0


class PredictAnswer(msgspec.Struct, frozen=True, tag="answer"):
    """A call's outputs, in the order of its inputs."""

    call_id: int
    version: str
    outputs: tuple[Output, ...]
    stats: CallStats


class FailureKind(enum.Enum):
    """Which exception of ``server.predict.errors`` it was."""

    INPUT = "input"
    UNKNOWN_MODEL = "unknown_model"
    WRONG_TASK = "wrong_task"
    MODEL_REFUSED = "model_refused"
    MODEL_EXISTS = "model_exists"
    MODEL_TOO_LARGE = "model_too_large"
    MODEL_IN_USE = "model_in_use"
    MODEL_UNLOADED = "model_unloaded"
    OVERLOADED = "overloaded"
    LOST = "lost"
    EXPIRED = "expired"
    COMPUTE = "compute"
    QUARANTINED = "quarantined"
    INTERNAL = "internal"


class CallFailed(msgspec.Struct, frozen=True, tag="failed"):
    """A call that has no answer. Nothing of it was kept."""

    call_id: int
    kind: FailureKind
    reason: str
    """Fit for clients."""
    index: int | None = None
    part: str = ""
    retry_after_s: float | None = None


# ---- models ----


class ModelPhase(enum.Enum):
    """Where a version of the catalogue stands."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a loaded model."""

    task: Task
    family: str
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    num_dimensions: int = 0
    num_features: int = 0
    max_length: int = 0
    pooling: str = ""
    normalized: bool = False
    fingerprint: str = ""
    num_parameters: int = 0
    num_bytes: int = 0
    """Memory that it takes, or will take at most."""
    dtype: str = ""
    device: str = ""
    executor: str = ""
    notes: tuple[str, ...] = ()
    """For the log."""


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the catalogue."""

    name: str
    version: str
    phase: ModelPhase
    source_kind: str
    """"folder", "hub", "mlflow" or "features"."""
    aliases: tuple[str, ...] = ()
    traffic_share: float = 0.0
    info: ModelInfo | None = None
    """Of the last load."""
    load_s: float = 0.0
    num_running: int = 0
    num_requests: int = 0
    num_inputs: int = 0
    idle_s: float | None = None
    held: bool = False
    """An operator unloaded it: calls do not load it again."""
    fault: str = ""
    """Why it is FAILED; fit for clients."""


class ListModels(msgspec.Struct, frozen=True, tag="list"):
    """Ask for a :class:`ModelList`."""


class DescribeModel(msgspec.Struct, frozen=True, tag="describe"):
    """Ask for the one :class:`ModelStatus` that a call with this version (or alias, or none) would go to."""

    model: str
    version: str = ""


class LoadModel(msgspec.Struct, frozen=True, tag="load"):
    """Load a version; ends with its :class:`ModelStatus`, with :class:`OpProgress` on the way."""

    model: str
    version: str = ""
    source: str = ""
    task: str = ""
    pooling: str = ""
    lazy: bool = False
    """Enter it into the catalogue and answer; it is loaded on first use."""


class UnloadModel(msgspec.Struct, frozen=True, tag="unload"):
    """Unload a version (empty: all); ends with a :class:`ModelList` of them."""

    model: str
    version: str = ""
    drain_s: float | None = None


class SetAlias(msgspec.Struct, frozen=True, tag="alias"):
    """Let an alias name a version (empty: take it away); ends with a :class:`ModelList` of the model."""

    model: str
    alias: str
    version: str = ""
    traffic_share: float | None = None


class GetReuse(msgspec.Struct, frozen=True, tag="reuse"):
    """Ask for a :class:`ReuseReport`."""

    model: str
    version: str = ""
    max_keys: int = 0


class ClearReuse(msgspec.Struct, frozen=True, tag="clear_reuse"):
    """Forget what is kept for reuse; ends with the number of entries."""

    model: str
    version: str = ""


class PredictOp(msgspec.Struct, frozen=True, tag="op"):
    """An operation on models; answered by OpDone or OpFailed."""

    op_id: int
    op: ListModels | DescribeModel | LoadModel | UnloadModel | SetAlias | GetReuse | ClearReuse


class ModelList(msgspec.Struct, frozen=True, tag="models"):
    """Versions, by name and then in the order of versions."""

    models: tuple[ModelStatus, ...]
    num_bytes: int = 0
    memory_bytes: int = 0
    """0: no limit."""


class OneModel(msgspec.Struct, frozen=True, tag="model"):
    """One version."""

    model: ModelStatus


class NumCleared(msgspec.Struct, frozen=True, tag="cleared"):
    """Entries that were forgotten."""

    count: int


# ---- reuse ----


class IntervalReport(msgspec.Struct, frozen=True, array_like=True):
    """As ``kvcore.risk.Interval``."""

    lower: float
    estimate: float
    upper: float
    weight: float


class RiskReport(msgspec.Struct, frozen=True):
    """As ``kvcore.risk.RiskEstimate``, with its verdicts."""

    changed: IntervalReport
    cosine_distance: IntervalReport
    l2: IntervalReport
    num_compared: int
    over_budget: bool
    proven_safe: bool


class KeyReport(msgspec.Struct, frozen=True):
    """One key of a policy."""

    key: str
    risk: RiskReport
    lifetime_s: float
    stopped: bool
    num_hits: int


class PolicyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one reuse policy is and did; the fields are those of ``kvserve.v1.ReusePolicy``."""

    name: str
    traffic_share: float
    num_key_features: int = 0
    bin_width: float = 0.0
    threshold: float = 0.0
    lifetime_s: float = 0.0
    min_lifetime_s: float = 0.0
    max_lifetime_s: float = 0.0
    max_changed: float = 0.0
    max_cosine_distance: float = 0.0
    max_l2: float = 0.0
    max_error: float = 0.0
    sample_share: float = 0.0
    num_entries: int = 0
    max_entries: int = 0
    num_bytes: int = 0
    num_lookups: int = 0
    num_hits: int = 0
    num_absent: int = 0
    num_expired: int = 0
    num_stopped: int = 0
    num_uncertified: int = 0
    num_evicted: int = 0
    num_alarms: int = 0
    num_stopped_keys: int = 0
    risk: RiskReport
    keys: tuple[KeyReport, ...] = ()
    hit_s: float = 0.0
    miss_s: float = 0.0
    stopped: bool = False


class ReuseReport(msgspec.Struct, frozen=True, tag="reuse_report"):
    """How a model reuses."""

    model: str
    version: str
    kind: str
    """"features" or "semantic"."""
    policies: tuple[PolicyReport, ...]


class EventKind(enum.Enum):
    """What happened to reuse."""

    ALARM = "alarm"
    RECOVERED = "recovered"
    LIFETIME = "lifetime"
    STOPPED = "stopped"
    RESUMED = "resumed"
    LOST = "lost"


class ReuseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event; the fields are those of ``kvserve.v1.ReuseEvent``."""

    kind: EventKind
    model: str = ""
    version: str = ""
    policy: str = ""
    key: str = ""
    measure: str = ""
    interval: IntervalReport | None = None
    limit: float = 0.0
    lifetime_s: float = 0.0
    num_lost: int = 0


class ReuseEvents(msgspec.Struct, frozen=True, tag="reuse_events"):
    """Events since the last message of this kind; sent without being asked for."""

    events: tuple[ReuseEvent, ...]


class OpDone(msgspec.Struct, frozen=True, tag="op_done"):
    """An operation's result."""

    op_id: int
    result: ModelList | OneModel | ReuseReport | NumCleared


class OpFailed(msgspec.Struct, frozen=True, tag="op_failed"):
    """Why an operation was not done."""

    op_id: int
    kind: FailureKind
    reason: str
    part: str = ""
    """Field of the operation that it is about."""
    retry_after_s: float | None = None


class OpProgress(msgspec.Struct, frozen=True, tag="op_progress"):
    """How a load goes."""

    op_id: int
    status: ModelStatus
    phase: str = ""
    """"fetching", "checking", "reading", "building"."""
    done_bytes: int = 0
    total_bytes: int = 0


# ---- the process ----


class ModelStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one model version since the process started; for metrics."""

    name: str
    version: str
    num_calls: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    """The rest of the calls was answered."""
    num_inputs: int = 0
    num_tokens: int = 0
    num_batches: int = 0
    compute_s: float = 0.0
    queue_s: float = 0.0
    """Sum over calls."""
    num_padding_tokens: int = 0
    is_loaded: bool = False
    num_bytes: int = 0
    policies: tuple[PolicyReport, ...] = ()


class PredictStats(msgspec.Struct, frozen=True, kw_only=True, tag="predict_stats"):
    """A snapshot, sent about once a second while something happens."""

    models: tuple[ModelStats, ...] = ()
    num_waiting_inputs: int = 0
    num_waiting_tokens: int = 0
    num_calls: int = 0
    """That are open."""
    num_bytes: int = 0
    memory_bytes: int = 0
    num_loads: int = 0
    num_failed_loads: int = 0
    num_evictions: int = 0
    load_s: float = 0.0


class PredictReady(msgspec.Struct, frozen=True, tag="predict_ready"):
    """The process takes calls; models marked ``preload`` are loaded."""

    num_models: int
    num_threads: int
    device: str
    preloaded: tuple[ModelStatus, ...] = ()


class PredictStart(msgspec.Struct, frozen=True, tag="predict_start"):
    """What the process shall become."""

    options: PredictOptions
    heartbeat_s: float = 0.5
    debug: bool = False
    log_format: str = "text"
    log_level: str = "info"


ToPredict = PredictCall | CancelCall | PredictOp
FromPredict = (
    PredictReady | PredictAnswer | CallFailed | OpDone | OpFailed | OpProgress | PredictStats | ReuseEvents
)
