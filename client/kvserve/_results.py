"""What calls return: frozen values of the client's own, so that user code never holds a protobuf."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from kvserve._errors import Internal
from kvserve.v1 import common_pb2, generate_pb2

__all__ = [
    "FinishReason",
    "GenerateEvent",
    "GenerateResult",
    "GenerateStart",
    "ModelInfo",
    "Restore",
    "RestoreDecision",
    "Sample",
    "Timings",
    "TokenLogprob",
    "TokenLogprobs",
    "Tokens",
    "Usage",
    "finish_reason_from_pb",
    "generate_event_from_pb",
    "generate_result_from_pb",
    "generate_start_from_pb",
    "model_info_from_pb",
    "timings_from_pb",
    "tokens_from_pb",
    "usage_from_pb",
]


class FinishReason(StrEnum):
    """Why a sample ended."""

    LENGTH = "length"
    """``max_new_tokens`` or the model's length was reached."""
    EOS = "eos"
    """One of the model's end-of-sequence tokens."""
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    OTHER = "other"
    """A reason that this version of the client doesn't know."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, of the model's own distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position: the token that was drawn, and the likeliest ones if they were asked for."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateStart:
    """What is known when a call is admitted."""

    request_id: str
    model: str
    seed: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateEvent:
    """News of one sample. Tokens that became ready together travel together."""

    index: int
    """Which of the n samples."""
    text: str
    """Text that became certain; may be empty while a character or a possible stop string is incomplete."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Parallel to ``token_ids`` if asked for, else empty."""
    finish_reason: FinishReason | None = None
    """Set in the sample's last event."""
    stop_reason: str | None = None
    """The stop string, or the text of the stop token, that ended the sample."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One whole sample."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the prompt's tokens came from. ``prompt_tokens == cached_tokens + computed_prompt_tokens``."""

    prompt_tokens: int
    cached_block_tokens: int
    """Reused as whole shared blocks."""
    cached_partial_tokens: int
    """Reused by copying the matching part of a block."""
    cached_tail_tokens: int
    """Of an exactly repeated prompt: the tokens after its last full block."""
    computed_prompt_tokens: int
    generated_tokens: int
    """Over all samples."""
    restored_tokens: int = 0
    """Brought back from host memory, disk or Redis for this call, as whole blocks."""

    @property
    def cached_tokens(self) -> int:
        """Return all prompt tokens that were not computed for this call, the restored ones among them."""
        on_device = self.cached_block_tokens + self.cached_partial_tokens + self.cached_tail_tokens
        return on_device + self.restored_tokens


class RestoreDecision(StrEnum):
    """What to do about the part of a prompt that is in a tier and not on the device."""

    FETCH = "fetch"
    RECOMPUTE = "recompute"
    """Computing it again was expected to be faster."""
    OTHER = "other"
    """A decision that this version of the client doesn't know."""


@dataclass(frozen=True, slots=True)
class Restore:
    """What became of the part of a prompt that was in a tier: host memory, disk or Redis."""

    decision: RestoreDecision
    tier: str
    """The one that had most of it: "host", "disk" or "redis"."""
    found_tokens: int
    """What tiers said they had."""
    restored_tokens: int
    """What came in time."""
    expected_fetch_s: float
    expected_recompute_s: float
    fetch_s: float
    """From the first fetch to the last block in place."""
    wait_s: float
    """The part of it for which nothing else held the call up."""


