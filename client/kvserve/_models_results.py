"""What the calls about models and reuse return: frozen values, field for field what the contract says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from kvserve._predict_results import PredictTask

__all__ = [
    "LoadProgress",
    "ModelList",
    "ModelState",
    "ModelStatus",
    "ReuseEvent",
    "ReuseEventKind",
    "ReuseKey",
    "ReusePolicy",
    "ReuseReport",
    "ReuseRisk",
    "RiskInterval",
]


class ModelState(StrEnum):
    """Where a model is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    UNLOADED = "unloaded"
    FAILED = "failed"
    OTHER = "other"
    """A state that this version of the client doesn't know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """A model of the server: the one that generates, or one version of a predict model."""

    name: str
    state: ModelState
    fingerprint: str
    kind: str
    """"generate" or "predict"."""
    num_parameters: int
    kv_bytes: int
    load_s: float
    running_requests: int
    fault: str
    """Why it is not READY, where that is a fault."""
    version: str = ""
    """Of a predict model, and so all below."""
    task: PredictTask | None = None
    """None: not known before it is loaded."""
    num_bytes: int = 0
    """Memory that it takes while loaded."""
    aliases: tuple[str, ...] = ()
    """Names of this version: "latest", "canary" and the like."""
    traffic_share: float = 0.0
    """Share of the calls without a version that go to this one."""
    source_kind: str = ""
    """Where it comes from: "folder", "hub", "mlflow", "features" or "builtin"."""
    num_requests: int = 0
    idle_s: float | None = None
    """Since a request last used it; None if none did."""


class ModelList(tuple[ModelStatus, ...]):  # noqa: SLOT001  # a tuple has none to add to
    """All models, and the memory that the predict models among them take."""

    _predict_bytes: int
    _predict_memory: int | None

    def __new__(
        cls, models: Iterable[ModelStatus] = (), *, predict_bytes: int = 0, predict_memory: int | None = None
    ) -> Self:
        self = super().__new__(cls, models)
        self._predict_bytes = predict_bytes
        self._predict_memory = predict_memory
        return self

    @property
    def predict_bytes(self) -> int:
        """Return what the predict models that are loaded take."""
        return self._predict_bytes

    @property
    def predict_memory(self) -> int | None:
        """Return the most that they may take; None: no limit."""
        return self._predict_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far a model is; the last one is the result."""

    status: ModelStatus
    elapsed_s: float
    done: bool
    phase: str = ""
    """What is being done: "fetching", "checking", "reading" or "building"; empty where nothing is known."""
    done_bytes: int = 0
    """Of this phase."""
    total_bytes: int = 0
    """0: not known."""


# ---- reuse under drift ----


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskInterval:
    """An estimate, and between what the truth lies with 95% confidence at each end."""

    lower: float
    estimate: float
    upper: float
    weight: float
    """Comparisons that it rests on, the forgotten ones apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseRisk:
    """What reuse costs in correctness, from hits that were compared with a fresh computation."""

    changed: RiskInterval
    """Share of the compared reuses whose prediction was another one."""
    cosine_distance: RiskInterval
    l2: RiskInterval
    """Length of the difference over the fresh one's."""
    num_compared: int
    over_budget: bool
    proven_safe: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseKey:
    """One key, with its own risk."""

    key: str
    """A digest: what it says of the inputs stays in the server."""
    risk: ReuseRisk
    lifetime_s: float
    stopped: bool
    """Reuse has stopped for this key."""
    num_hits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReusePolicy:
    """One policy, the main one or a canary: what it is, what it did, what it risks. None: no such limit."""

    name: str
    traffic_share: float
    num_key_features: int
    """Features that make the key; 0 for a semantic cache."""
    bin_width: float
    """0: exact."""
    threshold: float
    """Of a semantic cache: least similarity for a hit. Above 1: nothing is reused yet."""
    lifetime_s: float | None
    """Of a new entry; it adapts between the two bounds."""
    min_lifetime_s: float | None
    max_lifetime_s: float | None
    max_changed: float | None
    """The budget, and so the next two."""
    max_cosine_distance: float | None
    max_l2: float | None
    max_error: float | None
    """With a certificate: the bound on a prediction's error under which alone something is reused."""
    sample_share: float
    """Share of hits that are compared with a fresh computation."""
    num_entries: int
    max_entries: int
    num_bytes: int
    num_lookups: int
    num_hits: int
    num_absent: int
    """Misses: nothing there, and so the next three for other causes."""
    num_expired: int
    num_stopped: int
    num_uncertified: int
    """Displaced too far for the certificate."""
    num_evicted: int
    num_alarms: int
    num_stopped_keys: int
    risk: ReuseRisk
    keys: tuple[ReuseKey, ...]
    """Those with the highest risk, as many as were asked for."""
    hit_s: float
    """Mean time of a row or text with reuse."""
    miss_s: float
    stopped: bool
    """Reuse has stopped for the policy as a whole; it is probed and taken up again."""

    @property
    def hit_rate(self) -> float | None:
        """Return the share of lookups that were hits; None before the first."""
        return self.num_hits / self.num_lookups if self.num_lookups else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseReport:
    """What reuse costs and saves in one version of a model."""

    model: str
    version: str
    kind: str
    """"features" or "semantic"."""
    policies: tuple[ReusePolicy, ...]


class ReuseEventKind(StrEnum):
    """What happened to reuse."""

    STARTED = "started"
    """The watch has begun: what happens from here on is told."""
    ALARM = "alarm"
    """The budget is broken, for a key or over all."""
    RECOVERED = "recovered"
    """It is kept again."""
    LIFETIME = "lifetime"
    """A lifetime was changed, for a key or for new entries."""
    STOPPED = "stopped"
    """No reuse for this key any more."""
    RESUMED = "resumed"
    LOST = "lost"
    """``num_lost`` events came too fast to be told."""
    OTHER = "other"
    """A kind that this version of the client doesn't know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseEvent:
    """One thing that happened to the reuse of a model."""

    kind: ReuseEventKind
    model: str = ""
    version: str = ""
    policy: str = ""
    key: str = ""
    """Empty: over all keys."""
    measure: str = ""
    """Of an alarm: "changed", "cosine_distance" or "l2", with its interval and the limit."""
    interval: RiskInterval | None = None
    limit: float = 0.0
    lifetime_s: float = 0.0
    num_lost: int = 0
