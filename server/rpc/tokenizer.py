"""Text to token ids and back, for one model: blocking calls, made from the thread pool.

**Control tokens in a client's text are text.** A plain prompt, a message's content and its role never become
special tokens (``<|im_end|>`` and the like), only the model's template and the tokenizer itself write them.
Added tokens that the tokenizer does not mark as special (``<think>``) are ordinary vocabulary and stay so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from server.rpc.detokenizer import DetokenizerFactory, detokenizer_factory
from server.rpc.errors import InvalidArgument
from server.rpc.model_files import ModelFiles, ModelFilesError
from server.rpc.requests import ChatPrompt, Prompt, TextPrompt, TokenPrompt

__all__ = ["ModelTokenizer"]

_MAX_TEMPLATE_MESSAGE_CHARS = 200
_PRIVATE_USE = range(0xE000, 0xF900)


class ModelTokenizer:
    """One model's tokenizer and template. Safe to use from several threads."""

    def __init__(self, files: ModelFiles) -> None:
        try:
            self._tokenizer = _tokenizer_from(files.tokenizer_json)
            # Two instances: whether special tokens are recognised is the state of a tokenizer, not of a call.
            self._literal = _tokenizer_from(files.tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ModelFilesError(f"tokenizer.json: {error}") from error
        self._literal.encode_special_tokens = True
        self._template = files.chat_template
        self._special_tokens = files.special_tokens
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_re = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._longest_token_chars = max(map(len, self._tokenizer.get_vocab()), default=1)
        self.detokenizers: DetokenizerFactory = detokenizer_factory(self._tokenizer)
        self.eos_token_ids = files.eos_token_ids
        if not self.eos_token_ids:
            eos_id = self._tokenizer.token_to_id(files.special_tokens.get("eos_token", ""))
            self.eos_token_ids = () if eos_id is None else (eos_id,)

    @property
    def has_chat_template(self) -> bool:
        """Say whether chats can be rendered."""
        return self._template is not None

    def warm_up(self) -> None:
        """Import and compile what the first request would wait for."""
        if self._template is not None:
            from transformers.utils import chat_template_utils  # noqa: F401  (about a second)

    def encode(self, prompt: Prompt, *, max_model_length: int, add_special_tokens: bool = True) -> list[int]:
        """Return a prompt's token ids. Raises :class:`InvalidArgument` for what is surely too long."""
        match prompt:
            case TokenPrompt():
                return prompt.token_ids
            case TextPrompt():
                self._check_size(prompt.field, len(prompt.text), max_model_length)
                return _encode(self._literal, prompt.text, add_special_tokens=add_special_tokens)
            case ChatPrompt():
                self._check_size(
                    prompt.field,
                    sum(len(message["content"]) for message in prompt.messages),
                    max_model_length,
                )
                return self._encode_chat(prompt)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens. Ids without a token (padding of the vocabulary) have none."""
        # Batches release the interpreter lock, single calls do not.
        return str(
            self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]
        )

    def text_of(self, token_id: int) -> str:
        """Return one token's text, special or not."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def _check_size(self, field: str, num_chars: int, max_model_length: int) -> None:
        """Refuse what no tokenizer could make short enough, before spending time on it."""
        # A factor for normalizers that drop or join characters.
        if num_chars > 4 * max_model_length * self._longest_token_chars:
            raise InvalidArgument.of(field, f"is too long for the model's {max_model_length} tokens")

    def _encode_chat(self, prompt: ChatPrompt) -> list[int]:
        if self._template is None:
            raise InvalidArgument.of(prompt.field, "the model has no chat template")
        texts = [text for message in prompt.messages for text in message.values()]
        if not any(self._special_re.search(text) for text in texts):
            return _encode(self._tokenizer, self._render(prompt.messages, prompt), add_special_tokens=False)
        # Break the special tokens in the client's text with a mark that occurs nowhere, render, and encode
        # what stands between the template's own special tokens without the marks.
        mark = next(
            chr(code)
            for code in _PRIVATE_USE
            if not any(chr(code) in text for text in [*texts, self._template])
        )
        marked = [
            {
                name: self._special_re.sub(lambda found: found[0][:1] + mark + found[0][1:], text)
                for name, text in message.items()
            }
            for message in prompt.messages
        ]
        ids: list[int] = []
        for part in self._special_re.split(self._render(marked, prompt)):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                ids += _encode(self._literal, part.replace(mark, ""), add_special_tokens=False)
        return ids

    def _render(self, messages: list[dict[str, str]], prompt: ChatPrompt) -> str:
        """Render in the sandboxed environment of transformers (which does not import torch for it)."""
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                add_generation_prompt=prompt.add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:
            raise InvalidArgument.of(
                prompt.field, _refusal(error, raised_by_template=type(error) is TemplateError)
            ) from error
        return str(rendered[0])


def _refusal(error: Exception, *, raised_by_template: bool) -> str:
    text = "the model's template refuses this conversation"
    message = str(error)
    if raised_by_template and message.isprintable() and len(message) <= _MAX_TEMPLATE_MESSAGE_CHARS:
        return f"{text}: {message}"
    return text


def _tokenizer_from(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    # A batch of one: `encode_batch` releases the interpreter lock while it works, `encode` does not.
    return list(tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)
