import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from kvserve.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PinKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PIN_KIND_UNSPECIFIED: _ClassVar[PinKind]
    PIN_KIND_SOFT: _ClassVar[PinKind]
    PIN_KIND_HARD: _ClassVar[PinKind]

class InUse(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IN_USE_UNSPECIFIED: _ClassVar[InUse]
    IN_USE_FAIL: _ClassVar[InUse]
    IN_USE_SKIP: _ClassVar[InUse]

class CacheEventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_EVENT_KIND_UNSPECIFIED: _ClassVar[CacheEventKind]
    CACHE_EVENT_KIND_STORED: _ClassVar[CacheEventKind]
    CACHE_EVENT_KIND_EVICTED: _ClassVar[CacheEventKind]
    CACHE_EVENT_KIND_EXPIRED: _ClassVar[CacheEventKind]
    CACHE_EVENT_KIND_PINNED: _ClassVar[CacheEventKind]
    CACHE_EVENT_KIND_UNPINNED: _ClassVar[CacheEventKind]
    CACHE_EVENT_KIND_RESTORED: _ClassVar[CacheEventKind]
    CACHE_EVENT_KIND_OFFLOADED: _ClassVar[CacheEventKind]
    CACHE_EVENT_KIND_RESET: _ClassVar[CacheEventKind]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_DRAINING: _ClassVar[ModelState]
    MODEL_STATE_UNLOADED: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]
PIN_KIND_UNSPECIFIED: PinKind
PIN_KIND_SOFT: PinKind
PIN_KIND_HARD: PinKind
IN_USE_UNSPECIFIED: InUse
IN_USE_FAIL: InUse
IN_USE_SKIP: InUse
CACHE_EVENT_KIND_UNSPECIFIED: CacheEventKind
CACHE_EVENT_KIND_STORED: CacheEventKind
CACHE_EVENT_KIND_EVICTED: CacheEventKind
CACHE_EVENT_KIND_EXPIRED: CacheEventKind
CACHE_EVENT_KIND_PINNED: CacheEventKind
CACHE_EVENT_KIND_UNPINNED: CacheEventKind
CACHE_EVENT_KIND_RESTORED: CacheEventKind
CACHE_EVENT_KIND_OFFLOADED: CacheEventKind
CACHE_EVENT_KIND_RESET: CacheEventKind
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_DRAINING: ModelState
MODEL_STATE_UNLOADED: ModelState
MODEL_STATE_FAILED: ModelState

