"""Texts and pairs of texts to token ids, with the fast tokenizer of the model's own folder.

**Control tokens in a caller's text are text**: "[SEP]" or "</s>" written by a caller is split like any other
word and never becomes the token, as on the generating side; only the tokenizer puts those in. Added tokens
that are not marked as special are ordinary vocabulary and stay so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from server.predict.errors import InputError
from server.predict.messages import TextItem
from server.worker.errors import ModelLoadError
from server.worker.predict.folder import ModelFolder
from server.worker.predict.literal import control_ids, without_control_tokens

__all__ = ["EncodedText", "TextTokenizer", "TokenizerFiles", "read_tokenizer_files"]

_MAX_CHARS_PER_TOKEN = 1024
"""Longer than any token of a real vocabulary; bounds the work on a text that is surely too long."""

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One input as tokens."""

    ids: Ids
    type_ids: Ids | None
    """Which text of a pair a token is from, for families that want to know."""
    spans: tuple[tuple[int, int, int, int], ...] = ()
    """(position, start, end, part) of the tokens of the texts, those that the tokenizer adds left out;
    character ranges are half-open. Only where asked for."""
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)


class TextTokenizer:
    """One model's tokenizer. Safe to use from several threads; holds no interpreter lock while it works."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        gives_types: bool,
        unknown: str | None = None,
        lower_case: bool = False,
    ) -> None:
        """``unknown``: the token for words that the vocabulary lacks."""
        self._tokenizer = tokenizer
        self._literal: Tokenizer | None = None
        self._making_literal = Lock()
        self._unknown = unknown
        self._control_ids = control_ids(tokenizer, unknown=unknown)
        self._gives_types = gives_types
        self._lower_case = lower_case
        self._max_length = 0
        self._max_chars = 0
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        empty = tokenizer.encode(""), tokenizer.encode("", "")
        self._num_controls = tuple(map(self._count_controls, empty))

    def limit(self, max_length: int) -> None:
        """Set the longest input, once, before any other use. Raises ``ModelLoadError``."""
        num_added = self._tokenizer.num_special_tokens_to_add(is_pair=True)
        if max_length <= num_added:
            raise ModelLoadError(
                f"a maximum length of {max_length} leaves no room beside {num_added} tokens of the tokenizer"
            )
        self._max_length = max_length
        self._max_chars = max_length * _MAX_CHARS_PER_TOKEN
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def encode(
        self, items: Sequence[TextItem], *, truncate: bool, with_spans: bool = False
    ) -> list[EncodedText]:
        """Return the items' tokens. Raises ``InputError`` for what is too long, empty, or no text."""
        for index, item in enumerate(items):
            self._check_size(index, item, truncate=truncate)
        texts = [self._text(item) for item in items]
        # Batches release the interpreter lock, single calls do not; without spans they are not even made.
        encode = self._tokenizer.encode_batch if with_spans else self._tokenizer.encode_batch_fast
        try:
            encodings = encode(texts)
        except (TypeError, UnicodeError):
            raise self._no_text(items) from None
        for index, encoding in enumerate(encodings):
            # More control tokens than the tokenizer puts in by itself: the text has the others.
            if self._count_controls(encoding) != self._num_controls[items[index].pair is not None]:
                encodings[index] = self._literal_tokenizer().encode_batch([texts[index]])[0]
        return [
            self._read(index, encoding, truncate=truncate, with_spans=with_spans)
            for index, encoding in enumerate(encodings)
        ]

    def _count_controls(self, encoding: Encoding) -> int:
        return sum(map(self._control_ids.__contains__, encoding.ids))

    def _literal_tokenizer(self) -> Tokenizer:
        with self._making_literal:
            if self._literal is None:
                self._literal = without_control_tokens(self._tokenizer, unknown=self._unknown)
            return self._literal

    def _text(self, item: TextItem) -> Any:
        parts = [item.text, *([] if item.pair is None else [item.pair])]
        if self._lower_case:
            parts = [part.lower() for part in parts]
        # What no token of the limit can reach is not worth looking at.
        parts = [part[: self._max_chars] for part in parts]
        return parts[0] if item.pair is None else tuple(parts)

    def _check_size(self, index: int, item: TextItem, *, truncate: bool) -> None:
        if not truncate and len(item.text) + len(item.pair or "") > self._max_chars:
            raise self._too_long(index)

    def _read(self, index: int, encoding: Encoding, *, truncate: bool, with_spans: bool) -> EncodedText:
        truncated = bool(encoding.overflowing)
        if truncated and not truncate:
            raise self._too_long(index)
        ids = np.array(encoding.ids, np.int32)
        if not len(ids):
            raise InputError("has no tokens for this model", index=index, part="text")
        types = np.array(encoding.type_ids, np.int32) if self._gives_types else None
        return EncodedText(ids, types, _spans(encoding) if with_spans else (), truncated)

    def _too_long(self, index: int) -> InputError:
        reason = f"is longer than the model's {self._max_length} tokens; ask for truncation to have it cut"
        return InputError(reason, index=index, part="text")

    def _no_text(self, items: Sequence[TextItem]) -> InputError:
        for index, item in enumerate(items):
            for part, text in (("text", item.text), ("pair", item.pair)):
                try:
                    (text or "").encode()
                except UnicodeError:
                    return InputError("is not well-formed Unicode", index=index, part=part)
        return InputError("cannot be tokenized")


