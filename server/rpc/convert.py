"""The bridge between the messages of ``generate.proto`` and the front end's own terms, in both directions.

Reading checks every field and reports all violations together. Writing builds events from samples'
deltas. Defaults stand in the proto comments and are applied here.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from kvserve.v1 import common_pb2
from kvserve.v1 import generate_pb2 as pb
from server.engine.messages import (
    EngineReady,
    Finish,
    GenerateSpec,
    RequestTimings,
    RequestUsage,
    RestoreReport,
)
from server.rpc.prompt_convert import read_chat, read_prompt
from server.rpc.requests import ChatPrompt, GenerateCall, ModelLimits, TextPrompt
from server.rpc.samples import SampleDelta
from server.rpc.validation import Violations

__all__ = [
    "event_of",
    "model_info",
    "read_detokenize",
    "read_generate",
    "read_model_info",
    "read_tokenize",
    "response_of",
    "start_of",
    "summary_of",
]

MAX_REQUEST_ID_CHARS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_SAMPLES = 64
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1

_FINISH = {
    Finish.LENGTH: pb.FINISH_REASON_LENGTH,
    Finish.EOS: pb.FINISH_REASON_EOS,
    Finish.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    Finish.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
}
_DECISIONS = {
    "fetch": common_pb2.Restore.FETCH,
    "recompute": common_pb2.Restore.RECOMPUTE,
}


def read_model_info(request: pb.GetModelInfoRequest) -> None:
    """Validate."""
    violations = Violations()
    violations.model_name("model", request.model)
    violations.raise_if_any()


def read_generate(
    request: pb.GenerateRequest, limits: ModelLimits, *, eos_token_ids: Sequence[int], salt: str
) -> GenerateCall:
    """Validate a generation request; raise :class:`InvalidArgument` with every violation."""
    violations = Violations()
    violations.model_name("model", request.model)
    violations.printable("request_id", request.request_id, max_chars=MAX_REQUEST_ID_CHARS)
    if request.HasField("priority"):
        violations.integer("priority", request.priority, low=-100, high=100)
    prompt = read_prompt(request, request.WhichOneof("input"), limits, violations)
    if prompt is None:
        violations.add("input", "one of text, token_ids and chat is required")
    parameters = request.parameters
    _check_parameters(parameters, limits, violations)
    lifetime_s = None
    if request.cache.HasField("lifetime"):
        lifetime_s = violations.duration(
            "cache.lifetime", request.cache.lifetime.seconds, request.cache.lifetime.nanos
        )
    violations.raise_if_any()
    assert prompt is not None  # a missing prompt is a violation

    given = parameters.HasField
    cache = request.cache
    draft = GenerateSpec(
        token_ids=[],
        max_new_tokens=0,
        min_new_tokens=parameters.min_new_tokens,
        num_samples=parameters.n if given("n") else 1,
        temperature=parameters.temperature,
        top_k=min(parameters.top_k, limits.vocab_size),
        top_p=parameters.top_p if given("top_p") else 1.0,
        min_p=parameters.min_p,
        repetition_penalty=parameters.repetition_penalty if given("repetition_penalty") else 1.0,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        seed=parameters.seed if given("seed") else secrets.randbits(63),
        logit_bias=tuple((entry.token_id, entry.bias) for entry in parameters.logit_bias),
        num_top_logprobs=parameters.logprobs if given("logprobs") else None,
        eos_token_ids=() if parameters.ignore_eos else tuple(eos_token_ids),
        stop_token_ids=tuple(parameters.stop_token_ids),
        priority=request.priority,
        salt=salt,
        use_kv_cache=cache.kv_cache if cache.HasField("kv_cache") else True,
        read_prefix=cache.read_prefix if cache.HasField("read_prefix") else True,
        write_prefix=cache.write_prefix if cache.HasField("write_prefix") else True,
        lifetime_s=lifetime_s,
    )
    return GenerateCall(
        prompt=prompt,
        request_id=request.request_id or f"req-{secrets.token_hex(8)}",
        draft=draft,
        max_new_tokens=parameters.max_new_tokens if given("max_new_tokens") else None,
        stop_strings=tuple(parameters.stop),
    )


def read_tokenize(request: pb.TokenizeRequest) -> tuple[TextPrompt | ChatPrompt, bool]:
    """Validate; return what to tokenize, and whether to add special tokens."""
    violations = Violations()
    violations.model_name("model", request.model)
    prompt: TextPrompt | ChatPrompt | None = None
    match request.WhichOneof("input"):
        case "text":
            prompt = TextPrompt(request.text)
        case "chat":
            prompt = read_chat(request.chat, violations)
        case _:
            violations.add("input", "one of text and chat is required")
    violations.raise_if_any()
    assert prompt is not None
    return prompt, request.add_special_tokens if request.HasField("add_special_tokens") else True


def read_detokenize(request: pb.DetokenizeRequest, limits: ModelLimits) -> tuple[list[int], bool]:
    """Validate; return the ids, and whether to leave special tokens out."""
    violations = Violations()
    violations.model_name("model", request.model)
    violations.token_ids("token_ids", request.token_ids, vocab_size=limits.vocab_size)
    violations.raise_if_any()
    skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
    return list(request.token_ids), skip


def _check_parameters(
    parameters: pb.GenerationParameters, limits: ModelLimits, violations: Violations
) -> None:
    given = parameters.HasField
    path = "parameters."
    if given("max_new_tokens"):
        violations.integer(
            f"{path}max_new_tokens", parameters.max_new_tokens, low=1, high=limits.max_model_length
        )
    if violations.integer(
        f"{path}min_new_tokens", parameters.min_new_tokens, low=0, high=limits.max_model_length
    ) and (given("max_new_tokens") and parameters.min_new_tokens > parameters.max_new_tokens >= 1):
        violations.add(f"{path}min_new_tokens", "must be at most max_new_tokens")
    violations.number(f"{path}temperature", parameters.temperature, low=0, high=100)
    violations.integer(f"{path}top_k", parameters.top_k, low=0, high=_INT32_MAX)
    if given("top_p"):
        violations.number(f"{path}top_p", parameters.top_p, low=0, high=1, exclude_low=True)
    violations.number(f"{path}min_p", parameters.min_p, low=0, high=1)
    if given("repetition_penalty"):
        violations.number(
            f"{path}repetition_penalty", parameters.repetition_penalty, low=0, high=10, exclude_low=True
        )
    violations.number(f"{path}presence_penalty", parameters.presence_penalty, low=-2, high=2)
    violations.number(f"{path}frequency_penalty", parameters.frequency_penalty, low=-2, high=2)
    violations.integer(f"{path}seed", parameters.seed, low=0, high=_INT64_MAX)
    _check_stops(parameters, limits, violations)
    _check_logit_bias(parameters, limits, violations)
    violations.integer(f"{path}logprobs", parameters.logprobs, low=0, high=MAX_TOP_LOGPROBS)
    if given("n"):
        violations.integer(f"{path}n", parameters.n, low=1, high=MAX_SAMPLES)


def _check_stops(parameters: pb.GenerationParameters, limits: ModelLimits, violations: Violations) -> None:
    if violations.count("parameters.stop", len(parameters.stop), high=MAX_STOP_STRINGS):
        for index, stop in enumerate(parameters.stop):
            if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
                violations.add(f"parameters.stop[{index}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
                break
    field = "parameters.stop_token_ids"
    if violations.count(field, len(parameters.stop_token_ids), high=MAX_STOP_TOKENS):
        violations.token_ids(field, parameters.stop_token_ids, vocab_size=limits.vocab_size)
        violations.distinct(field, parameters.stop_token_ids)


def _check_logit_bias(
    parameters: pb.GenerationParameters, limits: ModelLimits, violations: Violations
) -> None:
    field = "parameters.logit_bias"
    if not violations.count(field, len(parameters.logit_bias), high=MAX_LOGIT_BIAS):
        return
    for index, entry in enumerate(parameters.logit_bias):
        good_id = violations.integer(
            f"{field}[{index}].token_id", entry.token_id, low=0, high=limits.vocab_size - 1
        )
        good_bias = violations.number(f"{field}[{index}].bias", entry.bias, low=-100, high=100)
        if not (good_id and good_bias):
            break
    violations.distinct(field, [entry.token_id for entry in parameters.logit_bias])


def event_of(delta: SampleDelta) -> pb.GenerateEvent:
    """Return one sample's news as an event."""
    event = pb.GenerateEvent(index=delta.index, text=delta.text, token_ids=delta.token_ids)
    if delta.logprobs is not None:
        event.logprobs.extend(_logprobs_of(delta))
    if delta.finish is not None:
        event.finish_reason = _FINISH[delta.finish]
        event.stop_reason = delta.stop_reason
    return event


