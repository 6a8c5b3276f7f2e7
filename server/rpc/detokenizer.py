"""Turn tokens into text as they come: constant work per token, never part of a character.

What a :class:`Detokenizer` returns, joined, is what the tokenizer's own decoder makes of all the tokens at
once, less the text of the prompt before them: a model's first token may begin with the space that separates
it from the prompt, and keeps it. Special tokens have no text.

Three kinds, chosen by the ``decoder`` section of ``tokenizer.json``:

- **byte level** (GPT-2 and after): each token is some bytes; an incremental UTF-8 decoder joins them.
- **pieces** (SentencePiece-like): each token is text with ``▁`` for a space, or one byte ``<0xNN>``. The
  tokenizer decodes a run of byte tokens as a whole, and replaces all of it if any of it is broken; so a run
  is held until it ends, at most ``MAX_RUN_BYTES``, after which what is complete is released.
- **window**, for all others: the tokenizer decodes a short window twice and the difference is the news.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

__all__ = ["Detokenizer", "DetokenizerFactory", "detokenizer_factory"]

MAX_RUN_BYTES = 64
MAX_WINDOW_TOKENS = 32
_SPACE_MARK = "\u2581"
_REPLACEMENT = "\ufffd"
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """The text of one sample."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that became certain."""
        ...

    def flush(self) -> str:
        """Return what is left: an incomplete character becomes U+FFFD. Nothing may be pushed afterwards."""
        ...


