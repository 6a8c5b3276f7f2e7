"""From keyword arguments to calls: the only place that fills request messages, for both clients.

Only what can't be written into a message is refused here; ranges are the server's to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from kvserve import _calls
from kvserve._calls import Call, Method
from kvserve._config import ClientConfig
from kvserve._errors import InvalidArgument
from kvserve._fields import check_one_input, fill_chat, fill_duration, refusing, set_field
from kvserve._health import HealthCheckRequest
from kvserve._options import (
    CallOptions,
    DetokenizeOptions,
    GenerateOptions,
    TimeoutOptions,
    TokenizeOptions,
    check_options,
)
from kvserve._tracing import trace_metadata
from kvserve.v1 import generate_pb2

__all__ = ["CallFactory"]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")

_PARAMETERS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "logprobs",
    "n",
)
_CACHE_OPTIONS = ("kv_cache", "read_prefix", "write_prefix")


class CallFactory:
    """Makes the calls of one client: requests, deadlines, headers."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config

    @property
    def max_message_bytes(self) -> int:
        """Return the size of the largest message."""
        return self._config.max_message_bytes

    def timeout_s(self, options: TimeoutOptions) -> float | None:
        """Return the deadline of a call with these arguments; None: it has none."""
        return options.get("timeout_s", self._config.timeout_s)

    def stream_generate(
        self, text: str | None, options: GenerateOptions
    ) -> Call[generate_pb2.GenerateRequest, generate_pb2.GenerateEvent]:
        """Make a streaming call."""
        return self.call(_calls.STREAM_GENERATE, _generate_request(text, options, method="generate"), options)

    def generate(
        self, text: str | None, options: GenerateOptions
    ) -> Call[generate_pb2.GenerateRequest, generate_pb2.GenerateResponse]:
        """Make a call that is answered at once, when all samples ended."""
        return self.call(_calls.GENERATE, _generate_request(text, options, method="generate_once"), options)

    def tokenize(
        self, text: str | None, options: TokenizeOptions
    ) -> Call[generate_pb2.TokenizeRequest, generate_pb2.TokenizeResponse]:
        """Make a call of Tokenize."""
        check_options(options, TokenizeOptions, method="tokenize")
        messages = options.get("messages")
        check_one_input("tokenize", text=text, messages=messages)
        request = generate_pb2.TokenizeRequest()
        set_field(request, "model", options.get("model"))
        set_field(request, "text", text)
        if messages is not None:
            fill_chat(request.chat, messages, options.get("add_generation_prompt"))
        set_field(request, "add_special_tokens", options.get("add_special_tokens"))
        return self.call(_calls.TOKENIZE, request, options)

    def detokenize(
        self, token_ids: Sequence[int], options: DetokenizeOptions
    ) -> Call[generate_pb2.DetokenizeRequest, generate_pb2.DetokenizeResponse]:
        """Make a call of Detokenize."""
        check_options(options, DetokenizeOptions, method="detokenize")
        request = generate_pb2.DetokenizeRequest()
        set_field(request, "model", options.get("model"))
        with refusing("token_ids"):
            request.token_ids.extend(token_ids)
        set_field(request, "skip_special_tokens", options.get("skip_special_tokens"))
        return self.call(_calls.DETOKENIZE, request, options)

    def model_info(
        self, options: CallOptions
    ) -> Call[generate_pb2.GetModelInfoRequest, generate_pb2.ModelInfo]:
        """Make a call of GetModelInfo."""
        check_options(options, CallOptions, method="model_info")
        request = generate_pb2.GetModelInfoRequest()
        set_field(request, "model", options.get("model"))
        return self.call(_calls.GET_MODEL_INFO, request, options)

    def health_check(self) -> Call[Any, Any]:
        """Make a call that asks for the server's health."""
        return self.call(_calls.HEALTH_CHECK, HealthCheckRequest(), {})

    def health_watch(self, *, timeout_s: float) -> Call[Any, Any]:
        """Make a call that follows the server's health, and waits until the server can be reached."""
        return Call(
            method=_calls.HEALTH_WATCH,
            request=HealthCheckRequest(),
            timeout_s=timeout_s,
            metadata=self._metadata(),
            wait_for_ready=True,
        )

    def call(
        self, method: Method[Request, Response], request: Request, options: TimeoutOptions
    ) -> Call[Request, Response]:
        """Make a call of any method. Raises ``InvalidArgument`` for a request that is too large to send."""
        if request.ByteSize() > self._config.max_message_bytes:
            # gRPC would say RESOURCE_EXHAUSTED, which elsewhere means that trying again may help.
            raise InvalidArgument(
                f"the request has {request.ByteSize()} bytes; max_message_bytes is"
                f" {self._config.max_message_bytes}"
            )
        return Call(
            method=method,
            request=request,
            timeout_s=self.timeout_s(options),
            metadata=self._metadata(),
        )

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        api_key = self._config.api_key
        authorization = (("authorization", f"Bearer {api_key}"),) if api_key is not None else ()
        return (*authorization, *trace_metadata())


def _generate_request(
    text: str | None, options: GenerateOptions, *, method: str
) -> generate_pb2.GenerateRequest:
    check_options(options, GenerateOptions, method=method)
    token_ids, messages = options.get("token_ids"), options.get("messages")
    check_one_input(method, text=text, token_ids=token_ids, messages=messages)
    request = generate_pb2.GenerateRequest()
    set_field(request, "model", options.get("model"))
    set_field(request, "text", text)
    if token_ids is not None:
        request.token_ids.SetInParent()
        with refusing("token_ids.ids"):
            request.token_ids.ids.extend(token_ids)
    if messages is not None:
        fill_chat(request.chat, messages, options.get("add_generation_prompt"))
    _fill_parameters(request.parameters, options)
    _fill_cache_options(request.cache, options)
    set_field(request, "request_id", options.get("request_id"))
    set_field(request, "priority", options.get("priority"))
    return request


def _fill_parameters(parameters: generate_pb2.GenerationParameters, options: GenerateOptions) -> None:
    for name in _PARAMETERS:
        set_field(parameters, name, options.get(name), prefix="parameters.")
    stop = options.get("stop")
    if stop is not None:
        with refusing("parameters.stop"):
            parameters.stop.extend([stop] if isinstance(stop, str) else stop)
    stop_token_ids = options.get("stop_token_ids")
    if stop_token_ids is not None:
        with refusing("parameters.stop_token_ids"):
            parameters.stop_token_ids.extend(stop_token_ids)
    with refusing("parameters.logit_bias"):
        for token_id, bias in (options.get("logit_bias") or {}).items():
            parameters.logit_bias.add(token_id=token_id, bias=bias)


def _fill_cache_options(cache: generate_pb2.CacheOptions, options: GenerateOptions) -> None:
    for name in _CACHE_OPTIONS:
        set_field(cache, name, options.get(name), prefix="cache.")
    fill_duration(cache.lifetime, options.get("lifetime_s"), field="cache.lifetime")