@dataclass(frozen=True, slots=True)
class Timings:
    """What the call spent its time on, in seconds, measured by the server from end to end."""

    tokenize_s: float
    queue_s: float
    lookup_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    total_s: float
    restore: Restore | None = None
    """None if no tier had any of the prompt."""


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A whole answer. ``text``, ``token_ids`` and the like are those of the first sample."""

    request_id: str
    model: str
    seed: int
    samples: tuple[Sample, ...]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """Return the first sample's text."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the first sample's tokens."""
        return self.samples[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Return the first sample's log-probabilities."""
        return self.samples[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        """Return why the first sample ended."""
        return self.samples[0].finish_reason

    @property
    def stop_reason(self) -> str | None:
        """Return what ended the first sample, if it was a stop string or a stop token."""
        return self.samples[0].stop_reason


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text or a conversation as the model sees it."""

    token_ids: tuple[int, ...]
    max_model_length: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model."""

    name: str
    family: str
    fingerprint: str
    num_parameters: int
    vocab_size: int
    max_model_length: int
    dtype: str
    device: str
    executor: str
    block_size: int
    """Token positions in one KV block."""
    num_blocks: int
    bytes_per_block: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    waiting_bound_s: float
    """No later request is admitted before one that has waited this long."""


_FINISH_REASONS: dict[int, FinishReason | None] = {
    generate_pb2.FINISH_REASON_UNSPECIFIED: None,
    generate_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generate_pb2.FINISH_REASON_EOS: FinishReason.EOS,
    generate_pb2.FINISH_REASON_STOP_STRING: FinishReason.STOP_STRING,
    generate_pb2.FINISH_REASON_STOP_TOKEN: FinishReason.STOP_TOKEN,
}


def finish_reason_from_pb(number: int) -> FinishReason | None:
    """Return None while the sample runs."""
    return _FINISH_REASONS.get(number, FinishReason.OTHER)


def _logprob_from_pb(message: generate_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob)


def _logprobs_from_pb(messages: Iterable[generate_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(_logprob_from_pb(message.chosen), tuple(map(_logprob_from_pb, message.top)))
        for message in messages
    )


def generate_event_from_pb(message: generate_pb2.GenerateEvent) -> GenerateEvent:
    """Convert the part of an event that is about its sample."""
    return GenerateEvent(
        message.index,
        message.text,
        tuple(message.token_ids),
        _logprobs_from_pb(message.logprobs) if message.logprobs else (),
        finish_reason_from_pb(message.finish_reason),
        message.stop_reason or None,
    )


def generate_start_from_pb(message: generate_pb2.GenerateStart) -> GenerateStart:
    """Convert the start of a stream."""
    return GenerateStart(
        request_id=message.request_id,
        model=message.model,
        seed=message.seed,
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
    )


def usage_from_pb(message: common_pb2.Usage) -> Usage:
    """Convert the usage of a call."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_block_tokens=message.cached_block_tokens,
        cached_partial_tokens=message.cached_partial_tokens,
        cached_tail_tokens=message.cached_tail_tokens,
        computed_prompt_tokens=message.computed_prompt_tokens,
        generated_tokens=message.generated_tokens,
        restored_tokens=message.restored_tokens,
    )


_RESTORE_DECISIONS: dict[int, RestoreDecision] = {
    common_pb2.Restore.FETCH: RestoreDecision.FETCH,
    common_pb2.Restore.RECOMPUTE: RestoreDecision.RECOMPUTE,
}


def _restore_from_pb(message: common_pb2.Restore) -> Restore:
    return Restore(
        decision=_RESTORE_DECISIONS.get(message.decision, RestoreDecision.OTHER),
        tier=message.tier,
        found_tokens=message.found_tokens,
        restored_tokens=message.restored_tokens,
        expected_fetch_s=message.expected_fetch_s,
        expected_recompute_s=message.expected_recompute_s,
        fetch_s=message.fetch_s,
        wait_s=message.wait_s,
    )


def timings_from_pb(message: common_pb2.Timings) -> Timings:
    """Convert the timings of a call."""
    return Timings(
        tokenize_s=message.tokenize_s,
        queue_s=message.queue_s,
        lookup_s=message.lookup_s,
        prefill_s=message.prefill_s,
        first_token_s=message.first_token_s,
        decode_s=message.decode_s,
        total_s=message.total_s,
        restore=_restore_from_pb(message.restore) if message.HasField("restore") else None,
    )


def generate_result_from_pb(message: generate_pb2.GenerateResponse) -> GenerateResult:
    """Convert the answer of a unary call. Raises ``Internal`` for one without a sample."""
    if not message.samples:
        raise Internal("the answer holds no sample")
    samples = (
        Sample(
            index=sample.index,
            text=sample.text,
            token_ids=tuple(sample.token_ids),
            logprobs=_logprobs_from_pb(sample.logprobs),
            finish_reason=finish_reason_from_pb(sample.finish_reason) or FinishReason.OTHER,
            stop_reason=sample.stop_reason or None,
        )
        for sample in message.samples
    )
    return GenerateResult(
        request_id=message.request_id,
        model=message.model,
        seed=message.seed,
        samples=tuple(sorted(samples, key=lambda sample: sample.index)),
        usage=usage_from_pb(message.usage),
        timings=timings_from_pb(message.timings),
    )


def tokens_from_pb(message: generate_pb2.TokenizeResponse) -> Tokens:
    """Convert the answer of Tokenize."""
    return Tokens(token_ids=tuple(message.token_ids), max_model_length=message.max_model_length)


def model_info_from_pb(message: generate_pb2.ModelInfo) -> ModelInfo:
    """Convert the description of a model."""
    return ModelInfo(
        name=message.name,
        family=message.family,
        fingerprint=message.fingerprint,
        num_parameters=message.num_parameters,
        vocab_size=message.vocab_size,
        max_model_length=message.max_model_length,
        dtype=message.dtype,
        device=message.device,
        executor=message.executor,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        bytes_per_block=message.bytes_per_block,
        eos_token_ids=tuple(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
        waiting_bound_s=message.waiting_bound_s,
    )
