"""Read prompts of any form (text, token ids, chat) out of the messages that have them."""

from __future__ import annotations

from typing import Protocol

from kvserve.v1 import common_pb2
from server.rpc.requests import ChatPrompt, ModelLimits, Prompt, TextPrompt, TokenPrompt
from server.rpc.validation import Violations

__all__ = ["PromptMessage", "read_chat", "read_prompt"]

MAX_CHAT_MESSAGES = 4096


class PromptMessage(Protocol):
    """A message with the three forms of a prompt among its fields."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> common_pb2.TokenIds: ...
    @property
    def chat(self) -> common_pb2.Chat: ...


def read_prompt(
    message: PromptMessage, form: str | None, limits: ModelLimits, violations: Violations, *, path: str = ""
) -> Prompt | None:
    """Validate the ``form`` that is set; None if it is none of the three. ``path`` precedes field names."""
    match form:
        case "text":
            # Whether text is empty shows when it is tokenized: a tokenizer may add a first token of its own.
            if not message.text:
                violations.add(f"{path}text", "must not be empty")
            return TextPrompt(message.text, f"{path}text")
        case "token_ids":
            ids, field = message.token_ids.ids, f"{path}token_ids.ids"
            if not ids:
                violations.add(field, "must not be empty")
            elif len(ids) >= limits.max_model_length:
                violations.add(
                    field,
                    f"has {len(ids)} tokens; "
                    f"the model takes {limits.max_model_length} with the generated ones",
                )
            else:
                violations.token_ids(field, ids, vocab_size=limits.vocab_size)
            return TokenPrompt(list(ids), f"{path}token_ids")
        case "chat":
            return read_chat(message.chat, violations, path=path)
        case _:
            return None


def read_chat(chat: common_pb2.Chat, violations: Violations, *, path: str = "") -> ChatPrompt:
    """Validate a conversation."""
    field = f"{path}chat.messages"
    messages: list[dict[str, str]] = []
    if not chat.messages:
        violations.add(field, "must not be empty")
    elif violations.count(field, len(chat.messages), high=MAX_CHAT_MESSAGES):
        for index, message in enumerate(chat.messages):
            # One bad role says enough: a conversation may have thousands.
            if not violations.role(f"{field}[{index}].role", message.role):
                break
            messages.append({"role": message.role, "content": message.content})
    add = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return ChatPrompt(messages, add, f"{path}chat")