class DetokenizerFactory(Protocol):
    """What all samples of a model share."""

    def begin(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """Return the detokenizer of a sample that continues ``prompt_ids`` (empty: starts from nothing)."""
        ...

    def cover(self, vocab_size: int) -> None:
        """Accept ids below ``vocab_size``; those that the tokenizer does not know have no text."""
        ...


def detokenizer_factory(tokenizer: Tokenizer) -> DetokenizerFactory:
    """Choose by the tokenizer's decoder. Takes a while for large vocabularies; blocks."""
    description = json.loads(tokenizer.to_str())
    special = frozenset(token["id"] for token in description["added_tokens"] if token["special"])
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    tokens = [None if token_id in special else tokenizer.id_to_token(token_id) for token_id in range(size)]
    decoder = description["decoder"]
    if decoder is not None and decoder["type"] == "ByteLevel":
        return _ByteLevelFactory(tokens)
    layout = _piece_layout(decoder)
    if layout is not None:
        return _PieceFactory(tokens, layout)
    return _WindowFactory(tokenizer)


# --- byte level


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes stand for themselves, others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


class _ByteLevelFactory:
    def __init__(self, tokens: Sequence[str | None]) -> None:
        alphabet = _byte_of_character()
        self._bytes_of = [_token_bytes(token, alphabet) for token in tokens]

    def begin(self, prompt_ids: Sequence[int]) -> Detokenizer:
        return _ByteLevelDetokenizer(self._bytes_of)

    def cover(self, vocab_size: int) -> None:
        self._bytes_of += [b""] * (vocab_size - len(self._bytes_of))


def _token_bytes(token: str | None, alphabet: dict[str, int]) -> bytes:
    if token is None:
        return b""
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:  # an added token with a character outside of the alphabet stands for itself
        return token.encode()


class _ByteLevelDetokenizer:
    __slots__ = ("_bytes_of", "_decoder")

    def __init__(self, bytes_of: list[bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = _Utf8Decoder("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        bytes_of = self._bytes_of
        if len(token_ids) == 1:
            return self._decoder.decode(bytes_of[token_ids[0]])
        return self._decoder.decode(b"".join([bytes_of[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


# --- pieces


class _PieceLayout:
    """How a SentencePiece-like decoder treats the very first token, and whether it knows byte tokens."""

    def __init__(self, *, mark: str, byte_fallback: bool, first_strip: str) -> None:
        self.mark = mark
        self.byte_fallback = byte_fallback
        self.first_strip = first_strip
        """``none``; ``space``: one space off the text; ``marks``: every mark off the first token."""


def _piece_layout(decoder: dict[str, Any] | None) -> _PieceLayout | None:
    """Return the layout of a decoder that the pieces detokenizer equals; None for all others."""
    if decoder is None:
        return None
    if decoder["type"] == "Metaspace":
        strip = "none" if decoder.get("prepend_scheme", "always") == "never" else "marks"
        return _PieceLayout(mark=decoder["replacement"], byte_fallback=False, first_strip=strip)
    if decoder["type"] != "Sequence":
        return None
    stages = list(decoder["decoders"])
    replace = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
    strip_one = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    kinds = [stage["type"] for stage in stages]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or stages[0] != replace:
        return None
    match stages[3:]:
        case []:
            return _PieceLayout(mark=_SPACE_MARK, byte_fallback=True, first_strip="none")
        case [stage] if stage == strip_one:
            return _PieceLayout(mark=_SPACE_MARK, byte_fallback=True, first_strip="space")
    return None


class _PieceFactory:
    def __init__(self, tokens: Sequence[str | None], layout: _PieceLayout) -> None:
        self._layout = layout
        self._pieces = [_piece(token, layout) for token in tokens]

    def begin(self, prompt_ids: Sequence[int]) -> Detokenizer:
        continues = any(self._pieces[token_id] is not None for token_id in prompt_ids)
        return _PieceDetokenizer(self._pieces, "none" if continues else self._layout.first_strip)

    def cover(self, vocab_size: int) -> None:
        self._pieces += [None] * (vocab_size - len(self._pieces))


def _piece(token: str | None, layout: _PieceLayout) -> str | int | None:
    """Return a token's text, or its byte; None for a special token."""
    if token is None:
        return None
    text = token.replace(layout.mark, " ")
    if layout.byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return text
    return text


class _PieceDetokenizer:
    __slots__ = ("_first_strip", "_pieces", "_run")

    def __init__(self, pieces: list[str | int | None], first_strip: str) -> None:
        self._pieces = pieces
        self._first_strip = first_strip
        self._run = bytearray()

    def push(self, token_ids: Sequence[int]) -> str:
        parts: list[str] = []
        for token_id in token_ids:
            piece = self._pieces[token_id]
            if piece is None:
                continue
            if isinstance(piece, int):
                self._run.append(piece)
                if len(self._run) >= MAX_RUN_BYTES:
                    parts.append(self._stripped(self._release_complete()))
                continue
            if self._first_strip == "marks":  # a Metaspace decoder: no byte tokens, so this is the first
                piece = piece.replace(" ", "")
                self._first_strip = "none"
            if self._run:
                piece = self._end_run() + piece
            parts.append(self._stripped(piece))
        return "".join(parts)

    def flush(self) -> str:
        return self._stripped(self._end_run()) if self._run else ""

    def _stripped(self, text: str) -> str:
        if self._first_strip != "space" or not text:
            return text
        self._first_strip = "none"
        return text.removeprefix(" ")

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _release_complete(self) -> str:
        decoder = _Utf8Decoder("replace")
        text = decoder.decode(self._run)
        self._run = bytearray(decoder.getstate()[0])
        return text


# --- window


class _WindowFactory:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def begin(self, prompt_ids: Sequence[int]) -> Detokenizer:
        return _WindowDetokenizer(self._tokenizer, list(prompt_ids[-MAX_WINDOW_TOKENS // 2 :]))

    def cover(self, vocab_size: int) -> None:
        pass  # the tokenizer's decoder takes any id


class _WindowDetokenizer:
    __slots__ = ("_known", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = context
        self._known = tokenizer.decode(context) if context else ""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        return self._news(self._tokenizer.decode(self._window))

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        full = len(self._window) >= MAX_WINDOW_TOKENS
        if text.endswith(_REPLACEMENT) and not full:
            return ""
        news = self._news(text)
        if full:
            self._window = self._window[-MAX_WINDOW_TOKENS // 2 :]
            self._known = self._tokenizer.decode(self._window)
        else:
            self._known = text
        return news

    def _news(self, text: str) -> str:
        """Return what ``text`` adds to what was released; nothing if a decoder rewrote that."""
        return text[len(self._known) :]