def _spans(encoding: Encoding) -> tuple[tuple[int, int, int, int], ...]:
    columns = zip(encoding.special_tokens_mask, encoding.offsets, encoding.sequence_ids, strict=True)
    return tuple(
        (position, start, end, part or 0)
        for position, (is_special, (start, end), part) in enumerate(columns)
        if not is_special
    )


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder says about its tokenizer."""

    tokenizer_json: bytes
    gives_types: bool
    unknown: str | None
    """The token for words that the vocabulary lacks."""

    def build(self, *, lower_case: bool) -> TextTokenizer:
        """Make the tokenizer; any thread. Raises ``ModelLoadError``."""
        try:
            tokenizer = Tokenizer.from_buffer(self.tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            logger.info("reading tokenizer.json failed", exc_info=error)
            raise ModelLoadError("tokenizer.json can not be used") from None
        return TextTokenizer(
            tokenizer, gives_types=self.gives_types, unknown=self.unknown, lower_case=lower_case
        )


def read_tokenizer_files(folder: ModelFolder, config: PreTrainedConfig) -> TokenizerFiles:
    """Read, and convert where there is no ``tokenizer.json``. Raises ``ModelLoadError``."""
    raw = folder.read("tokenizer.json")
    if raw is None:
        raw = _convert(folder)
    gives_types = "token_type_ids" in _input_names(folder, config) and _has_types(config)
    return TokenizerFiles(raw, gives_types, _unknown_token(folder))


def _unknown_token(folder: ModelFolder) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = folder.read_settings(name).get("unk_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _convert(folder: ModelFolder) -> bytes:
    """Make a fast tokenizer of the files of a slow one; code of the folder is never run."""
    folder.check_links()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder.path, trust_remote_code=False, local_files_only=True, use_fast=True
        )
    except Exception as error:  # many kinds of files, many kinds of failures
        logger.info("converting the tokenizer failed", exc_info=error)
        raise ModelLoadError("the folder has no tokenizer.json, and none can be made of its files") from None
    if not tokenizer.is_fast or not len(tokenizer):
        raise ModelLoadError("the folder has no tokenizer.json, and its tokenizer has no fast form")
    text: str = tokenizer.backend_tokenizer.to_str()
    return text.encode()


def _input_names(folder: ModelFolder, config: PreTrainedConfig) -> list[str]:
    """Return what the tokenizer's class says that the model takes."""
    settings = folder.read_settings("tokenizer_config.json")
    names = settings.get("model_input_names")
    if isinstance(names, list):
        return [str(name) for name in names]
    stated = settings.get("tokenizer_class")
    for name in (stated, TOKENIZER_MAPPING_NAMES.get(config.model_type)):
        try:
            found = tokenizer_class_from_name(str(name)) if name else None
        except ImportError:
            found = None
        if found is not None:
            return list(found.model_input_names)
    return []


def _has_types(config: PreTrainedConfig) -> bool:
    num_types = getattr(config, "type_vocab_size", None)
    return num_types is None or num_types > 1
