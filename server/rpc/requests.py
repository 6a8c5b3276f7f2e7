"""A client's request in the front end's own terms: what :mod:`server.rpc.convert` makes of a message."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from server.engine.messages import EngineReady, GenerateSpec
from server.rpc.errors import InvalidArgument, NeverFits

__all__ = ["ChatPrompt", "GenerateCall", "ModelLimits", "Prompt", "TextPrompt", "TokenPrompt"]

DEFAULT_MAX_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; what looks like a control token in it is text."""

    text: str
    field: str = "text"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, checked against the vocabulary."""

    token_ids: list[int]
    field: str = "token_ids"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the model's template."""

    messages: list[dict[str, str]]
    add_generation_prompt: bool
    field: str = "chat"


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What validation needs to know of the loaded model."""

    vocab_size: int
    max_model_length: int
    block_size: int
    num_blocks: int

    @classmethod
    def of(cls, ready: EngineReady) -> ModelLimits:
        """Take the limits from what the engine said when it was ready."""
        return cls(ready.vocab_size, ready.max_model_length, ready.block_size, ready.num_blocks)

    def check_prompt_length(self, field: str, num_tokens: int) -> None:
        """Raise :class:`InvalidArgument` unless the prompt is not empty and leaves room for one token."""
        if num_tokens == 0:
            raise InvalidArgument.of(field, "must not be empty")
        if num_tokens >= self.max_model_length:
            raise InvalidArgument.of(
                field,
                f"has {num_tokens} tokens; the model takes {self.max_model_length} with the generated ones",
            )


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A generation request whose fields are all valid by themselves; the prompt is not tokenized yet."""

    prompt: Prompt
    request_id: str
    """Never empty: drawn by the server where the client gave none."""
    draft: GenerateSpec
    """Everything but ``token_ids`` and the final ``max_new_tokens``."""
    max_new_tokens: int | None
    stop_strings: tuple[str, ...] = ()

    def complete(self, token_ids: list[int], limits: ModelLimits) -> GenerateSpec:
        """Return the spec for the engine.

        Raises :class:`InvalidArgument` for a prompt that is empty or too long for the model, and
        :class:`NeverFits` for one that needs more blocks than the pool has.
        """
        num_prompt = len(token_ids)
        limits.check_prompt_length(self.prompt.field, num_prompt)
        room = limits.max_model_length - num_prompt
        max_new_tokens = min(
            DEFAULT_MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens, room
        )
        if self.draft.min_new_tokens > max_new_tokens:
            raise InvalidArgument.of(
                "parameters.min_new_tokens", f"must be at most {max_new_tokens}, which can be generated"
            )
        # The last token drawn is never put in: its KV takes no slot.
        num_positions = num_prompt + max_new_tokens - 1
        num_slots = limits.num_blocks * limits.block_size
        if num_positions > num_slots:
            raise NeverFits(
                f"{num_prompt} prompt tokens and {max_new_tokens} new ones can never fit "
                f"the server's KV cache of {num_slots} tokens"
            )
        return msgspec.structs.replace(self.draft, token_ids=token_ids, max_new_tokens=max_new_tokens)