class PrefixSelector(_message.Message):
    __slots__ = ("prefix_id", "text", "token_ids", "chat")
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    prefix_id: str
    text: str
    token_ids: _common_pb2.TokenIds
    chat: _common_pb2.Chat
    def __init__(self, prefix_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., chat: _Optional[_Union[_common_pb2.Chat, _Mapping]] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("model", "namespace")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    model: str
    namespace: str
    def __init__(self, model: _Optional[str] = ..., namespace: _Optional[str] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("model", "fingerprint", "block_size", "bytes_per_block", "num_blocks", "num_blocks_in_use", "num_blocks_cached", "num_blocks_free", "total", "namespaces", "tiers", "pins", "prefetch", "uptime_s", "policy")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    block_size: int
    bytes_per_block: int
    num_blocks: int
    num_blocks_in_use: int
    num_blocks_cached: int
    num_blocks_free: int
    total: CacheStats
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    pins: PinStats
    prefetch: PrefetchStats
    uptime_s: float
    policy: str
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., block_size: _Optional[int] = ..., bytes_per_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_blocks_in_use: _Optional[int] = ..., num_blocks_cached: _Optional[int] = ..., num_blocks_free: _Optional[int] = ..., total: _Optional[_Union[CacheStats, _Mapping]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., pins: _Optional[_Union[PinStats, _Mapping]] = ..., prefetch: _Optional[_Union[PrefetchStats, _Mapping]] = ..., uptime_s: _Optional[float] = ..., policy: _Optional[str] = ...) -> None: ...

class CacheStats(_message.Message):
    __slots__ = ("entries", "blocks", "bytes", "requests", "hits", "misses", "request_hit_rate", "token_hit_rate", "prompt_tokens", "cached_block_tokens", "cached_partial_tokens", "cached_tail_tokens", "restored_tokens", "computed_tokens", "inserted_blocks", "evicted_blocks", "expired_blocks", "pinned_blocks", "restored_blocks", "time_saved_s")
    class EvictedBlocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PARTIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TAIL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INSERTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIME_SAVED_S_FIELD_NUMBER: _ClassVar[int]
    entries: int
    blocks: int
    bytes: int
    requests: int
    hits: int
    misses: int
    request_hit_rate: float
    token_hit_rate: float
    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    cached_tail_tokens: int
    restored_tokens: int
    computed_tokens: int
    inserted_blocks: int
    evicted_blocks: _containers.ScalarMap[str, int]
    expired_blocks: int
    pinned_blocks: int
    restored_blocks: int
    time_saved_s: float
    def __init__(self, entries: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., requests: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., request_hit_rate: _Optional[float] = ..., token_hit_rate: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., cached_block_tokens: _Optional[int] = ..., cached_partial_tokens: _Optional[int] = ..., cached_tail_tokens: _Optional[int] = ..., restored_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., inserted_blocks: _Optional[int] = ..., evicted_blocks: _Optional[_Mapping[str, int]] = ..., expired_blocks: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., restored_blocks: _Optional[int] = ..., time_saved_s: _Optional[float] = ...) -> None: ...

class NamespaceStats(_message.Message):
    __slots__ = ("namespace", "tenant", "stats", "policy", "quota_blocks")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    tenant: str
    stats: CacheStats
    policy: str
    quota_blocks: int
    def __init__(self, namespace: _Optional[str] = ..., tenant: _Optional[str] = ..., stats: _Optional[_Union[CacheStats, _Mapping]] = ..., policy: _Optional[str] = ..., quota_blocks: _Optional[int] = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "is_available", "objects", "bytes", "max_bytes", "hits", "misses", "stored", "fetched", "stored_bytes", "fetched_bytes", "evicted", "expired", "quarantined", "refused_stores", "store_failures", "failures", "latency_s", "read_bytes_per_s", "write_bytes_per_s", "crossover_tokens", "last_fault", "codec", "divergence")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TIER_FIELD_NUMBER: _ClassVar[int]
    IS_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_STORES_FIELD_NUMBER: _ClassVar[int]
    STORE_FAILURES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    WRITE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    CROSSOVER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_FAULT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    tier: str
    is_available: bool
    objects: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    stored: int
    fetched: int
    stored_bytes: int
    fetched_bytes: int
    evicted: int
    expired: int
    quarantined: int
    refused_stores: int
    store_failures: int
    failures: _containers.ScalarMap[str, int]
    latency_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    crossover_tokens: int
    last_fault: str
    codec: str
    divergence: Divergence
    def __init__(self, tier: _Optional[str] = ..., is_available: _Optional[bool] = ..., objects: _Optional[int] = ..., bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., stored: _Optional[int] = ..., fetched: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., evicted: _Optional[int] = ..., expired: _Optional[int] = ..., quarantined: _Optional[int] = ..., refused_stores: _Optional[int] = ..., store_failures: _Optional[int] = ..., failures: _Optional[_Mapping[str, int]] = ..., latency_s: _Optional[float] = ..., read_bytes_per_s: _Optional[float] = ..., write_bytes_per_s: _Optional[float] = ..., crossover_tokens: _Optional[int] = ..., last_fault: _Optional[str] = ..., codec: _Optional[str] = ..., divergence: _Optional[_Union[Divergence, _Mapping]] = ...) -> None: ...

class Divergence(_message.Message):
    __slots__ = ("measured_blocks", "cosine_distance", "cosine_distance_upper", "relative_l2", "relative_l2_upper", "is_over_budget")
    MEASURED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COSINE_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    COSINE_DISTANCE_UPPER_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_L2_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_L2_UPPER_FIELD_NUMBER: _ClassVar[int]
    IS_OVER_BUDGET_FIELD_NUMBER: _ClassVar[int]
    measured_blocks: int
    cosine_distance: float
    cosine_distance_upper: float
    relative_l2: float
    relative_l2_upper: float
    is_over_budget: bool
    def __init__(self, measured_blocks: _Optional[int] = ..., cosine_distance: _Optional[float] = ..., cosine_distance_upper: _Optional[float] = ..., relative_l2: _Optional[float] = ..., relative_l2_upper: _Optional[float] = ..., is_over_budget: _Optional[bool] = ...) -> None: ...

class PinStats(_message.Message):
    __slots__ = ("soft_pins", "hard_pins", "soft_blocks", "hard_blocks", "soft_budget_blocks", "hard_budget_blocks")
    SOFT_PINS_FIELD_NUMBER: _ClassVar[int]
    HARD_PINS_FIELD_NUMBER: _ClassVar[int]
    SOFT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HARD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SOFT_BUDGET_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HARD_BUDGET_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    soft_pins: int
    hard_pins: int
    soft_blocks: int
    hard_blocks: int
    soft_budget_blocks: int
    hard_budget_blocks: int
    def __init__(self, soft_pins: _Optional[int] = ..., hard_pins: _Optional[int] = ..., soft_blocks: _Optional[int] = ..., hard_blocks: _Optional[int] = ..., soft_budget_blocks: _Optional[int] = ..., hard_budget_blocks: _Optional[int] = ...) -> None: ...

class PrefetchStats(_message.Message):
    __slots__ = ("waiting", "sessions", "restore_s", "hidden_s")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_S_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    waiting: PrefetchCounts
    sessions: PrefetchCounts
    restore_s: float
    hidden_s: float
    def __init__(self, waiting: _Optional[_Union[PrefetchCounts, _Mapping]] = ..., sessions: _Optional[_Union[PrefetchCounts, _Mapping]] = ..., restore_s: _Optional[float] = ..., hidden_s: _Optional[float] = ...) -> None: ...

class PrefetchCounts(_message.Message):
    __slots__ = ("fetched_blocks", "used_blocks", "late_blocks", "wasted_blocks")
    FETCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LATE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WASTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    fetched_blocks: int
    used_blocks: int
    late_blocks: int
    wasted_blocks: int
    def __init__(self, fetched_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., late_blocks: _Optional[int] = ..., wasted_blocks: _Optional[int] = ...) -> None: ...

class PrefixInfo(_message.Message):
    __slots__ = ("prefix_id", "namespace", "tenant", "num_tokens", "own_tokens", "own_blocks", "own_bytes", "hits", "age_s", "idle_s", "expires_in_s", "pin", "pin_expires_in_s", "in_use", "has_last_logits", "num_children", "tiers", "value", "preview", "parent_id")
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OWN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    PIN_EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    HAS_LAST_LOGITS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHILDREN_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    prefix_id: str
    namespace: str
    tenant: str
    num_tokens: int
    own_tokens: int
    own_blocks: int
    own_bytes: int
    hits: int
    age_s: float
    idle_s: float
    expires_in_s: float
    pin: PinKind
    pin_expires_in_s: float
    in_use: bool
    has_last_logits: bool
    num_children: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierBlocks]
    value: float
    preview: str
    parent_id: str
    def __init__(self, prefix_id: _Optional[str] = ..., namespace: _Optional[str] = ..., tenant: _Optional[str] = ..., num_tokens: _Optional[int] = ..., own_tokens: _Optional[int] = ..., own_blocks: _Optional[int] = ..., own_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., age_s: _Optional[float] = ..., idle_s: _Optional[float] = ..., expires_in_s: _Optional[float] = ..., pin: _Optional[_Union[PinKind, str]] = ..., pin_expires_in_s: _Optional[float] = ..., in_use: _Optional[bool] = ..., has_last_logits: _Optional[bool] = ..., num_children: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierBlocks, _Mapping]]] = ..., value: _Optional[float] = ..., preview: _Optional[str] = ..., parent_id: _Optional[str] = ...) -> None: ...

