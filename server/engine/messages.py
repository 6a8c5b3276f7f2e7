"""Messages between the front end and an engine, in both directions.

They cross a socket pair as MessagePack (``server.process.link``), or a queue when the engine runs in
the same process. A request is named by ``key``, a number that the front end draws and never reuses;
client-given ids stay in the front end. Times are seconds; ``deadline_s`` is what is left at sending.

Life of a request, seen from the front end::

    Submit --> Admitted --> Tokens ... Tokens --> Finished        exactly one terminal message:
           \\-> Refused                         \\-> Failed          Finished, Refused or Failed
    Cancel --> Finished of the samples cancelled, if the request was still running

Progress comes between Admitted and the first Tokens, for requests that ask for it. What is asked of the
cache itself, and what it tells, is in ``admin_messages``.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from server.engine.admin_messages import (
    AdminCall,
    AdminProgress,
    AdminReply,
    CacheEvents,
    CancelAdmin,
    PrefetchReport,
    TierReport,
    Watch,
)

__all__ = [
    "Admitted",
    "Cancel",
    "Drain",
    "EngineReady",
    "EngineStats",
    "Failed",
    "FailureKind",
    "Finish",
    "Finished",
    "FromEngine",
    "GenerateSpec",
    "Outputs",
    "Progress",
    "Refused",
    "RequestTimings",
    "RequestUsage",
    "RestoreReport",
    "Submit",
    "ToEngine",
    "Tokens",
]


class Finish(StrEnum):
    """Why a sample ended."""

    LENGTH = "length"
    EOS = "eos"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    CANCELLED = "cancelled"


class FailureKind(StrEnum):
    """Why the engine refused or gave up a request; the front end maps it to a status code."""

    QUEUE_FULL = "queue_full"
    TOO_LARGE = "too_large"
    """The request can never fit the KV pool."""
    DEADLINE = "deadline"
    DRAINING = "draining"
    NOT_LOADED = "not_loaded"
    """The model was unloaded, or is being unloaded."""
    ENGINE_LOST = "engine_lost"
    """The engine process died or was restarted."""
    NUMERICAL = "numerical"
    """The model produced logits that are not finite for this request."""
    OUT_OF_MEMORY = "out_of_memory"
    """A step needed more memory than there is; the same request may fit when less is running."""
    INTERNAL = "internal"
    QUARANTINED = "quarantined"
    """The engine process has died each time with this request in it, so that it is not tried for a while."""


class GenerateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A validated request: nothing in it can make the engine or the worker fail."""

    token_ids: list[int]
    max_new_tokens: int
    min_new_tokens: int = 0
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_top_logprobs: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """The model's own; empty when the request ignores them."""
    stop_token_ids: tuple[int, ...] = ()
    priority: int = 0
    salt: str = ""
    """Namespace salt of the tenant; never given by the client as such."""
    use_kv_cache: bool = True
    read_prefix: bool = True
    write_prefix: bool = True
    lifetime_s: float | None = None
    """How long entries left behind stay valid; None: the engine's default."""
    report_progress: bool = False
    """Say ``Progress`` after every step that computed part of the prompt."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Take a request."""

    key: int
    spec: GenerateSpec
    deadline_s: float | None = None
    """Seconds left until nobody waits for the answer any more."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End a request early, or one of its samples. Unknown keys are ignored: it may have just finished."""

    key: int
    sample_index: int | None = None
    """None: the whole request."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Admit nothing new, finish what runs, then end."""


ToEngine = Submit | Cancel | Drain | AdminCall | CancelAdmin | Watch


class RequestUsage(msgspec.Struct, frozen=True):
    """Where the prompt's tokens came from; the five kinds add up to ``prompt_tokens``."""

    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    cached_tail_tokens: int
    computed_prompt_tokens: int
    generated_tokens: int
    restored_tokens: int = 0
    """Brought back for this request from a tier, as whole blocks."""


class RestoreReport(msgspec.Struct, frozen=True):
    """What became of the part of a prompt that was in a tier and not on the device."""

    decision: str
    """ "fetch" or "recompute"."""
    tier: str
    """The one that had most of it."""
    found_tokens: int
    restored_tokens: int
    """Those that came in time."""
    expected_fetch_s: float
    expected_recompute_s: float
    fetch_s: float
    """From the first fetch to the last block in place."""
    wait_s: float
    """The part of it for which nothing else held the request up."""


class RequestTimings(msgspec.Struct, frozen=True):
    """What the engine can measure, in seconds."""

    queue_s: float
    lookup_s: float
    prefill_s: float
    decode_s: float
    num_preemptions: int = 0
    restore: RestoreReport | None = None
    """None: no tier had any of the prompt."""


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """The request is part of a step now; sent with (before) its first outputs at the latest."""

    key: int
    num_cached_tokens: int


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How many positions of the prompt have their KV, those found in the cache included."""

    key: int
    num_computed: int


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """New tokens of one sample, usually one. A token that ends the sample is included."""

    key: int
    sample_index: int
    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    finish: Finish | None = None


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """All samples have ended; everything the request held is free again."""

    key: int
    usage: RequestUsage
    timings: RequestTimings


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request was never admitted."""

    key: int
    kind: FailureKind
    reason: str
    retry_after_s: float | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """An admitted request ended without finishing."""

    key: int
    kind: FailureKind
    reason: str


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded. Everything the front end shows about it."""

    family: str
    fingerprint: str
    num_parameters: int
    vocab_size: int
    max_model_length: int
    dtype: str
    device: str
    executor: str
    attention: str
    block_size: int
    num_blocks: int
    bytes_per_block: int
    num_threads: int
    waiting_bound_s: float
    load_s: float
    notes: list[str] = []
    """What an operator should know, for example why the fast executor was not used."""
    policy: str = ""
    """Of eviction; by its own name, where the options have another one for it."""
    num_tier_objects: dict[str, int] = {}
    """What tiers that outlive the process were found to hold."""


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """A snapshot for metrics, sent at most a few times a second. Counters run from the engine's start."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_leased: int
    """Held by running requests and hard pins."""
    num_blocks_cached: int
    """Held by the tree alone: reusable, and free memory at the same time."""
    num_blocks_free: int
    steps: int
    step_s: float
    """Sum over all steps."""
    plan_s: float
    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    cached_tail_tokens: int
    computed_prompt_tokens: int
    recomputed_tokens: int
    """Computed again after a preemption (or because the request asked for it): work, not prompt."""
    generated_tokens: int
    requests_finished: int
    requests_failed: int
    preemptions: int
    evicted_blocks: int
    expired_blocks: int
    grouped_tokens: int
    """Query tokens that attended to a prefix together with another sequence's."""
    restored_tokens: int = 0
    """Prompt tokens brought back from tiers."""
    evicted_by_cause: dict[str, int] = {}
    """Blocks: capacity, quota, admin, released."""
    pinned_blocks: int = 0
    tiers: list[TierReport] = []
    prefetch: PrefetchReport | None = None
    trial_cost_share: float = 0.0
    """Share of the engine's time that policies on trial have taken."""


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """Everything one step has to say, in one message."""

    events: list[Admitted | Progress | Tokens | Finished | Refused | Failed]


FromEngine = EngineReady | Outputs | EngineStats | AdminReply | AdminProgress | CacheEvents
