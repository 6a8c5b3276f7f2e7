"""Keyword arguments of calls, written once for both clients and all methods."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

__all__ = [
    "CallOptions",
    "ChatMessage",
    "DetokenizeOptions",
    "GenerateOptions",
    "Messages",
    "TimeoutOptions",
    "TokenizeOptions",
    "check_options",
]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    """"system", "user", "assistant", or another role that the model's template knows."""
    content: str


Messages = Sequence[ChatMessage | Mapping[str, str]]


class TimeoutOptions(TypedDict, total=False):
    """What every call takes."""

    timeout_s: float | None
    """Deadline of this call, its retries included. Default: the client's. None: no deadline."""


class CallOptions(TimeoutOptions, total=False):
    """What every call about one model takes."""

    model: str
    """Served model's name. Default: the server's only model."""


class TokenizeOptions(CallOptions, total=False):
    """Keyword arguments of ``tokenize``."""

    messages: Messages | None
    """A conversation, instead of text."""
    add_generation_prompt: bool | None
    """Whether the rendered conversation ends with the opening of the assistant's turn. Default: True."""
    add_special_tokens: bool | None
    """Whether to add what the tokenizer adds to a prompt. Default: True; conversations never add more."""


class DetokenizeOptions(CallOptions, total=False):
    """Keyword arguments of ``detokenize``."""

    skip_special_tokens: bool | None
    """Default: True."""


class GenerateOptions(CallOptions, total=False):
    """Keyword arguments of ``generate`` and ``generate_once``.

    None and absent mean the same, the server's default, which is named beside each; zero means zero.
    """

    token_ids: Sequence[int] | None
    """The prompt as token ids, instead of text."""
    messages: Messages | None
    """The prompt as a conversation, instead of text; rendered by the model's own template."""
    add_generation_prompt: bool | None
    """Whether the rendered conversation ends with the opening of the assistant's turn. Default: True."""

    max_new_tokens: int | None
    """Default: 128, or what is left of the model's length."""
    min_new_tokens: int | None
    """Nothing ends a sample before this many tokens. Default: 0."""
    temperature: float | None
    """0 is greedy. [0, 100]. Default: 0."""
    top_k: int | None
    """0: all tokens. Default: 0."""
    top_p: float | None
    """(0, 1]. Default: 1."""
    min_p: float | None
    """[0, 1]. Default: 0."""
    repetition_penalty: float | None
    """(0, 10], over prompt and generated tokens. Default: 1."""
    presence_penalty: float | None
    """[-2, 2], over generated tokens. Default: 0."""
    frequency_penalty: float | None
    """[-2, 2], over generated tokens. Default: 0."""
    seed: int | None
    """Same seed, same tokens, whatever else is in the batch. Default: the server draws one and reports it."""
    stop: str | Sequence[str] | None
    """Text that ends a sample, also across token borders; not part of the output."""
    stop_token_ids: Sequence[int] | None
    """Tokens that end a sample, in addition to the model's own."""
    ignore_eos: bool | None
    """Go on past the model's end-of-sequence tokens. Default: False."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits of the named tokens, each in [-100, 100]."""
    logprobs: int | None
    """0: log-probability of the drawn token; n: of the n likeliest as well. Default: none."""
    n: int | None
    """Samples that share the prompt's blocks. Default: 1."""

    kv_cache: bool | None
    """False: recompute everything in every step: the reference, slow. Default: True."""
    read_prefix: bool | None
    """False: reuse nothing that earlier calls left. Default: True."""
    write_prefix: bool | None
    """False: leave nothing behind for later calls. Default: True."""
    lifetime_s: float | None
    """How long what this call leaves behind may be reused. Default: the server's."""

    request_id: str
    """Names the call in logs; unique among the caller's running calls. Default: the server makes one."""
    priority: int | None
    """Higher is served earlier. [-100, 100]. Default: 0."""


def check_options(options: Mapping[str, Any], known: type[Any], *, method: str) -> None:
    """Raise TypeError for a keyword argument that ``known``, a TypedDict, doesn't have.

    Type checkers find it earlier; this is for those who use none.
    """
    names = known.__required_keys__ | known.__optional_keys__
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}{hint}")