class TierBlocks(_message.Message):
    __slots__ = ("tier", "blocks")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    blocks: int
    def __init__(self, tier: _Optional[str] = ..., blocks: _Optional[int] = ...) -> None: ...

class ListPrefixesRequest(_message.Message):
    __slots__ = ("model", "page_size", "page_token", "namespace", "min_age", "max_age", "min_hits", "pinned", "tier")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    MIN_AGE_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_FIELD_NUMBER: _ClassVar[int]
    MIN_HITS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    model: str
    page_size: int
    page_token: str
    namespace: str
    min_age: _duration_pb2.Duration
    max_age: _duration_pb2.Duration
    min_hits: int
    pinned: bool
    tier: str
    def __init__(self, model: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., namespace: _Optional[str] = ..., min_age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., min_hits: _Optional[int] = ..., pinned: _Optional[bool] = ..., tier: _Optional[str] = ...) -> None: ...

class ListPrefixesResponse(_message.Message):
    __slots__ = ("prefixes", "next_page_token", "total")
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    prefixes: _containers.RepeatedCompositeFieldContainer[PrefixInfo]
    next_page_token: str
    total: int
    def __init__(self, prefixes: _Optional[_Iterable[_Union[PrefixInfo, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., total: _Optional[int] = ...) -> None: ...

class LookupPrefixRequest(_message.Message):
    __slots__ = ("model", "prefix")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    model: str
    prefix: PrefixSelector
    def __init__(self, model: _Optional[str] = ..., prefix: _Optional[_Union[PrefixSelector, _Mapping]] = ...) -> None: ...

class LookupPrefixResponse(_message.Message):
    __slots__ = ("prompt_tokens", "cached_block_tokens", "cached_partial_tokens", "is_exact", "tiers", "prefix_id")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PARTIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_EXACT_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    is_exact: bool
    tiers: _containers.RepeatedCompositeFieldContainer[TierBlocks]
    prefix_id: str
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_block_tokens: _Optional[int] = ..., cached_partial_tokens: _Optional[int] = ..., is_exact: _Optional[bool] = ..., tiers: _Optional[_Iterable[_Union[TierBlocks, _Mapping]]] = ..., prefix_id: _Optional[str] = ...) -> None: ...

class WarmPrefixRequest(_message.Message):
    __slots__ = ("model", "prefix", "lifetime", "pin", "pin_lifetime")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    PIN_LIFETIME_FIELD_NUMBER: _ClassVar[int]
    model: str
    prefix: PrefixSelector
    lifetime: _duration_pb2.Duration
    pin: PinKind
    pin_lifetime: _duration_pb2.Duration
    def __init__(self, model: _Optional[str] = ..., prefix: _Optional[_Union[PrefixSelector, _Mapping]] = ..., lifetime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., pin: _Optional[_Union[PinKind, str]] = ..., pin_lifetime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WarmPrefixProgress(_message.Message):
    __slots__ = ("num_tokens", "computed_tokens", "cached_tokens", "done", "prefix_id", "elapsed_s")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    computed_tokens: int
    cached_tokens: int
    done: bool
    prefix_id: str
    elapsed_s: float
    def __init__(self, num_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., done: _Optional[bool] = ..., prefix_id: _Optional[str] = ..., elapsed_s: _Optional[float] = ...) -> None: ...

class PinPrefixRequest(_message.Message):
    __slots__ = ("model", "prefix", "kind", "lifetime")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_FIELD_NUMBER: _ClassVar[int]
    model: str
    prefix: PrefixSelector
    kind: PinKind
    lifetime: _duration_pb2.Duration
    def __init__(self, model: _Optional[str] = ..., prefix: _Optional[_Union[PrefixSelector, _Mapping]] = ..., kind: _Optional[_Union[PinKind, str]] = ..., lifetime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PinPrefixResponse(_message.Message):
    __slots__ = ("prefix_id", "num_blocks", "newly_pinned_blocks", "num_tokens")
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEWLY_PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prefix_id: str
    num_blocks: int
    newly_pinned_blocks: int
    num_tokens: int
    def __init__(self, prefix_id: _Optional[str] = ..., num_blocks: _Optional[int] = ..., newly_pinned_blocks: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class UnpinPrefixRequest(_message.Message):
    __slots__ = ("model", "prefix")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    model: str
    prefix: PrefixSelector
    def __init__(self, model: _Optional[str] = ..., prefix: _Optional[_Union[PrefixSelector, _Mapping]] = ...) -> None: ...

class UnpinPrefixResponse(_message.Message):
    __slots__ = ("was_pinned",)
    WAS_PINNED_FIELD_NUMBER: _ClassVar[int]
    was_pinned: bool
    def __init__(self, was_pinned: _Optional[bool] = ...) -> None: ...

class SetLifetimeRequest(_message.Message):
    __slots__ = ("model", "prefix", "lifetime")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_FIELD_NUMBER: _ClassVar[int]
    model: str
    prefix: PrefixSelector
    lifetime: _duration_pb2.Duration
    def __init__(self, model: _Optional[str] = ..., prefix: _Optional[_Union[PrefixSelector, _Mapping]] = ..., lifetime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SetLifetimeResponse(_message.Message):
    __slots__ = ("prefix_id", "num_blocks")
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    prefix_id: str
    num_blocks: int
    def __init__(self, prefix_id: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class ReleasePrefixRequest(_message.Message):
    __slots__ = ("model", "prefix")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    model: str
    prefix: PrefixSelector
    def __init__(self, model: _Optional[str] = ..., prefix: _Optional[_Union[PrefixSelector, _Mapping]] = ...) -> None: ...

class ReleasePrefixResponse(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...

class EvictPrefixesRequest(_message.Message):
    __slots__ = ("model", "subtree", "namespace", "min_idle", "in_use", "tiers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SUBTREE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    MIN_IDLE_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    subtree: PrefixSelector
    namespace: str
    min_idle: _duration_pb2.Duration
    in_use: InUse
    tiers: bool
    def __init__(self, model: _Optional[str] = ..., subtree: _Optional[_Union[PrefixSelector, _Mapping]] = ..., namespace: _Optional[str] = ..., min_idle: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., in_use: _Optional[_Union[InUse, str]] = ..., tiers: _Optional[bool] = ...) -> None: ...

class EvictPrefixesResponse(_message.Message):
    __slots__ = ("evicted_blocks", "kept_blocks", "evicted_objects")
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KEPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    evicted_blocks: int
    kept_blocks: int
    evicted_objects: int
    def __init__(self, evicted_blocks: _Optional[int] = ..., kept_blocks: _Optional[int] = ..., evicted_objects: _Optional[int] = ...) -> None: ...

class ClearCacheRequest(_message.Message):
    __slots__ = ("model", "in_use", "tiers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    in_use: InUse
    tiers: bool
    def __init__(self, model: _Optional[str] = ..., in_use: _Optional[_Union[InUse, str]] = ..., tiers: _Optional[bool] = ...) -> None: ...

class ClearCacheResponse(_message.Message):
    __slots__ = ("evicted_blocks", "kept_blocks", "evicted_objects")
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KEPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    evicted_blocks: int
    kept_blocks: int
    evicted_objects: int
    def __init__(self, evicted_blocks: _Optional[int] = ..., kept_blocks: _Optional[int] = ..., evicted_objects: _Optional[int] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policy", "available", "trial", "canary")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    available: _containers.RepeatedCompositeFieldContainer[PolicyInfo]
    trial: _containers.RepeatedCompositeFieldContainer[TrialResult]
    canary: CanaryInfo
    def __init__(self, policy: _Optional[str] = ..., available: _Optional[_Iterable[_Union[PolicyInfo, _Mapping]]] = ..., trial: _Optional[_Iterable[_Union[TrialResult, _Mapping]]] = ..., canary: _Optional[_Union[CanaryInfo, _Mapping]] = ...) -> None: ...

class PolicyInfo(_message.Message):
    __slots__ = ("name", "description")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class TrialResult(_message.Message):
    __slots__ = ("policy", "token_hit_rate", "request_hit_rate", "requests", "tokens", "sampled_share", "cost_share")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_SHARE_FIELD_NUMBER: _ClassVar[int]
    COST_SHARE_FIELD_NUMBER: _ClassVar[int]
    policy: str
    token_hit_rate: float
    request_hit_rate: float
    requests: int
    tokens: int
    sampled_share: float
    cost_share: float
    def __init__(self, policy: _Optional[str] = ..., token_hit_rate: _Optional[float] = ..., request_hit_rate: _Optional[float] = ..., requests: _Optional[int] = ..., tokens: _Optional[int] = ..., sampled_share: _Optional[float] = ..., cost_share: _Optional[float] = ...) -> None: ...

class CanaryInfo(_message.Message):
    __slots__ = ("policy", "share", "namespaces", "token_hit_rate", "live_token_hit_rate")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    LIVE_TOKEN_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    policy: str
    share: float
    namespaces: int
    token_hit_rate: float
    live_token_hit_rate: float
    def __init__(self, policy: _Optional[str] = ..., share: _Optional[float] = ..., namespaces: _Optional[int] = ..., token_hit_rate: _Optional[float] = ..., live_token_hit_rate: _Optional[float] = ...) -> None: ...

class SetPolicyRequest(_message.Message):
    __slots__ = ("model", "policy", "trial", "canary")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    model: str
    policy: str
    trial: PolicyNames
    canary: CanaryChange
    def __init__(self, model: _Optional[str] = ..., policy: _Optional[str] = ..., trial: _Optional[_Union[PolicyNames, _Mapping]] = ..., canary: _Optional[_Union[CanaryChange, _Mapping]] = ...) -> None: ...

class PolicyNames(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class CanaryChange(_message.Message):
    __slots__ = ("policy", "share")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    policy: str
    share: float
    def __init__(self, policy: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class WatchCacheRequest(_message.Message):
    __slots__ = ("model", "namespace", "kinds")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    namespace: str
    kinds: _containers.RepeatedScalarFieldContainer[CacheEventKind]
    def __init__(self, model: _Optional[str] = ..., namespace: _Optional[str] = ..., kinds: _Optional[_Iterable[_Union[CacheEventKind, str]]] = ...) -> None: ...

class CacheEvent(_message.Message):
    __slots__ = ("sequence", "epoch", "kind", "namespace", "prefix_id", "num_tokens", "num_blocks", "cause", "tier", "num_lost", "time_s")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_LOST_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    epoch: int
    kind: CacheEventKind
    namespace: str
    prefix_id: str
    num_tokens: int
    num_blocks: int
    cause: str
    tier: str
    num_lost: int
    time_s: float
    def __init__(self, sequence: _Optional[int] = ..., epoch: _Optional[int] = ..., kind: _Optional[_Union[CacheEventKind, str]] = ..., namespace: _Optional[str] = ..., prefix_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., cause: _Optional[str] = ..., tier: _Optional[str] = ..., num_lost: _Optional[int] = ..., time_s: _Optional[float] = ...) -> None: ...

class SaveSnapshotRequest(_message.Message):
    __slots__ = ("model", "name", "namespace", "replace")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    namespace: str
    replace: bool
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ..., namespace: _Optional[str] = ..., replace: _Optional[bool] = ...) -> None: ...

class RestoreSnapshotRequest(_message.Message):
    __slots__ = ("model", "name")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class SnapshotProgress(_message.Message):
    __slots__ = ("done_objects", "total_objects", "done_bytes", "skipped_objects", "done", "elapsed_s")
    DONE_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    done_objects: int
    total_objects: int
    done_bytes: int
    skipped_objects: int
    done: bool
    elapsed_s: float
    def __init__(self, done_objects: _Optional[int] = ..., total_objects: _Optional[int] = ..., done_bytes: _Optional[int] = ..., skipped_objects: _Optional[int] = ..., done: _Optional[bool] = ..., elapsed_s: _Optional[float] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("name", "state", "fingerprint", "kind", "num_parameters", "kv_bytes", "load_s", "running_requests", "fault", "version", "task", "num_bytes", "aliases", "traffic_share", "source_kind", "num_requests", "idle_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_SHARE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: ModelState
    fingerprint: str
    kind: str
    num_parameters: int
    kv_bytes: int
    load_s: float
    running_requests: int
    fault: str
    version: str
    task: str
    num_bytes: int
    aliases: _containers.RepeatedScalarFieldContainer[str]
    traffic_share: float
    source_kind: str
    num_requests: int
    idle_s: float
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., fingerprint: _Optional[str] = ..., kind: _Optional[str] = ..., num_parameters: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., load_s: _Optional[float] = ..., running_requests: _Optional[int] = ..., fault: _Optional[str] = ..., version: _Optional[str] = ..., task: _Optional[str] = ..., num_bytes: _Optional[int] = ..., aliases: _Optional[_Iterable[str]] = ..., traffic_share: _Optional[float] = ..., source_kind: _Optional[str] = ..., num_requests: _Optional[int] = ..., idle_s: _Optional[float] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "predict_bytes", "predict_memory")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    PREDICT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREDICT_MEMORY_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    predict_bytes: int
    predict_memory: int
    def __init__(self, models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., predict_bytes: _Optional[int] = ..., predict_memory: _Optional[int] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model", "version", "source", "task", "pooling")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    source: str
    task: str
    pooling: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., source: _Optional[str] = ..., task: _Optional[str] = ..., pooling: _Optional[str] = ...) -> None: ...

class LoadModelProgress(_message.Message):
    __slots__ = ("status", "elapsed_s", "done", "phase", "done_bytes", "total_bytes")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    status: ModelStatus
    elapsed_s: float
    done: bool
    phase: str
    done_bytes: int
    total_bytes: int
    def __init__(self, status: _Optional[_Union[ModelStatus, _Mapping]] = ..., elapsed_s: _Optional[float] = ..., done: _Optional[bool] = ..., phase: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model", "drain", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    drain: _duration_pb2.Duration
    version: str
    def __init__(self, model: _Optional[str] = ..., drain: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., version: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: ModelStatus
    def __init__(self, status: _Optional[_Union[ModelStatus, _Mapping]] = ...) -> None: ...

class SetModelAliasRequest(_message.Message):
    __slots__ = ("model", "alias", "version", "traffic_share")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_SHARE_FIELD_NUMBER: _ClassVar[int]
    model: str
    alias: str
    version: str
    traffic_share: float
    def __init__(self, model: _Optional[str] = ..., alias: _Optional[str] = ..., version: _Optional[str] = ..., traffic_share: _Optional[float] = ...) -> None: ...

class SetModelAliasResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    def __init__(self, versions: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ...) -> None: ...

class GetReuseRequest(_message.Message):
    __slots__ = ("model", "version", "max_keys")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    max_keys: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., max_keys: _Optional[int] = ...) -> None: ...

class RiskInterval(_message.Message):
    __slots__ = ("lower", "estimate", "upper", "weight")
    LOWER_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    UPPER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    lower: float
    estimate: float
    upper: float
    weight: float
    def __init__(self, lower: _Optional[float] = ..., estimate: _Optional[float] = ..., upper: _Optional[float] = ..., weight: _Optional[float] = ...) -> None: ...

class ReuseRisk(_message.Message):
    __slots__ = ("changed", "cosine_distance", "l2", "num_compared", "over_budget", "proven_safe")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    COSINE_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    L2_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPARED_FIELD_NUMBER: _ClassVar[int]
    OVER_BUDGET_FIELD_NUMBER: _ClassVar[int]
    PROVEN_SAFE_FIELD_NUMBER: _ClassVar[int]
    changed: RiskInterval
    cosine_distance: RiskInterval
    l2: RiskInterval
    num_compared: int
    over_budget: bool
    proven_safe: bool
    def __init__(self, changed: _Optional[_Union[RiskInterval, _Mapping]] = ..., cosine_distance: _Optional[_Union[RiskInterval, _Mapping]] = ..., l2: _Optional[_Union[RiskInterval, _Mapping]] = ..., num_compared: _Optional[int] = ..., over_budget: _Optional[bool] = ..., proven_safe: _Optional[bool] = ...) -> None: ...

class ReuseKey(_message.Message):
    __slots__ = ("key", "risk", "lifetime_s", "stopped", "num_hits")
    KEY_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_HITS_FIELD_NUMBER: _ClassVar[int]
    key: str
    risk: ReuseRisk
    lifetime_s: float
    stopped: bool
    num_hits: int
    def __init__(self, key: _Optional[str] = ..., risk: _Optional[_Union[ReuseRisk, _Mapping]] = ..., lifetime_s: _Optional[float] = ..., stopped: _Optional[bool] = ..., num_hits: _Optional[int] = ...) -> None: ...

class ReusePolicy(_message.Message):
    __slots__ = ("name", "traffic_share", "num_key_features", "bin_width", "threshold", "lifetime_s", "min_lifetime_s", "max_lifetime_s", "max_changed", "max_cosine_distance", "max_l2", "max_error", "sample_share", "num_entries", "max_entries", "num_bytes", "num_lookups", "num_hits", "num_absent", "num_expired", "num_stopped", "num_uncertified", "num_evicted", "num_alarms", "num_stopped_keys", "risk", "keys", "hit_s", "miss_s", "stopped")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_SHARE_FIELD_NUMBER: _ClassVar[int]
    NUM_KEY_FEATURES_FIELD_NUMBER: _ClassVar[int]
    BIN_WIDTH_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    MIN_LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    MAX_LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    MAX_CHANGED_FIELD_NUMBER: _ClassVar[int]
    MAX_COSINE_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    MAX_L2_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_SHARE_FIELD_NUMBER: _ClassVar[int]
    NUM_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MAX_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    NUM_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_ABSENT_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    NUM_STOPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_UNCERTIFIED_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ALARMS_FIELD_NUMBER: _ClassVar[int]
    NUM_STOPPED_KEYS_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    HIT_S_FIELD_NUMBER: _ClassVar[int]
    MISS_S_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    name: str
    traffic_share: float
    num_key_features: int
    bin_width: float
    threshold: float
    lifetime_s: float
    min_lifetime_s: float
    max_lifetime_s: float
    max_changed: float
    max_cosine_distance: float
    max_l2: float
    max_error: float
    sample_share: float
    num_entries: int
    max_entries: int
    num_bytes: int
    num_lookups: int
    num_hits: int
    num_absent: int
    num_expired: int
    num_stopped: int
    num_uncertified: int
    num_evicted: int
    num_alarms: int
    num_stopped_keys: int
    risk: ReuseRisk
    keys: _containers.RepeatedCompositeFieldContainer[ReuseKey]
    hit_s: float
    miss_s: float
    stopped: bool
    def __init__(self, name: _Optional[str] = ..., traffic_share: _Optional[float] = ..., num_key_features: _Optional[int] = ..., bin_width: _Optional[float] = ..., threshold: _Optional[float] = ..., lifetime_s: _Optional[float] = ..., min_lifetime_s: _Optional[float] = ..., max_lifetime_s: _Optional[float] = ..., max_changed: _Optional[float] = ..., max_cosine_distance: _Optional[float] = ..., max_l2: _Optional[float] = ..., max_error: _Optional[float] = ..., sample_share: _Optional[float] = ..., num_entries: _Optional[int] = ..., max_entries: _Optional[int] = ..., num_bytes: _Optional[int] = ..., num_lookups: _Optional[int] = ..., num_hits: _Optional[int] = ..., num_absent: _Optional[int] = ..., num_expired: _Optional[int] = ..., num_stopped: _Optional[int] = ..., num_uncertified: _Optional[int] = ..., num_evicted: _Optional[int] = ..., num_alarms: _Optional[int] = ..., num_stopped_keys: _Optional[int] = ..., risk: _Optional[_Union[ReuseRisk, _Mapping]] = ..., keys: _Optional[_Iterable[_Union[ReuseKey, _Mapping]]] = ..., hit_s: _Optional[float] = ..., miss_s: _Optional[float] = ..., stopped: _Optional[bool] = ...) -> None: ...

class GetReuseResponse(_message.Message):
    __slots__ = ("model", "version", "kind", "policies")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    kind: str
    policies: _containers.RepeatedCompositeFieldContainer[ReusePolicy]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., kind: _Optional[str] = ..., policies: _Optional[_Iterable[_Union[ReusePolicy, _Mapping]]] = ...) -> None: ...

class WatchReuseRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ReuseEvent(_message.Message):
    __slots__ = ("kind", "model", "version", "policy", "key", "measure", "interval", "limit", "lifetime_s", "num_lost")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[ReuseEvent.Kind]
        STARTED: _ClassVar[ReuseEvent.Kind]
        ALARM: _ClassVar[ReuseEvent.Kind]
        RECOVERED: _ClassVar[ReuseEvent.Kind]
        LIFETIME: _ClassVar[ReuseEvent.Kind]
        STOPPED: _ClassVar[ReuseEvent.Kind]
        RESUMED: _ClassVar[ReuseEvent.Kind]
        LOST: _ClassVar[ReuseEvent.Kind]
    KIND_UNSPECIFIED: ReuseEvent.Kind
    STARTED: ReuseEvent.Kind
    ALARM: ReuseEvent.Kind
    RECOVERED: ReuseEvent.Kind
    LIFETIME: ReuseEvent.Kind
    STOPPED: ReuseEvent.Kind
    RESUMED: ReuseEvent.Kind
    LOST: ReuseEvent.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_LOST_FIELD_NUMBER: _ClassVar[int]
    kind: ReuseEvent.Kind
    model: str
    version: str
    policy: str
    key: str
    measure: str
    interval: RiskInterval
    limit: float
    lifetime_s: float
    num_lost: int
    def __init__(self, kind: _Optional[_Union[ReuseEvent.Kind, str]] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., policy: _Optional[str] = ..., key: _Optional[str] = ..., measure: _Optional[str] = ..., interval: _Optional[_Union[RiskInterval, _Mapping]] = ..., limit: _Optional[float] = ..., lifetime_s: _Optional[float] = ..., num_lost: _Optional[int] = ...) -> None: ...

class ClearReuseRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ClearReuseResponse(_message.Message):
    __slots__ = ("num_entries",)
    NUM_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    num_entries: int
    def __init__(self, num_entries: _Optional[int] = ...) -> None: ...
