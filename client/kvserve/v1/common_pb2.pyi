from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages", "add_generation_prompt")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    add_generation_prompt: bool
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., add_generation_prompt: _Optional[bool] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("tokenize_s", "queue_s", "lookup_s", "prefill_s", "first_token_s", "decode_s", "total_s", "restore")
    TOKENIZE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    tokenize_s: float
    queue_s: float
    lookup_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    total_s: float
    restore: Restore
    def __init__(self, tokenize_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., lookup_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., first_token_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., total_s: _Optional[float] = ..., restore: _Optional[_Union[Restore, _Mapping]] = ...) -> None: ...

class Restore(_message.Message):
    __slots__ = ("decision", "tier", "found_tokens", "restored_tokens", "expected_fetch_s", "expected_recompute_s", "fetch_s", "wait_s")
    class Decision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DECISION_UNSPECIFIED: _ClassVar[Restore.Decision]
        FETCH: _ClassVar[Restore.Decision]
        RECOMPUTE: _ClassVar[Restore.Decision]
    DECISION_UNSPECIFIED: Restore.Decision
    FETCH: Restore.Decision
    RECOMPUTE: Restore.Decision
    DECISION_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    FOUND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FETCH_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_RECOMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    decision: Restore.Decision
    tier: str
    found_tokens: int
    restored_tokens: int
    expected_fetch_s: float
    expected_recompute_s: float
    fetch_s: float
    wait_s: float
    def __init__(self, decision: _Optional[_Union[Restore.Decision, str]] = ..., tier: _Optional[str] = ..., found_tokens: _Optional[int] = ..., restored_tokens: _Optional[int] = ..., expected_fetch_s: _Optional[float] = ..., expected_recompute_s: _Optional[float] = ..., fetch_s: _Optional[float] = ..., wait_s: _Optional[float] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_block_tokens", "cached_partial_tokens", "cached_tail_tokens", "computed_prompt_tokens", "generated_tokens", "restored_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PARTIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TAIL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_block_tokens: int
    cached_partial_tokens: int
    cached_tail_tokens: int
    computed_prompt_tokens: int
    generated_tokens: int
    restored_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_block_tokens: _Optional[int] = ..., cached_partial_tokens: _Optional[int] = ..., cached_tail_tokens: _Optional[int] = ..., computed_prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., restored_tokens: _Optional[int] = ...) -> None: ...
