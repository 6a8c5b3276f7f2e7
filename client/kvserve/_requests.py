"""From keyword arguments to calls: the only place that fills request messages, for both clients.

Only what can't be written into a message is refused here; ranges are the server's to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from google.protobuf.message import Message

from kvserve import _calls
from kvserve._calls import Call, Method
from kvserve._config import ClientConfig
from kvserve._errors import FieldViolation, InvalidArgument
from kvserve._health import HealthCheckRequest
from kvserve._options import (
    CallOptions,
    ChatMessage,
    DetokenizeOptions,
    GenerateOptions,
    Messages,
    TokenizeOptions,
    check_options,
)
from kvserve._tracing import trace_metadata
from kvserve.v1 import common_pb2, generate_pb2

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

    def stream_generate(
        self, text: str | None, options: GenerateOptions
    ) -> Call[generate_pb2.GenerateRequest, generate_pb2.GenerateEvent]:
        """Make a streaming call."""
        return self._call(
            _calls.STREAM_GENERATE, _generate_request(text, options, method="generate"), options
        )

    def generate(
        self, text: str | None, options: GenerateOptions
    ) -> Call[generate_pb2.GenerateRequest, generate_pb2.GenerateResponse]:
        """Make a call that is answered at once, when all samples ended."""
        return self._call(_calls.GENERATE, _generate_request(text, options, method="generate_once"), options)

    def tokenize(
        self, text: str | None, options: TokenizeOptions
    ) -> Call[generate_pb2.TokenizeRequest, generate_pb2.TokenizeResponse]:
        """Make a call of Tokenize."""
        check_options(options, TokenizeOptions, method="tokenize")
        messages = options.get("messages")
        _check_one_input("tokenize", text=text, messages=messages)
        request = generate_pb2.TokenizeRequest()
        _set(request, "model", options.get("model"))
        _set(request, "text", text)
        if messages is not None:
            _fill_chat(request.chat, messages, options.get("add_generation_prompt"))
        _set(request, "add_special_tokens", options.get("add_special_tokens"))
        return self._call(_calls.TOKENIZE, request, options)

    def detokenize(
        self, token_ids: Sequence[int], options: DetokenizeOptions
    ) -> Call[generate_pb2.DetokenizeRequest, generate_pb2.DetokenizeResponse]:
        """Make a call of Detokenize."""
        check_options(options, DetokenizeOptions, method="detokenize")
        request = generate_pb2.DetokenizeRequest()
        _set(request, "model", options.get("model"))
        with _refusing("token_ids"):
            request.token_ids.extend(token_ids)
        _set(request, "skip_special_tokens", options.get("skip_special_tokens"))
        return self._call(_calls.DETOKENIZE, request, options)

    def model_info(
        self, options: CallOptions
    ) -> Call[generate_pb2.GetModelInfoRequest, generate_pb2.ModelInfo]:
        """Make a call of GetModelInfo."""
        check_options(options, CallOptions, method="model_info")
        request = generate_pb2.GetModelInfoRequest()
        _set(request, "model", options.get("model"))
        return self._call(_calls.GET_MODEL_INFO, request, options)

    def health_check(self) -> Call[Any, Any]:
        """Make a call that asks for the server's health."""
        return self._call(_calls.HEALTH_CHECK, HealthCheckRequest(), {})

    def health_watch(self, *, timeout_s: float) -> Call[Any, Any]:
        """Make a call that follows the server's health, and waits until the server can be reached."""
        return Call(
            method=_calls.HEALTH_WATCH,
            request=HealthCheckRequest(),
            timeout_s=timeout_s,
            metadata=self._metadata(),
            wait_for_ready=True,
        )

    def _call(
        self, method: Method[Request, Response], request: Request, options: CallOptions
    ) -> Call[Request, Response]:
        if request.ByteSize() > self._config.max_message_bytes:
            # gRPC would say RESOURCE_EXHAUSTED, which elsewhere means that trying again may help.
            raise InvalidArgument(
                f"the request has {request.ByteSize()} bytes; max_message_bytes is"
                f" {self._config.max_message_bytes}"
            )
        return Call(
            method=method,
            request=request,
            timeout_s=options.get("timeout_s", self._config.timeout_s),
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
    _check_one_input(method, text=text, token_ids=token_ids, messages=messages)
    request = generate_pb2.GenerateRequest()
    _set(request, "model", options.get("model"))
    _set(request, "text", text)
    if token_ids is not None:
        request.token_ids.SetInParent()
        with _refusing("token_ids.ids"):
            request.token_ids.ids.extend(token_ids)
    if messages is not None:
        _fill_chat(request.chat, messages, options.get("add_generation_prompt"))
    _fill_parameters(request.parameters, options)
    _fill_cache_options(request.cache, options)
    _set(request, "request_id", options.get("request_id"))
    _set(request, "priority", options.get("priority"))
    return request


def _fill_parameters(parameters: generate_pb2.GenerationParameters, options: GenerateOptions) -> None:
    for name in _PARAMETERS:
        _set(parameters, name, options.get(name), prefix="parameters.")
    stop = options.get("stop")
    if stop is not None:
        with _refusing("parameters.stop"):
            parameters.stop.extend([stop] if isinstance(stop, str) else stop)
    stop_token_ids = options.get("stop_token_ids")
    if stop_token_ids is not None:
        with _refusing("parameters.stop_token_ids"):
            parameters.stop_token_ids.extend(stop_token_ids)
    with _refusing("parameters.logit_bias"):
        for token_id, bias in (options.get("logit_bias") or {}).items():
            parameters.logit_bias.add(token_id=token_id, bias=bias)


def _fill_cache_options(cache: generate_pb2.CacheOptions, options: GenerateOptions) -> None:
    for name in _CACHE_OPTIONS:
        _set(cache, name, options.get(name), prefix="cache.")
    lifetime_s = options.get("lifetime_s")
    if lifetime_s is not None:
        with _refusing("cache.lifetime"):
            cache.lifetime.FromNanoseconds(round(lifetime_s * 1e9))


def _fill_chat(chat: common_pb2.Chat, messages: Messages, add_generation_prompt: bool | None) -> None:
    chat.SetInParent()
    for position, message in enumerate(messages):
        with _refusing(f"chat.messages[{position}]"):
            if isinstance(message, ChatMessage):
                chat.messages.add(role=message.role, content=message.content)
            elif set(message) == {"role", "content"}:
                chat.messages.add(role=message["role"], content=message["content"])
            else:
                raise TypeError("expected a ChatMessage or a mapping with the keys role and content")
    _set(chat, "add_generation_prompt", add_generation_prompt, prefix="chat.")


def _check_one_input(method: str, **inputs: object) -> None:
    """Raise TypeError unless exactly one kind of prompt is given."""
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        raise TypeError(
            f"{method}() takes exactly one of {', '.join(inputs)}; got {', '.join(given) or 'none'}"
        )


def _set(message: Message, name: str, value: object, *, prefix: str = "") -> None:
    """Fill one field; None leaves it absent."""
    if value is not None:
        with _refusing(prefix + name):
            setattr(message, name, value)


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """Name the field of a value that a message can't hold: out of its range, not text, wrong type."""
    try:
        yield
    except UnicodeEncodeError:
        raise _invalid(field, "is not valid Unicode text") from None
    except (ValueError, OverflowError) as error:
        raise _invalid(field, str(error)) from None
    except TypeError as error:
        raise TypeError(f"{field}: {error}") from None


def _invalid(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(f"{field}: {description}", violations=[FieldViolation(field, description)])