def start_of(*, request_id: str, model: str, spec: GenerateSpec, num_cached_tokens: int) -> pb.GenerateStart:
    """Return what a call's first event says."""
    return pb.GenerateStart(
        request_id=request_id,
        model=model,
        seed=spec.seed,
        prompt_tokens=len(spec.token_ids),
        cached_tokens=num_cached_tokens,
    )


def summary_of(
    usage: RequestUsage,
    timings: RequestTimings,
    *,
    num_generated_tokens: int,
    tokenize_s: float,
    first_token_s: float,
    total_s: float,
) -> pb.GenerateSummary:
    """Return what a call's last event says.

    ``num_generated_tokens`` is what the client was given: tokens that the engine drew past a stop string
    before it heard of it are not counted.
    """
    return pb.GenerateSummary(
        usage=common_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_block_tokens=usage.cached_block_tokens,
            cached_partial_tokens=usage.cached_partial_tokens,
            cached_tail_tokens=usage.cached_tail_tokens,
            computed_prompt_tokens=usage.computed_prompt_tokens,
            generated_tokens=num_generated_tokens,
            restored_tokens=usage.restored_tokens,
        ),
        timings=common_pb2.Timings(
            tokenize_s=tokenize_s,
            queue_s=timings.queue_s,
            lookup_s=timings.lookup_s,
            prefill_s=timings.prefill_s,
            first_token_s=first_token_s,
            decode_s=timings.decode_s,
            total_s=total_s,
            restore=None if timings.restore is None else _restore_of(timings.restore),
        ),
    )


