"""Turn documents into rows of token ids for training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from builtin_corpus import Document, Kind
from builtin_tokenizer import BOS, EOS, chat_text
from torch import Tensor
from transformers import PreTrainedTokenizerFast

__all__ = ["Sampler"]

CHAT_SHARE = 0.35
MAX_ANSWER_CHARS = 700
SYSTEM_PROMPT = "You answer questions about the Python standard library."


class Sampler:
    """Turn documents into training rows; a docstring is sometimes shown as the answer in a chat."""

    def __init__(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, *, seed: int
    ) -> None:
        self._documents = list(documents)
        self._tokenizer = tokenizer
        self._seed = seed
        self._pending: list[int] = []
        self._stream = self._epochs()

    def batch(self, num_rows: int, row_length: int) -> Tensor:
        """Return the next ``[num_rows, row_length + 1]`` ids; a row ends with the first id of the next."""
        num_ids = num_rows * row_length
        while len(self._pending) <= num_ids:
            self._pending += next(self._stream)
        ids = self._pending[: num_ids + 1]
        del self._pending[:num_ids]
        return torch.tensor([ids[at : at + row_length + 1] for at in range(0, num_ids, row_length)])

    def _epochs(self) -> Iterator[list[int]]:
        """Yield the ids of one pass over the documents, for ever; each pass has its own order and chats."""
        for epoch in itertools.count():
            generator = random.Random(f"{self._seed}/{epoch}")
            order = list(range(len(self._documents)))
            generator.shuffle(order)
            texts = [self._render(self._documents[index], generator) for index in order]
            encoded: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            yield list(itertools.chain.from_iterable(encoded))

    def _render(self, document: Document, generator: random.Random) -> str:
        if document.kind is Kind.COMMENT or generator.random() >= CHAT_SHARE:
            return BOS + document.text + EOS
        messages = [
            {"role": "user", "content": _question(document, generator)},
            {"role": "assistant", "content": _answer(document)},
        ]
        if generator.random() < 0.3:
            messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
        return chat_text(self._tokenizer, messages, add_generation_prompt=False)


def _question(document: Document, generator: random.Random) -> str:
    name = document.name
    if document.kind is Kind.TOPIC:
        return generator.choice([f"Explain the topic {name}.", f"What does the reference say about {name}?"])
    if document.what in ("function", "method"):
        return generator.choice(
            [f"What does {name} do?", f"Describe the {document.what} {name}.", f"Explain {name}."]
        )
    return generator.choice(
        [f"What is the {document.what} {name}?", f"Describe the {document.what} {name}.", f"Explain {name}."]
    )


def _answer(document: Document) -> str:
    answer = ""
    for paragraph in document.text.split("\n\n"):
        if answer and len(answer) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        answer += ("\n\n" if answer else "") + paragraph
    return answer