def _restore_of(report: RestoreReport) -> common_pb2.Restore:
    return common_pb2.Restore(
        decision=_DECISIONS.get(report.decision, common_pb2.Restore.DECISION_UNSPECIFIED),
        tier=report.tier,
        found_tokens=report.found_tokens,
        restored_tokens=report.restored_tokens,
        expected_fetch_s=report.expected_fetch_s,
        expected_recompute_s=report.expected_recompute_s,
        fetch_s=report.fetch_s,
        wait_s=report.wait_s,
    )


def response_of(
    start: pb.GenerateStart, samples: Sequence[SampleDelta], summary: pb.GenerateSummary
) -> pb.GenerateResponse:
    """Return the unary answer: all deltas of each sample, joined."""
    response = pb.GenerateResponse(
        request_id=start.request_id,
        model=start.model,
        seed=start.seed,
        usage=summary.usage,
        timings=summary.timings,
    )
    for delta in samples:
        sample = response.samples.add(index=delta.index, text=delta.text, token_ids=delta.token_ids)
        if delta.logprobs is not None:
            sample.logprobs.extend(_logprobs_of(delta))
        if delta.finish is not None:
            sample.finish_reason = _FINISH[delta.finish]
            sample.stop_reason = delta.stop_reason
    return response


def model_info(
    ready: EngineReady, *, name: str, eos_token_ids: Sequence[int], has_chat_template: bool
) -> pb.ModelInfo:
    """Return what a client may know of the model."""
    return pb.ModelInfo(
        name=name,
        family=ready.family,
        fingerprint=ready.fingerprint,
        num_parameters=ready.num_parameters,
        vocab_size=ready.vocab_size,
        max_model_length=ready.max_model_length,
        dtype=ready.dtype,
        device=ready.device,
        executor=ready.executor,
        block_size=ready.block_size,
        num_blocks=ready.num_blocks,
        bytes_per_block=ready.bytes_per_block,
        eos_token_ids=eos_token_ids,
        has_chat_template=has_chat_template,
        waiting_bound_s=ready.waiting_bound_s,
    )


def _logprobs_of(delta: SampleDelta) -> list[pb.TokenLogprobs]:
    tops = delta.top_logprobs or [[] for _ in delta.token_ids]
    return [
        pb.TokenLogprobs(
            chosen=pb.TokenLogprob(token_id=token_id, logprob=logprob),
            top=[pb.TokenLogprob(token_id=top_id, logprob=value) for top_id, value in top],
        )
        for token_id, logprob, top in zip(delta.token_ids, delta.logprobs or (), tops, strict=True)
    ]
